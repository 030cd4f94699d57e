"""The Hopper kernel in Gluon, built as FlashAttention-3 is (arXiv 2407.08608): three groups of warps pass tiles on.

The first two each compute 64 of the 128 query rows, the third drives the copy engine. Tiles of keys and of values go
round in two rings of `STAGES` slots, each with a barrier that says "full" (bytes have arrived) and one that says
"empty" (both consumers have left). A consumer starts the scores of the next tile before the product with the values of
this one, so that its softmax runs beside a matrix product (section 3.2, "intra-warpgroup overlap"), and the two
consumers take turns at the tensor cores, so that one's softmax runs beside the other's products (section 3.1,
"ping-pong").

Only the last block of an ascending list can be ragged, so only the last tile is masked. A grid of one program for each
query block, longest list first, does what a persistent kernel would: a program runs for 100 us and more, its set-up
for 2.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,operator"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN2 = gl.constexpr(0.6931471805599453)
# Renamed in Triton 3.9.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def request_tile(tiles, b, h, start, turn, ring, full, empty, STAGES: gl.constexpr):
    """Start the copy of the tile of keys or values at `start`, once both consumers have left its slot."""
    slot = turn % STAGES
    mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), tiles.block_type.nbytes)
    copy_tile(tiles, [b, h, start, 0], full.index(slot), ring.index(slot))


@gluon.jit
def await_tile(full, turn, STAGES: gl.constexpr):
    """Wait until the tile of this turn has arrived."""
    mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)


@gluon.jit
def matrix(ring, turn, STAGES: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """The slot of this turn as [ROWS, D]."""
    return ring.index(turn % STAGES).reshape([ROWS, D])


@gluon.jit
def block_at(idx_at, turn, SPARSE: gl.constexpr):
    """The key block of a turn."""
    block = turn
    if SPARSE:
        block = gl.load(idx_at + turn).to(gl.int32)
    return block


@gluon.jit
def produce(keys, values, k_ring, v_ring, k_full, k_empty, v_full, v_empty, idx_at, turns, b, h,
    KV_BLOCK: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr,
):  # fmt: skip
    """Request the tiles of all turns, in order; the block of the next turn is read while this one's slots fill."""
    block = block_at(idx_at, 0, SPARSE)
    for turn in range(turns):
        ahead = block_at(idx_at, gl.minimum(turn + 1, turns - 1), SPARSE)
        request_tile(keys, b, h, block * KV_BLOCK, turn, k_ring, k_full, k_empty, STAGES)
        request_tile(values, b, h, block * KV_BLOCK, turn, v_ring, v_full, v_empty, STAGES)
        block = ahead


