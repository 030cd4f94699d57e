"""The kernels of the Triton backend: attention over key blocks, the mass of blocks, rounding to eight bits.

A program of `attend` computes one query block of one head. It walks over its key blocks (all of them, or those of a
list) in tiles of `BLOCK_N` keys with the online softmax of FlashAttention-2 (arXiv 2307.08691, Algorithm 1), in base
2. The mass of a tile against a cached LSE needs no second exponential of the scores: the row sums of the tile are
there already, and only have to be scaled from the running maximum to the cached LSE.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from diffsparse_kernels.summaries import MOST_BIAS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Sizes that change with a prompt: a kernel that is right for one is right for all, and is compiled once.
SIZES = ("n_q", "n_kv", "length", "tokens", "n", "kv_blocks", "heads", "listed", "width", "slope_n")
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
MOST_MASS = tl.constexpr(MOST_BIAS * 1.4426950408889634)  # of varied scores, as a power of two


@triton.jit
def program_place(order_ptr, listed, n_q, heads, Q_BLOCK: tl.constexpr, ORDERED: tl.constexpr):
    """The query block of this program -> number of its list, block row, sample, head.

    Programs start in the order of their numbers, so the longest lists come first where an order says so. Where there
    are fewer lists than query blocks, all samples share them.
    """
    turn = tl.program_id(0)
    lists_at = turn % listed
    if ORDERED:
        lists_at = tl.load(order_ptr + lists_at)
    block = turn // listed * listed + lists_at
    q_blocks = tl.cdiv(n_q, Q_BLOCK)
    bh = block // q_blocks
    return lists_at, block % q_blocks, (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)


@triton.jit
def matrix(ptr, length, row_stride, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TMA: tl.constexpr):
    """One head's [length, D] as `load_rows` takes it: a descriptor for the copy engine, or its address."""
    if TMA:
        return tl.make_tensor_descriptor(ptr, [length, D], [row_stride, 1], [ROWS, D_PAD])
    else:
        return ptr


