"""The Hopper kernel in Gluon, built as FlashAttention-3 is (arXiv 2407.08608): three groups of warps pass tiles on.

The first two each compute 64 of the 128 query rows, the third drives the copy engine. Tiles of keys and of values go
round in two rings of `STAGES` slots, each with a barrier that says "full" (bytes have arrived) and one that says
"empty" (both consumers have left). A consumer starts the scores of the next tile before the product with the values of
this one, so that its softmax runs beside a matrix product (section 3.2, "intra-warpgroup overlap"), and the two
consumers take turns at the tensor cores, so that one's softmax runs beside the other's products (section 3.1,
"ping-pong").

Only the last block of an ascending list can be ragged, so only the last tile is masked. The blocks that are not listed
follow as keys and values of their own, their means, a tile of them at a time: few turns, in a loop that keeps it
simple. A grid of one program for each query block, longest list first, does what a persistent kernel would: a program
runs for 100 us and more, its set-up for 2.

Turns are numbered from the first tile on, and so say which slot of a ring a tile has, which phase its barriers are in,
and which consumer is next.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,operator"
from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from diffsparse_kernels.summaries import MOST_BIAS

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
TINY = gl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
MOST_MASS = gl.constexpr(MOST_BIAS * 1.4426950408889634)  # of varied scores, as a power of two
Q_BLOCK = gl.constexpr(128)
ROWS = gl.constexpr(64)  # of a consumer
FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # what a consumer reads of each key, one a thread
# Renamed in Triton 3.9.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
store_wait = tma.store_wait


@dataclass(frozen=True)
class Constants:
    """What `attend` is compiled for.

    D, D_PAD: channels of a head, and of its tiles.
    KV_BLOCK: keys of a block and of a tile.
    STAGES: slots of a ring.
    SPARSE: key blocks are those of a list. ORDERED: programs take the lists in an order.
    MASKED: keys are hidden by a mask.
    MASS: the mass of each key block is summed up against a cached LSE.
    SUMMARISED: blocks that are not listed stand as their means. VARIED: with the mass that their variance adds.
    SLOPED: a first-order step moves the values. BOUNDED: it has a longest length.
    """

    D: int
    D_PAD: int
    KV_BLOCK: int
    STAGES: int
    SPARSE: bool = False
    ORDERED: bool = False
    MASKED: bool = False
    MASS: bool = False
    SUMMARISED: bool = False
    VARIED: bool = False
    SLOPED: bool = False
    BOUNDED: bool = False

    @property
    def COPIED(self) -> bool:  # noqa: N802
        """Whether the copy engine stores the output, whose rows are multiples of 16 bytes then."""
        return self.D % 8 == 0


# To the compiler a named tuple is a tuple of its own: no field may be called `values`.
Call = namedtuple(  # the arguments of `attend`
    "Call",
    "q_tiles k_tiles v_tiles key_tiles value_tiles slope_tiles out_tiles out lse cached mass idx cnt order bits "
    "log_count variance reach key_mask clear scale n_q n_kv heads listed width q_blocks kv_blocks log_b log_h",
)
# A query block: its sample and head, the head among all, its number there and among all, its list's, and that's length.
Place = namedtuple("Place", "b h head row_block block list_at turns")
# Which keys exist, and are let through: of the last tile the first `left`; the first `clear`; those of the mask.
Limits = namedtuple("Limits", "left clear mask_at")
# Slots that tiles go round in, and a barrier of each that says "full" and one that says "empty".
Ring = namedtuple("Ring", "slots full empty")
# Shared memory: a slot of `q` for each consumer; `hands` pass the tensor cores from one to the other.
Memory = namedtuple("Memory", "q k v slopes hands")


# --- layouts ----------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def scores_layout(C):
    """Of a consumer's scores [ROWS, KV_BLOCK]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.KV_BLOCK, 16])