@gluon.jit
def score(q, keys, SCORES: gl.constexpr, ROWS: gl.constexpr, KV_BLOCK: gl.constexpr):
    """Start the product of queries and keys."""
    nothing = gl.zeros([ROWS, KV_BLOCK], gl.float32, SCORES)
    return warpgroup_mma(q, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def hide_tail(scores, left, SCORES: gl.constexpr, KV_BLOCK: gl.constexpr):
    """-inf for all but the first `left` keys."""
    columns = gl.arange(0, KV_BLOCK, layout=gl.SliceLayout(0, SCORES))
    return gl.where((columns < left)[None, :], scores, -float("inf"))


@gluon.jit
def hide_masked(scores, start, mask_at, n_kv, SCORES: gl.constexpr, KV_BLOCK: gl.constexpr):
    """-inf for the keys of the tile at `start` that the mask hides, and for those beyond the last."""
    keys = start + gl.arange(0, KV_BLOCK, layout=gl.SliceLayout(0, SCORES))
    allowed = gl.load(mask_at + keys, mask=keys < n_kv, other=0)
    return gl.where((allowed != 0)[None, :], scores, -float("inf"))


@gluon.jit
def hide_keys(scores, last, left, start, mask_at, clear, n_kv,
    SCORES: gl.constexpr, KV_BLOCK: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """-inf for keys that the mask hides, or that do not exist; most tiles have none of either."""
    if MASKED:
        if start + KV_BLOCK > clear:
            scores = hide_masked(scores, start, mask_at, n_kv, SCORES, KV_BLOCK)
    else:
        if last:
            scores = hide_tail(scores, left, SCORES, KV_BLOCK)
    return scores


@gluon.jit
def softmax_step(scores, scale, highest, total, MASKED: gl.constexpr):
    """Weights of one tile against the running maximum -> weights, the new maximum and total, shrinkage of the old."""
    now = gl.maximum(highest, gl.max(scores, 1) * scale)
    base = now
    if MASKED:  # a row may have seen no key yet
        base = gl.where(now == -float("inf"), 0.0, now)
    weights = gl.exp2(scores * scale - base[:, None])
    shrink = gl.exp2(highest - base)
    return weights, now, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def consume(q, late, first_row, k_ring, v_ring, k_full, k_empty, v_full, v_empty, mine, other,
    out_ptr, lse_ptr, scale, idx_at, turns, left, mask_at, clear, n_kv, n_q, row_at,
    D: gl.constexpr, D_PAD: gl.constexpr, KV_BLOCK: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    SPARSE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Attention of half of the query rows; `left` keys of the last tile exist; `late` is 1 for the second consumer."""
    LISTED: gl.constexpr = SPARSE and MASKED  # without a mask a consumer need not know its block
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KV_BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_PAD, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    acc = gl.zeros([ROWS, D_PAD], gl.float32, OUT)
    highest = gl.full([ROWS], -float("inf"), gl.float32, ROW)
    total = gl.zeros([ROWS], gl.float32, ROW)
    block = block_at(idx_at, 0, LISTED)
    ahead = block_at(idx_at, gl.minimum(1, turns - 1), LISTED)

    await_tile(k_full, 0, STAGES)
    scores = score(q, matrix(k_ring, 0, STAGES, KV_BLOCK, D_PAD), SCORES, ROWS, KV_BLOCK)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0), count=1)
    scores = hide_keys(scores, turns == 1, left, block * KV_BLOCK, mask_at, clear, n_kv, SCORES, KV_BLOCK, MASKED)
    weights, highest, total, shrink = softmax_step(scores, scale, highest, total, MASKED)
    rounded = gl.convert_layout(weights.to(q.dtype), WEIGHTS)
    for turn in range(1, turns):
        before = turn - 1
        start = ahead * KV_BLOCK
        ahead = block_at(idx_at, gl.minimum(turn + 1, turns - 1), LISTED)
        await_tile(k_full, turn, STAGES)
        mbarrier.wait(mine, (before & 1) ^ 1 ^ late)
        next_scores = score(q, matrix(k_ring, turn, STAGES, KV_BLOCK, D_PAD), SCORES, ROWS, KV_BLOCK)
        await_tile(v_full, before, STAGES)
        weighted = warpgroup_mma(rounded, matrix(v_ring, before, STAGES, KV_BLOCK, D_PAD), acc, is_async=True)
        mbarrier.arrive(other, count=1)
        scores = warpgroup_mma_wait(1, deps=(next_scores,))
        mbarrier.arrive(k_empty.index(turn % STAGES), count=1)
        scores = hide_keys(scores, turn == turns - 1, left, start, mask_at, clear, n_kv, SCORES, KV_BLOCK, MASKED)
        weights, highest, total, shrink = softmax_step(scores, scale, highest, total, MASKED)
        acc = warpgroup_mma_wait(0, deps=(weighted,))
        mbarrier.arrive(v_empty.index(before % STAGES), count=1)
        acc = acc * gl.convert_layout(shrink, OUT_ROW)[:, None]
        rounded = gl.convert_layout(weights.to(q.dtype), WEIGHTS)
    await_tile(v_full, turns - 1, STAGES)
    weighted = warpgroup_mma(rounded, matrix(v_ring, turns - 1, STAGES, KV_BLOCK, D_PAD), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(weighted,))

    divisor = total
    if MASKED:  # a row may have seen no key at all
        divisor = gl.where(total == 0.0, 1.0, total)
    acc = acc / gl.convert_layout(divisor, OUT_ROW)[:, None]
    rows = first_row + gl.arange(0, ROWS, layout=OUT_ROW)
    dims = gl.arange(0, D_PAD, layout=gl.SliceLayout(0, OUT))
    inside = (rows < n_q)[:, None] & (dims < D)[None, :]
    gl.store(out_ptr + row_at * D + rows[:, None] * D + dims[None, :], acc.to(q.dtype), mask=inside)
    rows = first_row + gl.arange(0, ROWS, layout=ROW)
    gl.store(lse_ptr + row_at + rows, (highest + gl.log2(total)) * LN2, mask=rows < n_q)


@gluon.jit
def leave_empty(out_ptr, lse_ptr, first_row, n_q, row_at, D: gl.constexpr, D_PAD: gl.constexpr, Q_BLOCK: gl.constexpr):
    """Queries without any key get 0, and -inf as their LSE."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D_PAD, D_PAD // 8], [4, 1], [1, 0])
    rows = first_row + gl.arange(0, Q_BLOCK, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, D_PAD, layout=gl.SliceLayout(0, LAYOUT))
    inside = (rows < n_q)[:, None] & (dims < D)[None, :]
    zeros = gl.zeros([Q_BLOCK, D_PAD], out_ptr.dtype.element_ty, LAYOUT)
    gl.store(out_ptr + row_at * D + rows[:, None] * D + dims[None, :], zeros, mask=inside)
    nothing = gl.full([Q_BLOCK], -float("inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    gl.store(lse_ptr + row_at + rows, nothing, mask=rows < n_q)


@gluon.jit
def attend(queries, keys, values, out_ptr, lse_ptr, idx_ptr, cnt_ptr, order_ptr, key_mask_ptr, clear_ptr,
    scale, n_q, n_kv, heads, listed, width,
    D: gl.constexpr, D_PAD: gl.constexpr, KV_BLOCK: gl.constexpr, STAGES: gl.constexpr,
    SPARSE: gl.constexpr, ORDERED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Attention of 128 query rows of one head to its key blocks.

    queries, keys, values: descriptors of [B, H, N, D] with tiles [1, 1, 128 or KV_BLOCK, D_PAD].
    out_ptr [B, H, N_q, D], lse_ptr float32 [B, H, N_q]; idx_ptr int16 or int32, cnt_ptr and order_ptr int32: of
    `BlockLists`; key_mask_ptr, clear_ptr: of `mask_pointers`, read if MASKED. scale: of the scores, positive, in base
    2. listed: number of lists; where it is less than B * H * nQ, all samples share them. width: of a list.
    """
    Q_BLOCK: gl.constexpr = 128
    ROWS: gl.constexpr = 64
    turn = gl.program_id(0)
    list_at = turn % listed
    if ORDERED:
        list_at = gl.load(order_ptr + list_at)
    block = turn // listed * listed + list_at
    q_blocks = gl.cdiv(n_q, Q_BLOCK)
    first_row = block % q_blocks * Q_BLOCK
    b = block // q_blocks // heads
    h = block // q_blocks % heads
    row_at = (block // q_blocks).to(gl.int64) * n_q
    turns = gl.cdiv(n_kv, KV_BLOCK)
    idx_at = idx_ptr + list_at.to(gl.int64) * width
    if SPARSE:
        turns = gl.load(cnt_ptr + list_at)

    q = gl.allocate_shared_memory(queries.dtype, queries.block_type.shape, queries.layout)
    k_ring = gl.allocate_shared_memory(keys.dtype, [STAGES] + keys.block_type.shape, keys.layout)  # noqa: RUF005
    v_ring = gl.allocate_shared_memory(values.dtype, [STAGES] + values.block_type.shape, values.layout)  # noqa: RUF005
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    turn_0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    turn_1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(turn_0, count=1)
    mbarrier.init(turn_1, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    fence_async_shared()
    if turns > 0:
        mbarrier.expect(q_full, queries.block_type.nbytes)
        copy_tile(queries, [b, h, first_row, 0], q_full, q)
        mbarrier.wait(q_full, 0)
        left = n_kv
        clear = n_kv
        mask_at = key_mask_ptr
        if MASKED:
            clear = gl.load(clear_ptr + b)
            mask_at = key_mask_ptr + b.to(gl.int64) * n_kv
        else:
            left -= block_at(idx_at, turns - 1, SPARSE) * KV_BLOCK
        rows = q.reshape([Q_BLOCK, D_PAD])
        gl.warp_specialize(
            [  # spelled out: a sum of tuples loses which of its parts are constants
                (
                    consume,
                    (
                        rows.slice(0, ROWS),
                        0,
                        first_row,
                        k_ring,
                        v_ring,
                        k_full,
                        k_empty,
                        v_full,
                        v_empty,
                        turn_0,
                        turn_1,
                        out_ptr,
                        lse_ptr,
                        scale,
                        idx_at,
                        turns,
                        left,
                        mask_at,
                        clear,
                        n_kv,
                        n_q,
                        row_at,
                        D,
                        D_PAD,
                        KV_BLOCK,
                        STAGES,
                        ROWS,
                        SPARSE,
                        MASKED,
                    ),
                ),
                (
                    consume,
                    (
                        rows.slice(ROWS, ROWS),
                        1,
                        first_row + ROWS,
                        k_ring,
                        v_ring,
                        k_full,
                        k_empty,
                        v_full,
                        v_empty,
                        turn_1,
                        turn_0,
                        out_ptr,
                        lse_ptr,
                        scale,
                        idx_at,
                        turns,
                        left,
                        mask_at,
                        clear,
                        n_kv,
                        n_q,
                        row_at,
                        D,
                        D_PAD,
                        KV_BLOCK,
                        STAGES,
                        ROWS,
                        SPARSE,
                        MASKED,
                    ),
                ),
                (
                    produce,
                    (
                        keys,
                        values,
                        k_ring,
                        v_ring,
                        k_full,
                        k_empty,
                        v_full,
                        v_empty,
                        idx_at,
                        turns,
                        b,
                        h,
                        KV_BLOCK,
                        STAGES,
                        SPARSE,
                    ),
                ),
            ],
            [4, 4],
            [240, 24],
        )
    else:
        leave_empty(out_ptr, lse_ptr, first_row, n_q, row_at, D, D_PAD, Q_BLOCK)