@triton.jit
def load_rows(
    matrix, start, length, row_stride, column_stride,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    RAGGED: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of one head, [ROWS, D_PAD]; zeros beyond D and, if RAGGED, beyond the length."""
    if TMA:
        tile = matrix.load([start, 0])
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, D_PAD)
        first = matrix + tl.cast(start, tl.int64) * row_stride
        at = first + rows[:, None] * row_stride + columns[None, :] * column_stride
        if RAGGED and D != D_PAD:
            tile = tl.load(at, mask=(start + rows < length)[:, None] & (columns < D)[None, :], other=0.0)
        elif RAGGED:
            tile = tl.load(at, mask=(start + rows < length)[:, None], other=0.0)
        elif D != D_PAD:
            tile = tl.load(at, mask=(columns < D)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    if UPCAST and not tile.dtype.is_int():
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_columns(
    matrix, start, length, row_stride,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Columns start .. start + ROWS of a [D, length], as [ROWS, D_PAD]; zeros beyond D and beyond the length."""
    if TMA:
        tile = matrix.load([0, start])
    else:
        columns = start + tl.arange(0, ROWS)
        dims = tl.arange(0, D_PAD)
        at = matrix + dims[:, None].to(tl.int64) * row_stride + columns[None, :]
        tile = tl.load(at, mask=(dims < D)[:, None] & (columns < length)[None, :], other=0.0)
    if UPCAST and not tile.dtype.is_int():
        tile = tile.to(tl.float32)
    return tile.T


@triton.jit
def eight_bits(x, TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """To the nearest of "int8" or "fp8"."""
    if TYPE == "int8":
        return tl.floor(x + 0.5).to(tl.int8)
    else:
        if UPCAST:  # the interpreter loses the carry when it rounds, so there nothing is left to round
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        return x.to(tl.float8e4nv)


@triton.jit
def add_weighted(weights, v, acc, shrink, VALUES: tl.constexpr, UPCAST: tl.constexpr):
    """The running sum of weighted values, the weights rounded to what the values are."""
    if VALUES == "int8":
        rounded = eight_bits(weights * 127.0, VALUES, UPCAST)
        return acc * shrink[:, None] + tl.dot(rounded, v).to(tl.float32)
    elif VALUES == "fp8":
        rounded = eight_bits(weights * 256.0, VALUES, UPCAST)
        return tl.dot(rounded.to(v.dtype), v, acc * shrink[:, None])
    else:
        return tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")


@triton.jit
def hide_keys(
    scores, columns, start, key_mask_ptr, clear, place_ptr, low_ptr, high_ptr, rows, n_q, n_kv,
    BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, AXES: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """-inf for keys beyond the last, for padded keys, and for those outside the query's box.

    BIASED: key_mask_ptr is what to add to the scores, which are in base 2 then.

    BRANCH: tiles before `clear` are let through. Where a second product by `mma.sync` follows, a branch on the scores
    would hide it from the compiler, which then sends the weights through shared memory: there only the mask's bytes,
    not the scores, depend on a branch.
    """
    there = columns < n_kv  # [BLOCK_N]
    if MASKED:
        if BRANCH:
            if start + BLOCK_N > clear:
                allowed = tl.load(key_mask_ptr + columns, mask=there, other=0) != 0
                scores = tl.where(allowed[None, :], scores, -float("inf"))
        else:
            allowed = columns < clear
            if start + BLOCK_N > clear:
                allowed = tl.load(key_mask_ptr + columns, mask=there, other=0) != 0
            scores = tl.where(allowed[None, :], scores, -float("inf"))
    elif BIASED:
        scores += tl.load(key_mask_ptr + columns, mask=there, other=-float("inf"))[None, :]
    elif RAGGED:
        scores = tl.where(there[None, :], scores, -float("inf"))
    if AXES > 0:
        first = tl.load(place_ptr + columns, mask=there, other=0)  # a negative first place is inside all boxes
        for axis in tl.static_range(AXES):
            place = tl.load(place_ptr + axis * n_kv + columns, mask=there, other=0)[None, :]  # [1, BLOCK_N]
            low = tl.load(low_ptr + axis * n_q + rows, mask=rows < n_q, other=0)[:, None]  # [M, 1]
            high = tl.load(high_ptr + axis * n_q + rows, mask=rows < n_q, other=0)[:, None]
            inside = (low <= place) & (place <= high) | (first < 0)[None, :]
            scores = tl.where(inside, scores, -float("inf"))
    return scores


@triton.jit
def softmax_step(scores, scale, highest):
    """Weights of one tile against the running maximum -> weights, their base, the new maximum, shrinkage of the old.

    A row that has seen no key yet has -inf as its maximum, and 0 as its base.
    """
    now = tl.maximum(highest, tl.max(scores, 1) * scale)
    base = tl.where(now == -float("inf"), 0.0, now)
    return tl.math.exp2(scores * scale - base[:, None]), base, now, tl.math.exp2(highest - base)


@triton.jit
def log2_of_cached(cached_ptr, rows, n_q):
    """Cached LSE of the rows in base 2, [M]; +inf, a weight of zero, where it is not finite or there is no row."""
    cached = tl.load(cached_ptr + rows, mask=rows < n_q, other=float("inf"))
    return tl.where(tl.abs(cached) < float("inf"), cached * LOG2E, float("inf"))


@triton.jit
def next_block(idx_ptr, turn, turns, PARTS: tl.constexpr, SPARSE: tl.constexpr):
    """The key block of a turn, from the list or counted; asked for one turn ahead, so that copies need not wait."""
    if SPARSE:
        return tl.load(idx_ptr + turn // PARTS, mask=turn < turns, other=0).to(tl.int32)
    else:
        return turn // PARTS


@triton.jit
def mean_scores(
    q, squares, keys, log_counts, variances, start, kv_blocks, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, VARIED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of the mean keys of blocks start .. start + BLOCK_N, in base 2, [M, N]; -inf beyond and without keys."""
    columns = start + tl.arange(0, BLOCK_N)
    there = columns < kv_blocks
    k = load_rows(keys, start, kv_blocks, D, 1, BLOCK_N, D, D_PAD, True, False, UPCAST)  # [N, D]
    log_count = tl.load(log_counts + columns, mask=there, other=-float("inf"))
    scores = tl.dot(q, k.T, input_precision="ieee") * scale_log2 + (log_count * LOG2E)[None, :]
    if VARIED:
        variance = tl.load(variances + columns, mask=there, other=0.0)
        scores += tl.minimum(squares[:, None] * variance[None, :], MOST_MASS)
    return scores


@triton.jit
def add_stand_ins(
    q, acc, total, highest, bits_at, keys, values, log_counts, variances, scale_log2, kv_blocks,
    D: tl.constexpr, D_V: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    VARIED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The online softmax goes on over blocks that are not listed -> acc, total, highest, and their part of total."""
    ours = tl.zeros_like(total)
    squares = total
    if VARIED:
        squares = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) * (LOG2E / 2)  # [M]
    for start in tl.range(0, kv_blocks, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scores = mean_scores(
            q, squares, keys, log_counts, variances, start, kv_blocks, scale_log2, D, D_PAD, BLOCK_N, VARIED, UPCAST
        )  # fmt: skip
        bits = tl.load(bits_at + columns // 8, mask=columns < kv_blocks, other=255)
        listed = (bits >> (7 - columns % 8).to(tl.uint8)) & 1  # [N]
        scores = tl.where((listed != 0)[None, :], -float("inf"), scores)
        v = load_rows(values, start, kv_blocks, D_V, 1, BLOCK_N, D_V, DV_PAD, True, False, UPCAST)  # [N, D_V]
        weights, _, highest, shrink = softmax_step(scores, 1.0, highest)
        part = tl.sum(weights, 1)
        total = total * shrink + part
        ours = ours * shrink + part
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, highest, ours


@triton.jit
def step_part(
    out, share, queries, first_row, n_q, q_n, q_d, slope_at,
    Q_BLOCK: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    LEFT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [M, WIDTH] and the queries times share [M] times slope [D, WIDTH], of which LEFT columns are there.

    A few channels at a time, read once more: there is no room for whole rows beside the output.
    """
    PART: tl.constexpr = 32 if D_PAD > 32 else D_PAD
    for part in tl.static_range(D_PAD // PART):
        q = load_rows(
            queries + part * PART * q_d, first_row, n_q, q_n, q_d, Q_BLOCK, D - part * PART, PART, True, False, UPCAST
        )  # fmt: skip
        slope = load_rows(
            slope_at + part * PART * D_V, 0, D - part * PART, D_V, 1, PART, LEFT, WIDTH, True, False, UPCAST
        )  # fmt: skip
        q = (q.to(tl.float32) * share[:, None]).to(slope.dtype)
        out = tl.dot(q, slope, out, input_precision="ieee")
    return out


@triton.jit
def shortening(
    queries, first_row, n_q, q_n, q_d, slope_at, reach_at,
    Q_BLOCK: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """What to multiply the steps of the rows with, so that none gets longer than the reach, [M]."""
    PART: tl.constexpr = 32 if DV_PAD > 32 else DV_PAD
    reach = tl.load(reach_at)
    ones = tl.full([Q_BLOCK], 1.0, tl.float32)
    squares = tl.zeros([Q_BLOCK], tl.float32) + reach * reach
    for part in tl.static_range(DV_PAD // PART):
        step = step_part(
            tl.zeros([Q_BLOCK, PART], tl.float32), ones, queries, first_row, n_q, q_n, q_d, slope_at + part * PART,
            Q_BLOCK, D, D_V, D_PAD, PART, D_V - part * PART, UPCAST,
        )  # fmt: skip
        squares += tl.sum(step * step, 1)
    return reach * tl.rsqrt(tl.maximum(squares, TINY))


@triton.jit(do_not_specialize=SIZES)
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mass_ptr, cached_ptr, idx_ptr, cnt_ptr, order_ptr,
    key_mask_ptr, clear_ptr, place_ptr, low_ptr, high_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
    bits_ptr, key_ptr, value_ptr, log_count_ptr, variance_ptr, slope_ptr, reach_ptr,
    scale_log2, n_q, n_kv, heads, listed, width, slope_n,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D: tl.constexpr, D_V: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    SPARSE: tl.constexpr, ORDERED: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, AXES: tl.constexpr,
    MASS: tl.constexpr, SCALED: tl.constexpr, VALUES: tl.constexpr,
    SUMMARISED: tl.constexpr, VARIED: tl.constexpr, SLOPED: tl.constexpr, BOUNDED: tl.constexpr,
    RAGGED: tl.constexpr, TMA: tl.constexpr, SPECIALISED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention of one query block.

    q_ptr [B, H, N_q, D], k_ptr [B, H, N_kv, D], v_ptr [B, H, N_kv, D_V] with the strides `q_b` to `v_d`; out_ptr
    [B, H, N_q, D_V], lse_ptr, cached_ptr float32 [B, H, N_q], mass_ptr float32 [B, H, nQ, nK], all contiguous.
    idx_ptr int16 or int32 [B|1, H, nQ, width], cnt_ptr [B|1, H, nQ], order_ptr [listed]: of `BlockLists`. key_mask_ptr
    [B, N_kv], uint8 if MASKED, float32 if BIASED, clear_ptr int32 [B]: of `mask_pointers`; place_ptr int32
    [AXES, N_kv], low_ptr, high_ptr [AXES, N_q]: of `Boxes`. A pointer that its flag leaves unread may be any. SCALED: q
    and k are eight bits, to be multiplied by q_scale_ptr float32 [B, H, nQ] and k_scale_ptr [B, H, nK]. VALUES:
    "plain", or "int8" or "fp8": v_ptr is then [B, H, D_V, N_kv], rows `v_n` apart, to be multiplied by v_scale_ptr
    float32 [B, H, D_V].

    SUMMARISED: what stands for the blocks outside the lists takes part, `StandIns` in contiguous tensors: bits_ptr
    uint8 [B|1, H, nQ, nK / 8], key_ptr [B, H, nK, D] and value_ptr [B, H, nK, D_V] of q's dtype, log_count_ptr float32
    [B, H, nK]; VARIED: variance_ptr float32 [B, H, nK]; SLOPED: slope_ptr of q's dtype, a [D, D_V] every `slope_n`
    numbers for each query block; BOUNDED: reach_ptr float32 [B, H, nQ]. Ours.
    """
    lists_at, row_block, b, h = program_place(order_ptr, listed, n_q, heads, Q_BLOCK, ORDERED)
    first_row = row_block * Q_BLOCK
    rows = first_row + tl.arange(0, Q_BLOCK)  # [M]
    row_at = (b * heads + h) * n_q
    queries = matrix(q_ptr + b * q_b + h * q_h, n_q, q_n, Q_BLOCK, D, D_PAD, TMA)
    keys = matrix(k_ptr + b * k_b + h * k_h, n_kv, k_n, BLOCK_N, D, D_PAD, TMA)
    if VALUES == "plain":
        values = matrix(v_ptr + b * v_b + h * v_h, n_kv, v_n, BLOCK_N, D_V, DV_PAD, TMA)
    else:
        values = matrix(v_ptr + b * v_b + h * v_h, D_V, v_n, DV_PAD, n_kv, BLOCK_N, TMA)
    if SLOPED:
        row_blocks_at = (b * heads + h) * tl.cdiv(n_q, Q_BLOCK) + row_block
        slope_at = slope_ptr + row_blocks_at * slope_n
        short = tl.full([Q_BLOCK], 1.0, tl.float32)
        if BOUNDED:  # before the output takes up the registers
            short = shortening(
                q_ptr + b * q_b + h * q_h, first_row, n_q, q_n, q_d, slope_at, reach_ptr + row_blocks_at,
                Q_BLOCK, D, D_V, D_PAD, DV_PAD, UPCAST,
            )  # fmt: skip
    q = load_rows(queries, first_row, n_q, q_n, q_d, Q_BLOCK, D, D_PAD, True, TMA, UPCAST)  # [M, D]
    highest = tl.full([Q_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([Q_BLOCK], tl.float32)
    acc = tl.zeros([Q_BLOCK, DV_PAD], tl.float32)
    PARTS: tl.constexpr = KV_BLOCK // BLOCK_N
    kv_blocks = tl.cdiv(n_kv, KV_BLOCK)
    if MASS:
        cached = log2_of_cached(cached_ptr + row_at, rows, n_q)
        held = tl.zeros([Q_BLOCK], tl.float32)
        mass_at = mass_ptr + ((b * heads + h) * tl.cdiv(n_q, Q_BLOCK) + row_block) * kv_blocks
    turns = kv_blocks * PARTS
    idx_at = idx_ptr
    if SPARSE:
        turns = tl.load(cnt_ptr + lists_at) * PARTS
        idx_at = idx_ptr + lists_at.to(tl.int64) * width
    scale = scale_log2
    if SCALED:
        scale_of_q = scale_log2 * tl.load(q_scale_ptr + (b * heads + h) * tl.cdiv(n_q, Q_BLOCK) + row_block)
    clear = n_kv
    if MASKED:
        clear = tl.load(clear_ptr + b)
    block = next_block(idx_at, 0, turns, PARTS, SPARSE)
    for turn in tl.range(turns, warp_specialize=SPECIALISED):
        part = turn % PARTS
        start = block * KV_BLOCK + part * BLOCK_N
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(keys, start, n_kv, k_n, k_d, BLOCK_N, D, D_PAD, RAGGED, TMA, UPCAST)  # [N, D]
        if VALUES == "plain":
            v = load_rows(values, start, n_kv, v_n, v_d, BLOCK_N, D_V, DV_PAD, RAGGED, TMA, UPCAST)
        else:
            v = load_columns(values, start, n_kv, v_n, BLOCK_N, D_V, DV_PAD, TMA, UPCAST)
        scores = tl.dot(q, k.T, input_precision="ieee").to(tl.float32)  # [M, N]
        if SCALED:
            scale = scale_of_q * tl.load(k_scale_ptr + (b * heads + h) * kv_blocks + block)
        if BIASED:
            scores *= scale
        scores = hide_keys(
            scores,
            columns,
            start,
            key_mask_ptr + b * n_kv,
            clear,
            place_ptr,
            low_ptr,
            high_ptr,
            rows,
            n_q,
            n_kv,
            BLOCK_N,
            RAGGED,
            MASKED,
            BIASED,
            AXES,
            TMA and not SCALED,  # sm_100 has no other instruction for int8, either
        )
        weights, base, highest, shrink = softmax_step(scores, 1.0 if BIASED else scale, highest)
        part_sum = tl.sum(weights, 1)
        total = total * shrink + part_sum
        acc = add_weighted(weights, v, acc, shrink, VALUES, UPCAST)
        if MASS:
            held = tl.where(part == 0, 0.0, held) + part_sum * tl.math.exp2(base - cached)
            tl.store(mass_at + block, tl.sum(held, 0))  # the last part of a block has it all
        block = next_block(idx_at, turn + 1, turns, PARTS, SPARSE)
    if SUMMARISED:
        at = (b * heads + h) * kv_blocks
        acc, total, highest, ours = add_stand_ins(
            q, acc, total, highest, bits_ptr + lists_at.to(tl.int64) * tl.cdiv(kv_blocks, 8),
            key_ptr + at * D, value_ptr + at * D_V, log_count_ptr + at, variance_ptr + at, scale_log2, kv_blocks,
            D, D_V, D_PAD, DV_PAD, BLOCK_S, VARIED, UPCAST,
        )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, -float("inf"), (highest + tl.math.log2(total)) * LN2)
    dims = tl.arange(0, DV_PAD)
    out_at = out_ptr + (row_at + first_row) * D_V + tl.arange(0, Q_BLOCK)[:, None] * D_V + dims[None, :]
    out = acc / total[:, None]
    if SLOPED:
        out = step_part(
            out, short * ours / total, q_ptr + b * q_b + h * q_h, first_row, n_q, q_n, q_d, slope_at,
            Q_BLOCK, D, D_V, D_PAD, DV_PAD, D_V, UPCAST,
        )  # fmt: skip
    if VALUES != "plain":
        out *= tl.load(v_scale_ptr + (b * heads + h) * D_V + dims, mask=dims < D_V, other=0.0)[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=(rows < n_q)[:, None] & (dims < D_V)[None, :])
    tl.store(lse_ptr + row_at + rows, lse, mask=rows < n_q)


@triton.jit
def centred_rows(x, there, roots, count, BIASED: tl.constexpr):
    """Mean of the rows that are there, [D], and each one's distance to it, float32 [N, D], 0 for all others.

    BIASED: rows count as often as the squares of roots [N] say, and distances are multiplied by these.
    """
    x = tl.where(there[:, None], x.to(tl.float32), 0.0)
    if BIASED:
        mean = tl.sum(x * (roots * roots)[:, None], 0) / count
        distances = tl.where(there[:, None], (x - mean[None, :]) * roots[:, None], 0.0)
    else:
        mean = tl.sum(x, 0) / count
        distances = tl.where(there[:, None], x - mean[None, :], 0.0)
    return mean, distances


@triton.jit(do_not_specialize=SIZES)
def first_order(
    k_ptr, v_ptr, key_mask_ptr, key_ptr, value_ptr, log_count_ptr, variance_ptr, spread_ptr, steepness_ptr, slope_ptr,
    scale, n_kv, heads, mask_b, mask_h,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D: tl.constexpr, D_V: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    KV_BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, SLOPED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """What `Summaries` hold of one key block, BLOCK_V channels of the values at a time.

    k [B, H, N_kv, D], v [B, H, N_kv, D_V] by their strides; key_mask_ptr [B|1, H|1, N_kv] by its own, uint8 if MASKED,
    if BIASED float32 in base 2. key
    [B, H, nK, D], value [B, H, nK, D_V] and, if SLOPED, slope [B, H, nK, D, D_V] have the dtype that was allocated,
    the others float32 [B, H, nK], all contiguous. Keys and values are centred in float32, and rounded to the
    inputs' dtype for their product, which is float32. Ours.
    """
    kv_blocks = tl.cdiv(n_kv, KV_BLOCK)
    block = tl.program_id(0) % kv_blocks
    bh = (tl.program_id(0) // kv_blocks).to(tl.int64)
    b, h, at = bh // heads, bh % heads, bh * kv_blocks + block
    start = block * KV_BLOCK
    columns = start + tl.arange(0, KV_BLOCK)  # [N]
    there = columns < n_kv
    if MASKED:
        there = tl.load(key_mask_ptr + b * mask_b + h * mask_h + columns, mask=there, other=0) != 0
    if BIASED:
        bias = tl.load(key_mask_ptr + b * mask_b + h * mask_h + columns, mask=there, other=-float("inf"))
        there = bias > -float("inf")
        most = tl.max(bias, 0)  # which weights are taken against, so that none overflows
        most = tl.where(most > -float("inf"), most, 0.0)
        roots = tl.math.exp2((bias - most) / 2)  # of the weights
        found = tl.sum(roots * roots, 0)
    else:
        roots = there  # unread
        found = tl.sum(there.to(tl.float32), 0)
    count = tl.maximum(found, 1.0)
    if BIASED:
        tl.store(log_count_ptr + at, tl.where(found > 0, (tl.math.log2(count) + most) * LN2, -float("inf")))
    else:
        tl.store(log_count_ptr + at, tl.where(found > 0, tl.math.log2(count) * LN2, -float("inf")))
    k = load_rows(k_ptr + b * k_b + h * k_h, start, n_kv, k_n, k_d, KV_BLOCK, D, D_PAD, True, False, UPCAST)
    key, keys = centred_rows(k, there, roots, count, BIASED)
    dims = tl.arange(0, D_PAD)
    tl.store(key_ptr + at * D + dims, key, mask=dims < D)
    tl.store(variance_ptr + at, tl.sum(keys * keys) * (scale * scale / D) / count)
    rounded = keys.to(k.dtype).T  # [D, N]
    squares, steepness = 0.0, 0.0
    for part in tl.static_range(DV_PAD // BLOCK_V):
        values_at = v_ptr + b * v_b + h * v_h + part * BLOCK_V * v_d
        v = load_rows(
            values_at, start, n_kv, v_n, v_d, KV_BLOCK, D_V - part * BLOCK_V, BLOCK_V, True, False, UPCAST
        )  # fmt: skip
        value, values = centred_rows(v, there, roots, count, BIASED)
        squares += tl.sum(values * values)
        slope = tl.dot(rounded, values.to(v.dtype), input_precision="ieee") * (scale / count)  # [D, BLOCK_V]
        steepness += tl.sum(slope * slope)
        channels = part * BLOCK_V + tl.arange(0, BLOCK_V)
        tl.store(value_ptr + at * D_V + channels, value, mask=channels < D_V)
        if SLOPED:
            slope_at = slope_ptr + at * D * D_V + dims[:, None] * D_V + channels[None, :]
            inside = (dims < D)[:, None] & (channels < D_V)[None, :]
            tl.store(slope_at, slope.to(slope_ptr.dtype.element_ty), mask=inside)
    tl.store(spread_ptr + at, tl.sqrt(squares / count))
    tl.store(steepness_ptr + at, tl.sqrt(steepness / D))


@triton.jit
def mean_rows(
    x, first_block, length, x_n, x_d,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Mean rows of BLOCKS blocks of one head, float32 [BLOCKS, D]; 0 beyond the last."""
    means = tl.zeros([BLOCKS, D_PAD], tl.float32)
    for block in tl.range(BLOCKS):
        start = (first_block + block) * BLOCK
        rows = load_rows(x, start, length, x_n, x_d, BLOCK, D, D_PAD, True, False, UPCAST).to(tl.float32)
        count = tl.minimum(tl.maximum(length - start, 1), BLOCK)
        mean = tl.sum(rows, 0) / count
        means = tl.where((tl.arange(0, BLOCKS) == block)[:, None], mean[None, :], means)
    return means


@triton.jit
def mixing_scores(
    means, keys, log_counts, bits, start, kv_blocks, byte_rows, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of mean keys start .. start + BLOCK_N, in base 2, float32 [BLOCKS, N]; -inf where a block is listed."""
    columns = start + tl.arange(0, BLOCK_N)
    there = columns < kv_blocks
    k = load_rows(keys, start, kv_blocks, D, 1, BLOCK_N, D, D_PAD, True, False, UPCAST).to(tl.float32)  # [N, D]
    log_count = tl.load(log_counts + columns, mask=there, other=-float("inf"))
    scores = tl.dot(means, k.T, input_precision="tf32x3") * scale_log2 + (log_count * LOG2E)[None, :]
    listed = tl.load(bits + byte_rows[:, None] + columns[None, :] // 8, mask=there[None, :], other=255)
    listed = (listed >> (7 - columns % 8).to(tl.uint8)[None, :]) & 1
    return tl.where(listed != 0, -float("inf"), scores)


@triton.jit(do_not_specialize=SIZES)
def mix(
    q_ptr, key_ptr, log_count_ptr, spread_ptr, bits_ptr, weight_ptr, reach_ptr,
    scale_log2, reach_scale, n_q, kv_blocks, heads, listed,
    q_b, q_h, q_n, q_d,
    D: tl.constexpr, D_PAD: tl.constexpr, Q_BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """How the mean queries of BLOCKS query blocks weigh the blocks that are not listed, as `mixing` has it.

    q [B, H, N_q, D] by its strides; key [B, H, nK, D] of q's dtype, log_count and spread float32 [B, H, nK], bits uint8
    [B|1, H, nQ, nK / 8], `listed` rows of them in all, contiguous. weight [B, H, nQ, nK] of q's dtype and, if BOUNDED,
    reach float32 [B, H, nQ] are written, contiguous. Two passes over the mean keys. Ours.
    """
    q_blocks = tl.cdiv(n_q, Q_BLOCK)
    groups = tl.cdiv(q_blocks, BLOCKS)
    first = tl.program_id(0) % groups * BLOCKS
    bh = (tl.program_id(0) // groups).to(tl.int64)
    blocks = first + tl.arange(0, BLOCKS)
    queries = q_ptr + bh // heads * q_b + bh % heads * q_h
    means = mean_rows(queries, first, n_q, q_n, q_d, BLOCKS, Q_BLOCK, D, D_PAD, UPCAST)
    keys, log_counts = key_ptr + bh * kv_blocks * D, log_count_ptr + bh * kv_blocks
    rows = bh * q_blocks + tl.minimum(blocks, q_blocks - 1)
    byte_rows = rows % listed * tl.cdiv(kv_blocks, 8)  # all samples share the lists where there are fewer
    highest = tl.full([BLOCKS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCKS], tl.float32)
    for start in tl.range(0, kv_blocks, BLOCK_N):
        scores = mixing_scores(
            means, keys, log_counts, bits_ptr, start, kv_blocks, byte_rows, scale_log2, D, D_PAD, BLOCK_N, UPCAST
        )  # fmt: skip
        weights, _, highest, shrink = softmax_step(scores, 1.0, highest)
        total = total * shrink + tl.sum(weights, 1)
    highest = tl.where(total == 0.0, 0.0, highest)  # all are listed
    total = tl.where(total == 0.0, 1.0, total)
    reach = tl.zeros([BLOCKS], tl.float32)
    for start in tl.range(0, kv_blocks, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scores = mixing_scores(
            means, keys, log_counts, bits_ptr, start, kv_blocks, byte_rows, scale_log2, D, D_PAD, BLOCK_N, UPCAST
        )  # fmt: skip
        weights = tl.math.exp2(scores - highest[:, None]) / total[:, None]
        if BOUNDED:
            spread = tl.load(spread_ptr + bh * kv_blocks + columns, mask=columns < kv_blocks, other=0.0)
            reach += tl.sum(weights * spread[None, :], 1)
        inside = (blocks < q_blocks)[:, None] & (columns < kv_blocks)[None, :]
        weights = weights.to(weight_ptr.dtype.element_ty)
        tl.store(weight_ptr + rows[:, None] * kv_blocks + columns[None, :], weights, mask=inside)
    if BOUNDED:
        tl.store(reach_ptr + rows, reach * reach_scale, mask=blocks < q_blocks)


@triton.jit(do_not_specialize=SIZES)
def summary_error(
    q_ptr, key_ptr, log_count_ptr, steepness_ptr, variance_ptr, spread_ptr, error_ptr,
    scale_log2, n_q, kv_blocks, heads,
    q_b, q_h, q_n, q_d,
    D: tl.constexpr, D_PAD: tl.constexpr, Q_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The estimated error of all summaries for one query block, as `functional.summary_error` has it.

    q [B, H, N_q, D] by its strides; key [B, H, nK, D], of q's dtype; log_count, steepness, variance and spread
    float32 [B, H, nK], error float32 [B, H, nQ, nK], all contiguous. Two passes over the mean keys: what divides the
    weights of a row is known after the first. Ours; the error is within twice that of plain torch with such keys.
    """
    q_blocks = tl.cdiv(n_q, Q_BLOCK)
    row_block = tl.program_id(0) % q_blocks
    bh = (tl.program_id(0) // q_blocks).to(tl.int64)
    queries = q_ptr + bh // heads * q_b + bh % heads * q_h
    q = load_rows(queries, row_block * Q_BLOCK, n_q, q_n, q_d, Q_BLOCK, D, D_PAD, True, False, UPCAST)  # [M, D]
    squares = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)  # [M], 0 beyond the last row
    keys, log_counts = key_ptr + bh * kv_blocks * D, log_count_ptr + bh * kv_blocks
    highest = tl.full([Q_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([Q_BLOCK], tl.float32)
    for start in tl.range(0, kv_blocks, BLOCK_N):
        scores = mean_scores(
            q, squares, keys, log_counts, log_counts, start, kv_blocks, scale_log2, D, D_PAD, BLOCK_N, False, UPCAST
        )  # fmt: skip
        weights, _, highest, shrink = softmax_step(scores, 1.0, highest)
        total = total * shrink + tl.sum(weights, 1)
    highest = tl.where(total == 0.0, 0.0, highest)  # no key at all
    total = tl.where(total == 0.0, 1.0, total)
    first = squares / (total * total)
    second = first * squares
    error_at = error_ptr + (bh * q_blocks + row_block) * kv_blocks
    for start in tl.range(0, kv_blocks, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        there = columns < kv_blocks
        at = bh * kv_blocks + columns
        steepness = tl.load(steepness_ptr + at, mask=there, other=0.0)
        variance = tl.load(variance_ptr + at, mask=there, other=0.0)
        curved = variance * tl.load(spread_ptr + at, mask=there, other=0.0) / 2
        scores = mean_scores(
            q, squares, keys, log_counts, log_counts, start, kv_blocks, scale_log2, D, D_PAD, BLOCK_N, False, UPCAST
        )  # fmt: skip
        weights = tl.math.exp2(scores - highest[:, None])
        # Both orders in one sum over the rows, which crosses warps.
        orders = first[:, None] * (steepness * steepness)[None, :] + second[:, None] * (curved * curved)[None, :]
        tl.store(error_at + columns, tl.sqrt(tl.sum(weights * weights * orders, 0)), mask=there)


@triton.jit(do_not_specialize=SIZES)
def measure(
    q_ptr, k_ptr, mass_ptr, cached_ptr, key_mask_ptr, clear_ptr,
    scale_log2, n_q, n_kv, heads,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    D: tl.constexpr, D_PAD: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, BIASED: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Mass of all key blocks in BLOCK_M query rows: of one query block, or of several small ones.

    q [B, H, N_q, D] and k [B, H, N_kv, D] by their strides, cached LSE [B, H, N_q] and mass [B, H, nQ, nK] float32,
    contiguous; key_mask_ptr, clear_ptr: of `mask_pointers`. Sums of exp(score - LSE), AdaSpa's Eq. 4 (arXiv
    2502.21079), all in float32: relative error of 1e-5, as the tests measure it.
    """
    strips = tl.cdiv(n_q, BLOCK_M)
    strip = tl.program_id(0) % strips
    bh = tl.program_id(0) // strips
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    first_row = strip * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)  # [M]
    queries = matrix(q_ptr + b * q_b + h * q_h, n_q, q_n, BLOCK_M, D, D_PAD, TMA)
    keys = matrix(k_ptr + b * k_b + h * k_h, n_kv, k_n, BLOCK_N, D, D_PAD, TMA)
    q = load_rows(queries, first_row, n_q, q_n, q_d, BLOCK_M, D, D_PAD, True, TMA, UPCAST)  # [M, D]
    cached = log2_of_cached(cached_ptr + (b * heads + h) * n_q, rows, n_q)
    PARTS: tl.constexpr = KV_BLOCK // BLOCK_N
    BLOCKS: tl.constexpr = BLOCK_M // Q_BLOCK
    q_blocks = tl.cdiv(n_q, Q_BLOCK)
    kv_blocks = tl.cdiv(n_kv, KV_BLOCK)
    row_blocks = strip * BLOCKS + tl.arange(0, BLOCKS)
    mass_at = mass_ptr + ((b * heads + h) * q_blocks + row_blocks) * kv_blocks  # [BLOCKS]
    held = tl.zeros([BLOCK_M], tl.float32)
    clear = n_kv
    if MASKED:
        clear = tl.load(clear_ptr + b)
    for turn in tl.range(kv_blocks * PARTS):
        start = turn * BLOCK_N
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(keys, start, n_kv, k_n, k_d, BLOCK_N, D, D_PAD, RAGGED, TMA, UPCAST)  # [N, D]
        scores = tl.dot(q, k.T, input_precision="ieee")  # [M, N]
        if BIASED:
            scores *= scale_log2
        scores = hide_keys(
            scores, columns, start, key_mask_ptr + b * n_kv, clear, q_ptr, q_ptr, q_ptr, rows, n_q, n_kv,
            BLOCK_N, RAGGED, MASKED, BIASED, 0, True,
        )  # fmt: skip
        weights = tl.math.exp2(scores * (1.0 if BIASED else scale_log2) - cached[:, None])
        held = tl.where(turn % PARTS == 0, 0.0, held) + tl.sum(weights, 1)
        found = tl.sum(tl.reshape(held, [BLOCKS, Q_BLOCK]), 1)  # the last part of a block has it all
        tl.store(mass_at + turn // PARTS, found, mask=row_blocks < q_blocks)


@triton.jit(do_not_specialize=SIZES)
def round_rows(
    x_ptr, mean_ptr, out_ptr, scale_ptr, shift_ptr, length, heads, x_b, x_h, x_n, x_d, out_n,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, KEYS: tl.constexpr,
    TYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of rows in eight bits, with one scale.

    x_ptr [B, H, N, D] with strides; out_ptr int8 or fp8 [B, H, N, out_n], contiguous; scale_ptr float32 [B, H, nB].
    LIMIT: largest magnitude of the eight bits. KEYS lose mean_ptr float32 [B, H, D] first. Of queries, the scores
    that this takes away, x . mean, go to shift_ptr float32 [B, H, N].
    """
    blocks = tl.cdiv(length, BLOCK)
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    start = block * BLOCK
    x = load_rows(x_ptr + b * x_b + h * x_h, start, length, x_n, x_d, BLOCK, D, D_PAD, True, False, UPCAST)
    x = x.to(tl.float32)  # [BLOCK, D]
    rows = start + tl.arange(0, BLOCK)
    dims = tl.arange(0, D_PAD)
    inside = (rows < length)[:, None] & (dims < D)[None, :]
    mean = tl.load(mean_ptr + bh * D + dims, mask=dims < D, other=0.0)
    if KEYS:
        x = tl.where(inside, x - mean[None, :], 0.0)
    else:
        tl.store(shift_ptr + bh.to(tl.int64) * length + rows, tl.sum(x * mean[None, :], 1), mask=rows < length)
    scale = tl.maximum(tl.max(tl.abs(x)) / LIMIT, 1e-30)
    tl.store(scale_ptr + tl.program_id(0), scale)
    at = out_ptr + (bh.to(tl.int64) * length + start) * out_n + tl.arange(0, BLOCK)[:, None] * out_n + dims[None, :]
    tl.store(at, eight_bits(x / scale, TYPE, UPCAST), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def round_values(
    v_ptr, scale_ptr, out_ptr, length, heads, x_b, x_h, x_n, x_d, out_n,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of values in eight bits, transposed: tensor cores need eight bits to lie along the sum.

    v_ptr [B, H, N, D] with strides; scale_ptr float32 [B, H, D]; out_ptr int8 or fp8 [B, H, D, out_n], contiguous.
    """
    blocks = tl.cdiv(length, BLOCK)
    start = tl.program_id(0) % blocks * BLOCK
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    v = load_rows(v_ptr + b * x_b + h * x_h, start, length, x_n, x_d, BLOCK, D, D_PAD, True, False, UPCAST)
    rows = start + tl.arange(0, BLOCK)
    dims = tl.arange(0, D_PAD)
    scale = tl.load(scale_ptr + bh * D + dims, mask=dims < D, other=1.0)
    rounded = eight_bits(v.to(tl.float32) / scale[None, :], TYPE, UPCAST)
    at = out_ptr + bh.to(tl.int64) * D * out_n + dims[None, :].to(tl.int64) * out_n + rows[:, None]
    tl.store(at, rounded, mask=(rows < length)[:, None] & (dims < D)[None, :])