@gluon.constexpr_function
def out_layout(C):
    """Of its weighted values [ROWS, D_PAD]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D_PAD, 16])


@gluon.constexpr_function
def weights_layout(C):
    """Of its weights [ROWS, KV_BLOCK] on their way into a product."""
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D_PAD, 16]), 2)


# --- rings ------------------------------------------------------------------------------------------------------------


@gluon.jit
def make_ring(tiles, STAGES: gl.constexpr, READERS: gl.constexpr):
    """A ring of slots for such tiles, each left by so many readers."""
    slots = gl.allocate_shared_memory(tiles.dtype, [STAGES] + tiles.block_type.shape, tiles.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=READERS)
    return Ring(slots, full, empty)


@gluon.jit
def request(ring, tiles, at, turn, STAGES: gl.constexpr):
    """Start the copy of the tile at `at`, once all readers have left the slot of this turn."""
    slot = turn % STAGES
    mbarrier.wait(ring.empty.index(slot), (turn // STAGES & 1) ^ 1)
    mbarrier.expect(ring.full.index(slot), tiles.block_type.nbytes)
    copy_tile(tiles, at, ring.full.index(slot), ring.slots.index(slot))


@gluon.jit
def arrived(ring, turn, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """The tile of this turn as [ROWS, COLUMNS], when all its bytes are there."""
    mbarrier.wait(ring.full.index(turn % STAGES), turn // STAGES & 1)
    return ring.slots.index(turn % STAGES).reshape([ROWS, COLUMNS])


@gluon.jit
def leave(ring, turn, STAGES: gl.constexpr):
    """Give the slot of this turn back."""
    mbarrier.arrive(ring.empty.index(turn % STAGES), count=1)


# --- places -----------------------------------------------------------------------------------------------------------


@gluon.jit
def place_of(call, C: gl.constexpr):
    """The query block of this program, as an order says."""
    within = gl.program_id(0) % call.listed
    list_at = within
    if C.ORDERED:
        list_at = gl.load(call.order + within)
    block = gl.program_id(0) - within + list_at
    head = block // call.q_blocks
    turns = call.kv_blocks
    if C.SPARSE:
        turns = gl.load(call.cnt + list_at)
    return Place(head // call.heads, head % call.heads, head, block % call.q_blocks, block, list_at, turns)


@gluon.jit
def block_at(turn, call, place, LISTED: gl.constexpr):
    """The key block of a turn."""
    block = turn
    if LISTED:
        listed = call.idx + place.list_at.to(gl.int64) * call.width
        block = gl.load(listed + turn, mask=turn < place.turns, other=0).to(gl.int32)
    return block


@gluon.jit
def tiles_of_means(call, C: gl.constexpr):
    """Number of tiles that the means of all key blocks fill."""
    return gl.cdiv(call.kv_blocks, C.KV_BLOCK)


# --- the producer -----------------------------------------------------------------------------------------------------


@gluon.jit
def produce(call, memory, C: gl.constexpr):
    """Request all tiles in order; the key block of the next turn is read while this one's slots fill."""
    place = place_of(call, C)
    b, h, keys, values = place.b, place.h, memory.k, memory.v
    for half in gl.static_range(2):
        request(memory.q, call.q_tiles, [b, h, place.row_block * Q_BLOCK + half * ROWS, 0], half, 2)
    block = block_at(0, call, place, C.SPARSE)
    for turn in range(place.turns):
        ahead = block_at(turn + 1, call, place, C.SPARSE)
        request(keys, call.k_tiles, [b, h, block * C.KV_BLOCK, 0], turn, C.STAGES)
        request(values, call.v_tiles, [b, h, block * C.KV_BLOCK, 0], turn, C.STAGES)
        block = ahead
    if C.SLOPED:
        at = gl.minimum(place.row_block, call.slope_tiles.shape[2] - 1)  # one for all, or one for each
        request(memory.slopes, call.slope_tiles, [b, h, at, 0, 0], 0, 1)
    if C.SUMMARISED:
        for tile in range(tiles_of_means(call, C)):
            request(keys, call.key_tiles, [b, h, tile * C.KV_BLOCK, 0], place.turns + tile, C.STAGES)
            request(values, call.value_tiles, [b, h, tile * C.KV_BLOCK, 0], place.turns + tile, C.STAGES)


# --- a consumer's steps -----------------------------------------------------------------------------------------------


@gluon.jit
def score(q, keys, C: gl.constexpr):
    """Start the product of queries and keys."""
    nothing = gl.full([ROWS, C.KV_BLOCK], 0.0, gl.float32, scores_layout(C))
    return warpgroup_mma(q, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def limits_of(call, place, C: gl.constexpr):
    """What hides keys from this query block, which has a list that is not empty."""
    left, clear, mask_at = call.n_kv, call.n_kv, call.key_mask
    if C.MASKED:
        clear = gl.load(call.clear + place.b)
        mask_at = call.key_mask + place.b.to(gl.int64) * call.n_kv
    else:
        left -= block_at(place.turns - 1, call, place, C.SPARSE) * C.KV_BLOCK
    return Limits(left, clear, mask_at)


@gluon.jit
def hide_keys(scores, last, start, limits, n_kv, C: gl.constexpr):
    """-inf for keys that the mask hides, or that do not exist; most tiles have none of either."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, scores_layout(C))
    if C.MASKED:
        if start + C.KV_BLOCK > limits.clear:
            keys = start + gl.arange(0, C.KV_BLOCK, layout=FLAT)
            allowed = gl.convert_layout(gl.load(limits.mask_at + keys, mask=keys < n_kv, other=0), COLUMN)
            scores = gl.where((allowed != 0)[None, :], scores, -float("inf"))
    else:
        if last:
            columns = gl.arange(0, C.KV_BLOCK, layout=COLUMN)
            scores = gl.where((columns < limits.left)[None, :], scores, -float("inf"))
    return scores


@gluon.jit
def softmax_step(scores, scale, highest, HOLLOW: gl.constexpr):
    """Weights of one tile against the running maximum -> weights, the new maximum, shrinkage of what the old one gave.

    HOLLOW: a row may have seen no key yet; its maximum is -inf then, and its base 0.
    """
    now = gl.maximum(highest, gl.max(scores, 1) * scale)
    base = now
    if HOLLOW:
        base = gl.where(now == -float("inf"), 0.0, now)
    return gl.exp2(scores * scale - base[:, None]), now, gl.exp2(highest - base)


@gluon.jit
def rescaled(acc, shrink, C: gl.constexpr):
    """The running sum of weighted values against the new maximum."""
    return acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout(C)))[:, None]


@gluon.jit
def rounded(weights, dtype, C: gl.constexpr):
    """Weights as the product with the values takes them."""
    return gl.convert_layout(weights.to(dtype), weights_layout(C))


@gluon.jit
def rows_of(place, LATE: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows of a consumer, [ROWS]."""
    return place.row_block * Q_BLOCK + LATE * ROWS + gl.arange(0, ROWS, layout=LAYOUT)


@gluon.jit
def log2_of_cached(rows, call, place, C: gl.constexpr):
    """Cached LSE of the rows in base 2; +inf, a weight of zero, where it is not finite or there is no row."""
    cached = rows.to(gl.float32)
    if C.MASS:
        cached_at = call.cached + place.head.to(gl.int64) * call.n_q
        cached = gl.load(cached_at + rows, mask=rows < call.n_q, other=float("inf"))
        cached = gl.where(gl.abs(cached) < float("inf"), cached * LOG2E, float("inf"))
    return cached


@gluon.jit
def store_mass(sums, highest, cached, block, call, place, LATE: gl.constexpr, C: gl.constexpr):
    """Mass of a key block in a consumer's rows, by the sums of their weights against the running maximum."""
    half = place.block.to(gl.int64) * 2 + LATE
    mass_at = call.mass + half * call.kv_blocks
    gl.store(mass_at + block, gl.sum(sums * gl.exp2(highest - cached), 0))


# --- a consumer -------------------------------------------------------------------------------------------------------


@gluon.jit
def consume(call, memory, LATE: gl.constexpr, C: gl.constexpr):
    """Half of the query rows; LATE is 1 for the second consumer."""
    place = place_of(call, C)
    q = arrived(memory.q, LATE, ROWS, C.D_PAD, 2)
    acc, highest, total = attend_listed(q, call, place, memory, LATE, C)
    if C.SUMMARISED:
        acc, highest, total, stood = attend_means(q, acc, highest, total, call, place, memory, LATE, C)
        if C.SLOPED:
            acc = first_order(q, acc, stood, call, place, memory, C)
    store_lse(highest, total, call, place, LATE, C)
    if C.COPIED:
        copy_out(acc, total, call, place, memory, LATE, C)
    else:
        store_out(acc, total, call, place, LATE, C)


@gluon.jit
def weigh(scores, turn, block, highest, cached, limits, call, place, LATE: gl.constexpr, C: gl.constexpr):
    """Weights of the keys of a listed block -> these, their sums, the new maximum, shrinkage of the old sums."""
    scores = hide_keys(scores, turn == place.turns - 1, block * C.KV_BLOCK, limits, call.n_kv, C)
    weights, highest, shrink = softmax_step(scores, call.scale, highest, C.MASKED)
    sums = gl.sum(weights, 1)
    if C.MASS:
        store_mass(sums, highest, cached, block, call, place, LATE, C)
    return weights, sums, highest, shrink


@gluon.jit
def attend_listed(q, call, place, memory, LATE: gl.constexpr, C: gl.constexpr):
    """Attention to the listed blocks -> weighted values, not yet divided, maximum and sum of weights."""
    LISTED: gl.constexpr = C.SPARSE and C.MASKED  # without a mask a consumer need not know its block
    ROW: gl.constexpr = gl.SliceLayout(1, scores_layout(C))
    keys, values, turns = memory.k, memory.v, place.turns
    mine, other = memory.hands.index(LATE), memory.hands.index(1 - LATE)
    acc = gl.full([ROWS, C.D_PAD], 0.0, gl.float32, out_layout(C))
    highest = gl.full([ROWS], -float("inf"), gl.float32, ROW)
    total = gl.full([ROWS], 0.0, gl.float32, ROW)
    cached = log2_of_cached(rows_of(place, LATE, ROW), call, place, C)
    if turns > 0:
        limits = limits_of(call, place, C)
        block = block_at(0, call, place, LISTED)
        ahead = block_at(1, call, place, LISTED)
        tile = arrived(keys, 0, C.KV_BLOCK, C.D_PAD, C.STAGES)
        mbarrier.wait(mine, 1 ^ LATE)
        scores = score(q, tile, C)
        mbarrier.arrive(other, count=1)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        leave(keys, 0, C.STAGES)
        weights, total, highest, shrink = weigh(scores, 0, block, highest, cached, limits, call, place, LATE, C)
        low = rounded(weights, q.dtype, C)
        for turn in range(1, turns):
            block = ahead
            ahead = block_at(turn + 1, call, place, LISTED)
            tile = arrived(keys, turn, C.KV_BLOCK, C.D_PAD, C.STAGES)
            mbarrier.wait(mine, (turn & 1) ^ 1 ^ LATE)
            next_scores = score(q, tile, C)
            tile = arrived(values, turn - 1, C.KV_BLOCK, C.D_PAD, C.STAGES)
            weighted = warpgroup_mma(low, tile, acc, is_async=True)
            mbarrier.arrive(other, count=1)
            scores = warpgroup_mma_wait(1, deps=(next_scores,))
            leave(keys, turn, C.STAGES)
            weights, sums, highest, shrink = weigh(scores, turn, block, highest, cached, limits, call, place, LATE, C)
            total = total * shrink + sums
            acc = warpgroup_mma_wait(0, deps=(weighted,))
            leave(values, turn - 1, C.STAGES)
            acc = rescaled(acc, shrink, C)
            low = rounded(weights, q.dtype, C)
        tile = arrived(values, turns - 1, C.KV_BLOCK, C.D_PAD, C.STAGES)
        weighted = warpgroup_mma(low, tile, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(weighted,))
        leave(values, turns - 1, C.STAGES)
    return acc, highest, total


@gluon.jit
def read_means(tile, call, place, C: gl.constexpr):
    """What is known of the blocks of a tile of means -> log of their keys, bytes that have their bits, variance."""
    blocks = tile * C.KV_BLOCK + gl.arange(0, C.KV_BLOCK, layout=FLAT)
    there = blocks < call.kv_blocks
    counts_at = call.log_count + place.b.to(gl.int64) * call.log_b + place.h.to(gl.int64) * call.log_h
    counts = gl.load(counts_at + blocks, mask=there, other=-float("inf"))
    bits_at = call.bits + place.list_at.to(gl.int64) * gl.cdiv(call.kv_blocks, 8)
    bits = gl.load(bits_at + blocks // 8, mask=there, other=0)
    variance = counts
    if C.VARIED:
        variance_at = call.variance + place.head.to(gl.int64) * call.kv_blocks
        variance = gl.load(variance_at + blocks, mask=there, other=0.0)
    return counts, bits, variance


@gluon.jit
def add_counts(scores, counts, bits, variance, squares, C: gl.constexpr):
    """Scores of means in base 2 with what their keys count; -inf for blocks that are listed, or have no key."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, scores_layout(C))
    listed = bits.to(gl.int32) >> (7 - gl.arange(0, C.KV_BLOCK, layout=FLAT) % 8) & 1
    bias = gl.convert_layout(gl.where(listed == 1, -float("inf"), counts * LOG2E), COLUMN)
    scores += bias[None, :]
    if C.VARIED:
        variance = gl.convert_layout(variance, COLUMN)
        scores += gl.minimum(squares[:, None] * variance[None, :], MOST_MASS)
    return scores


@gluon.jit
def half_squares(q, C: gl.constexpr):
    """Half of the square of each query's length in powers of two, [ROWS]."""
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // C.D_PAD, C.D_PAD // 8], [4, 1], [1, 0])
    numbers = q.load(WHOLE).to(gl.float32)
    return gl.convert_layout(gl.sum(numbers * numbers, 1) * (LOG2E / 2), gl.SliceLayout(1, scores_layout(C)))


@gluon.jit
def attend_means(q, acc, highest, total, call, place, memory, LATE: gl.constexpr, C: gl.constexpr):
    """Go on with the means of all blocks that are not listed -> the same, and the part of the sum that is theirs."""
    keys, values = memory.k, memory.v
    mine, other = memory.hands.index(LATE), memory.hands.index(1 - LATE)
    stood = gl.zeros_like(total)
    squares = stood
    if C.VARIED:
        squares = half_squares(q, C)
    for tile in range(tiles_of_means(call, C)):
        now = place.turns + tile
        counts, bits, variance = read_means(tile, call, place, C)  # which takes as long as the product of the keys
        means = arrived(keys, now, C.KV_BLOCK, C.D_PAD, C.STAGES)
        mbarrier.wait(mine, (now & 1) ^ 1 ^ LATE)
        scores = score(q, means, C)
        mbarrier.arrive(other, count=1)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        leave(keys, now, C.STAGES)
        scores = add_counts(scores * call.scale, counts, bits, variance, squares, C)
        weights, highest, shrink = softmax_step(scores, 1.0, highest, True)
        sums = gl.sum(weights, 1)
        total, stood = total * shrink + sums, stood * shrink + sums
        acc = rescaled(acc, shrink, C)
        means = arrived(values, now, C.KV_BLOCK, C.D_PAD, C.STAGES)
        weighted = warpgroup_mma(rounded(weights, q.dtype, C), means, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(weighted,))
        leave(values, now, C.STAGES)
    return acc, highest, total, stood


@gluon.jit
def first_order(q, acc, stood, call, place, memory, C: gl.constexpr):
    """Add the step that the means' values take with the query, shortened by its reach, as often as they count."""
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, out_layout(C))
    slope = arrived(memory.slopes, 0, C.D_PAD, C.D_PAD, 1)
    nothing = gl.full([ROWS, C.D_PAD], 0.0, gl.float32, out_layout(C))
    step = warpgroup_mma(q, slope, nothing, use_acc=False, is_async=True)
    step = warpgroup_mma_wait(0, deps=(step,))
    by = gl.convert_layout(stood, OUT_ROW)
    if C.BOUNDED:
        reach = gl.load(call.reach + place.block)
        longest = gl.sum(step * step, 1) + reach * reach
        by = by * reach * gl.rsqrt(gl.maximum(longest, TINY))
    return acc + step * by[:, None]


# --- results ----------------------------------------------------------------------------------------------------------


@gluon.jit
def divided(acc, total, C: gl.constexpr):
    """The output; 0 for a query without any key."""
    divisor = gl.where(total == 0.0, 1.0, total)
    return acc / gl.convert_layout(divisor, gl.SliceLayout(1, out_layout(C)))[:, None]


@gluon.jit
def store_out(acc, total, call, place, LATE: gl.constexpr, C: gl.constexpr):
    """Write a consumer's rows of the output."""
    OUT: gl.constexpr = out_layout(C)
    rows = rows_of(place, LATE, gl.SliceLayout(1, OUT))
    dims = gl.arange(0, C.D_PAD, layout=gl.SliceLayout(0, OUT))
    inside = (rows < call.n_q)[:, None] & (dims < C.D)[None, :]
    out_at = call.out + place.head.to(gl.int64) * call.n_q * C.D
    out = divided(acc, total, C).to(call.out.dtype.element_ty)
    gl.store(out_at + rows[:, None] * C.D + dims[None, :], out, mask=inside)


@gluon.jit
def copy_out(acc, total, call, place, memory, LATE: gl.constexpr, C: gl.constexpr):
    """The same by the copy engine, from where the queries were."""
    out = divided(acc, total, C).to(call.out.dtype.element_ty)
    memory.q.slots.index(LATE).reshape([ROWS, C.D_PAD]).store(out)
    fence_async_shared()
    first = place.row_block * Q_BLOCK + LATE * ROWS
    store_tile(call.out_tiles, [place.b, place.h, first, 0], memory.q.slots.index(LATE))
    store_wait(0)


@gluon.jit
def store_lse(highest, total, call, place, LATE: gl.constexpr, C: gl.constexpr):
    """Write a consumer's rows of the LSE, -inf for a query without any key."""
    rows = rows_of(place, LATE, gl.SliceLayout(1, scores_layout(C)))
    lse_at = call.lse + place.head.to(gl.int64) * call.n_q
    gl.store(lse_at + rows, (highest + gl.log2(total)) * LN2, mask=rows < call.n_q)


# --- the kernel -------------------------------------------------------------------------------------------------------


SIZES = ("n_q", "n_kv", "heads", "listed", "width", "q_blocks", "kv_blocks", "log_b", "log_h")


@gluon.jit(do_not_specialize=SIZES)  # or a prompt of another length would wait for another kernel
def attend(queries, keys, values, mean_keys, mean_values, slopes, outs,
    out_ptr, lse_ptr, cached_ptr, mass_ptr, idx_ptr, cnt_ptr, order_ptr, bits_ptr,
    log_count_ptr, variance_ptr, reach_ptr, key_mask_ptr, clear_ptr,
    scale, n_q, n_kv, heads, listed, width, q_blocks, kv_blocks, log_b, log_h, C: gl.constexpr,
):  # fmt: skip
    """Attention of 128 query rows of one head to its key blocks, and to the means of all others.

    queries, keys, values: descriptors of [B, H, N, D] with tiles [1, 1, 64 or KV_BLOCK, D_PAD]; mean_keys, mean_values:
    of the means [B, H, nK, D], likewise; slopes: of [B, H, nQ or 1, D, D], one tile a matrix; outs: of the output.
    out_ptr [B, H, N_q, D]; lse_ptr, cached_ptr float32 [B, H, N_q]; mass_ptr float32 [B, H, 2 nQ, nK], of 64 rows each.
    idx_ptr int16 or int32, cnt_ptr, order_ptr int32, bits_ptr uint8: of `BlockLists`. log_count_ptr float32 [B, H, nK]
    with strides log_b and log_h; variance_ptr float32 [B, H, nK], reach_ptr [B, H, nQ]: of `StandIns`. key_mask_ptr,
    clear_ptr: of `mask_pointers`. What the constants leave unread may be None. scale: of the scores, positive, in base
    2. listed: number of lists; where it is less than B * H * nQ, all samples share them. width: of a list. q_blocks,
    kv_blocks: nQ and nK.
    """
    call = Call(
        queries, keys, values, mean_keys, mean_values, slopes, outs,
        out_ptr, lse_ptr, cached_ptr, mass_ptr, idx_ptr, cnt_ptr, order_ptr, bits_ptr,
        log_count_ptr, variance_ptr, reach_ptr, key_mask_ptr, clear_ptr,
        scale, n_q, n_kv, heads, listed, width, q_blocks, kv_blocks, log_b, log_h,
    )  # fmt: skip
    hands = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(hands.index(0), count=1)
    mbarrier.init(hands.index(1), count=1)
    q_ring = make_ring(queries, 2, 1)
    k_ring, v_ring = make_ring(keys, C.STAGES, 2), make_ring(values, C.STAGES, 2)
    slope_ring = q_ring
    if C.SLOPED:
        slope_ring = make_ring(slopes, 1, 2)
    memory = Memory(q_ring, k_ring, v_ring, slope_ring, hands)
    fence_async_shared()
    gl.warp_specialize(
        [(consume, (call, memory, 0, C)), (consume, (call, memory, 1, C)), (produce, (call, memory, C))],
        [4, 4],
        [240, 24],
    )
