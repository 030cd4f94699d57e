"""The public functions: each checks its arguments and calls one custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse_kernels import ops
from diffsparse_kernels.case import DENSE_BLOCKS, INTEGERS, Case, Summary
from diffsparse_kernels.catalog import BACKENDS
from diffsparse_kernels.checks import (
    check_bits,
    check_blocks,
    check_boxes,
    check_correction,
    check_errors,
    check_fit,
    check_lists,
    check_lse,
    check_orders,
    check_packed,
    check_precision,
    check_qkv,
    check_summary,
    check_summary_error,
    check_summary_name,
)
from diffsparse_kernels.errors import BackendError, KernelInputError
from diffsparse_kernels.lists import Block, BlockLists, blocks_of, edges
from diffsparse_kernels.machine import device_name
from diffsparse_kernels.masks import Boxes, differs_by_head, each_head, fold_heads, readable, unfold_heads
from diffsparse_kernels.measured import density_limit
from diffsparse_kernels.registry import Choice, check_known, choose
from diffsparse_kernels.rows import Correction
from diffsparse_kernels.select import bits_of_rows
from diffsparse_kernels.summaries import Summaries

_MANY_KEYS = 2**14  # from which on more launches cost less than they save
_PROGRAMS, _MOST_PARTS = 264, 8  # that a large GPU runs side by side, and of one head


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention that also returns its log-sum-exp.

    Args:
        q: [B, H, N_q, D], float32, bfloat16, float16 or float64; any strides.
        k: [B, H, N_kv, D], of q's dtype.
        v: [B, H, N_kv, D_v], of q's dtype.
        scale: of the scores, 1/sqrt(D) by default.
        key_mask: [B, N_kv] or [B, H, N_kv]. Bool: True where a key may be attended to. Float: added to the scaled
            scores of each key, in the LSE too; -inf, or anything below -1e29, hides it. NaN and +inf are not looked
            for, and give NaN.
        backend: by name; chosen by the device if None.

    Returns:
        out [B, H, N_q, D_v] of q's dtype, and the natural-log LSE of the scaled scores, float32 (float64 for float64
        inputs) [B, H, N_q]. A query without any key gets 0 and -inf.

    Raises:
        KernelInputError: shapes, dtypes or devices that don't fit.
        BackendError: a backend that can't run here.
    """
    check_qkv(q, k, v, key_mask)
    like, key_mask = q, readable(key_mask, q)
    if differs_by_head(key_mask):
        q, k, v, key_mask = *fold_heads(q, k, v), key_mask.flatten(0, 1)
    out, lse = ops.attention(q, k, v, _scale(q, scale), key_mask, _named(q, backend))
    out, lse = unfold_heads(like, out, lse)
    return out, lse


def attention_of_few(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """Dense attention of a few queries to many keys: on a device in parts side by side, which are merged by their LSE.

    One query block of each head would leave most of a GPU idle.

    Args:
        q: [B, H, N_q, D], float32, bfloat16, float16 or float64; any strides.
        k: [B, H, N_kv, D], of q's dtype.
        v: [B, H, N_kv, D_v], of q's dtype.
        scale: of the scores, 1/sqrt(D) by default.
        key_mask: as in `attention`.

    Returns:
        out [B, H, N_q, D_v] of q's dtype, without an LSE.

    Raises:
        KernelInputError: shapes, dtypes or devices that don't fit.
    """
    parts = key_parts(q, k)
    if parts == 1:
        return attention(q, k, v, scale=scale, key_mask=key_mask)[0]
    if key_mask is not None:
        key_mask = _in_parts(each_head(key_mask).expand(k.shape[:3]), parts)
    every = q[:, :, None].expand(-1, -1, parts, -1, -1).flatten(1, 2)
    found = attention(every, _in_parts(k, parts), _in_parts(v, parts), scale=_scale(q, scale), key_mask=key_mask)
    out, lse = (x.unflatten(1, (-1, parts)) for x in found)
    shares = lse.softmax(2).nan_to_num(0)  # of no key at all
    merged: Tensor = (out * shares[..., None]).sum(2)
    return merged.to(q.dtype)


def _in_parts(x: Tensor, parts: int) -> Tensor:
    """[B, H, N, ...] -> [B, H * parts, N / parts, ...]."""
    cut: Tensor = x.unflatten(2, (parts, -1))
    return cut.flatten(1, 2)


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_cached: Tensor | None = None,
    *,
    q_block: int,
    kv_block: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention`, and in the same pass `block_mass` against the LSE of an earlier call.

    Without `lse_cached` the mass is that of the call's own LSE where a back end sees whole rows ("cpu", "reference").
    Elsewhere that is known only when the pass ends: then it is the one that the summaries of the keys give, so each
    row counts by exp(own - estimate). Blocks chosen by such masses are as good: on the embedded model AdaSpa has the
    same PSNR within what prompts differ by (DESIGN.md).

    Args:
        q: [B, H, N_q, D], float32, bfloat16, float16 or float64; any strides.
        k: [B, H, N_kv, D], of q's dtype.
        v: [B, H, N_kv, D_v], of q's dtype.
        lse_cached: [B, H, N_q], of an earlier step, or None.
        q_block: queries of a tile.
        kv_block: keys of a tile.
        scale: of the scores, 1/sqrt(D) by default.
        key_mask: as in `attention`.
        backend: by name; chosen by the device if None.

    Returns:
        out [B, H, N_q, D_v], its LSE [B, H, N_q], and the mass [B, H, nQ, nK], as in `attention` and `block_mass`.

    Raises:
        KernelInputError: shapes, dtypes, devices or blocks that don't fit.
        BackendError: a backend that can't run here.
    """
    check_qkv(q, k, v, key_mask)
    if lse_cached is not None:
        check_lse(q, lse_cached)
    check_blocks(q_block, kv_block)
    like, key_mask = q, readable(key_mask, q)
    if differs_by_head(key_mask):
        q, k, v, key_mask = *fold_heads(q, k, v), key_mask.flatten(0, 1)
        lse_cached = None if lse_cached is None else fold_heads(lse_cached)[0]
    out, lse, mass = ops.attention_with_mass(
        q, k, v, lse_cached, q_block, kv_block, _scale(q, scale), key_mask, _named(q, backend)
    )
    out, lse, mass = unfold_heads(like, out, lse, mass)
    return out, lse, mass


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    q_block: int,
    kv_block: int,
    every: int = 1,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax weight in each tile: mass[p, q] = sum of exp(score - lse_row) over rows of p and keys of q.

    With the call's own LSE the rows of tokens sum to 1; with that of an earlier step each is scaled by its drift
    (AdaSpa, arXiv 2502.21079, Eq. 4). Rows whose lse is not finite count for nothing.

    Of each block only one row in `every` is computed, and stands for those that follow it: an estimate at that part
    of the cost. The rows that are computed are exact.

    Args:
        q: [B, H, N_q, D].
        k: [B, H, N_kv, D].
        lse: [B, H, N_q].
        q_block: queries of a tile.
        kv_block: keys of a tile.
        every: a divisor of q_block.
        scale: as in `attention`.
        key_mask: as in `attention`.
        backend: as in `attention`.

    Returns:
        float32 (float64 for float64 inputs) [B, H, nQ, nK].

    Raises:
        KernelInputError: shapes, dtypes, devices or blocks that don't fit.
        BackendError: as in `attention`.
    """
    check_qkv(q, k, k, key_mask)
    check_lse(q, lse)
    check_blocks(q_block, kv_block)
    if every < 1 or q_block % every:
        raise KernelInputError(f"wanted every as a divisor of q_block {q_block}; got {every}")
    like, key_mask = q, readable(key_mask, q)
    if differs_by_head(key_mask):
        q, k, lse, key_mask = *fold_heads(q, k, lse), key_mask.flatten(0, 1)
    # Blocks begin at multiples of `every`, so a strided view holds the same rows of each.
    rows, rest = slice(None, None, every), (kv_block, _scale(q, scale), key_mask, _named(q, backend))
    mass: Tensor = ops.block_mass(q[:, :, rows], k, lse[:, :, rows], q_block // every, *rest)
    mass = mass if every == 1 else mass * rows_per_sample(q.shape[2], q_block, every, mass)
    return unfold_heads(like, mass)[0]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    boxes: Boxes | None = None,
    summary: Summary | Summaries | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks only; the others count as -inf before the softmax.

    The LSE is that of all that was seen, so parts computed apart can be merged (`merge_attention`).

    Args:
        q: [B, H, N_q, D], float32, bfloat16, float16 or float64; any strides.
        k: [B, H, N_kv, D], of q's dtype.
        v: [B, H, N_kv, D_v], of q's dtype.
        lists: the blocks; lists of one sample serve all of a batch.
        scale: of the scores, 1/sqrt(D) by default.
        key_mask: as in `attention`.
        boxes: hide keys within the listed blocks; those stay hidden in summaries, too.
        summary: what stands for each dropped block: a `Summary` by name, `Summaries` of k and v, or None for nothing.
        precision: a key of `PRECISIONS`; emulated, and no faster, where no kernel has it. Not with boxes.
        backend: by name; chosen by the device if None.

    Returns:
        out [B, H, N_q, D_v] and LSE [B, H, N_q] as in `attention`; 0 and -inf where a query sees nothing.

    Raises:
        KernelInputError: arguments that don't fit each other.
        BackendError: a backend that can't run here.

    Examples:
        >>> q, k, v = torch.randn(3, 1, 2, 256, 64)
        >>> mask = torch.eye(4, dtype=torch.bool).expand(1, 2, 4, 4)  # each block sees itself
        >>> lists = BlockLists.from_mask(mask, q_block=64, kv_block=64, q_len=256, kv_len=256)
        >>> out, lse = block_sparse_attention(q, k, v, lists, summary="means")
    """
    check_qkv(q, k, v, key_mask)
    check_lists(q, k, lists)
    check_summary(k, v, lists, summary)
    if precision is not None:
        check_precision(precision, boxes, backend)
    if boxes is not None:
        check_boxes(q, k, boxes)
    like, key_mask = q, readable(key_mask, q)
    if differs_by_head(key_mask):
        q, k, v, key_mask, lists = *fold_heads(q, k, v), key_mask.flatten(0, 1), lists.by_head(q.shape[0])
        summary = summary.by_head() if isinstance(summary, Summaries) else summary
    arguments, named = (q, k, v, *_parts(lists), _scale(q, scale), key_mask), _named(q, backend)
    if precision is not None:
        out, lse = ops.eight_bit_attention(*arguments, *_stand_ins(summary), precision, named)
    else:
        out, lse = ops.block_sparse_attention(*arguments, *(boxes or (None,) * 3), *_stand_ins(summary), named)
    out, lse = unfold_heads(like, out, lse)
    return out, lse


def quantised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    bits: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    summary: Summary | Summaries | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks whose two products are of whole numbers (PAROAttention, arXiv 2506.16054).

    8 bits are `block_sparse_attention` with the precision "int8-int8", which a device may have a kernel for; fewer are
    emulated in plain torch ("int4 emulated"), no faster than without rounding: with a scale for each block of queries,
    keys and values, and for each tile of weights.

    Args:
        q: [B, H, N_q, D], float32, bfloat16, float16 or float64; any strides.
        k: [B, H, N_kv, D], of q's dtype.
        v: [B, H, N_kv, D_v], of q's dtype.
        lists: the blocks.
        bits: of the numbers multiplied, from 2 to 8.
        scale: of the scores, 1/sqrt(D) by default.
        key_mask: as in `attention`.
        summary: as in `block_sparse_attention`; summaries are not rounded.

    Returns:
        out [B, H, N_q, D_v] of q's dtype, and the LSE [B, H, N_q], as in `attention`.

    Raises:
        KernelInputError: shapes, dtypes, devices, lists, bits or summaries that don't fit.
    """
    check_qkv(q, k, v, key_mask)
    check_lists(q, k, lists)
    check_summary(k, v, lists, summary)
    check_bits(bits)
    if bits == 8:
        return block_sparse_attention(
            q, k, v, lists, scale=scale, key_mask=key_mask, summary=summary, precision=INTEGERS
        )
    rest = _scale(q, scale), readable(key_mask, q), *_stand_ins(summary), bits
    out, lse = ops.quantised_attention(q, k, v, *_parts(lists), *rest)
    return out, lse


def summarise(
    k: Tensor,
    v: Tensor,
    block: int,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    by: Summary = "first-order",
) -> Summaries:
    """What each block of keys stands as where it is not computed, for `block_sparse_attention` and `summary_error`.

    Costs D / (2 N) of dense attention, and nothing to speak of by means alone.

    Args:
        k: [B, H, N, D].
        v: [B, H, N, D_v].
        block: keys of a block; the last may be ragged.
        scale: of the scores, 1/sqrt(D) by default.
        key_mask: as in `attention`; masked keys count for nothing, and those with a bias exp(bias) times: in how many
            there are, in the means, and in what varies about these.
        by: "means", or "first-order" for all of it.

    Returns:
        `Summaries`, in float32 or better, with one for each of the nK blocks.

    Raises:
        KernelInputError: shapes, dtypes, devices or blocks that don't fit.
    """
    check_qkv(k, k, v, key_mask)
    check_blocks(block, block)
    check_summary_name(by)
    return ops.summarise(k, v, block, _scale(k, scale), readable(key_mask, k), by)


def summary_error(q: Tensor, summaries: Summaries, *, q_block: int, scale: float | None = None) -> Tensor:
    """Estimated error of each block's first-order summary, for each block of queries: compute the largest.

    With p = softmax over blocks b of (q . mean key * scale + log n), the expected squares of first and second order,

        e^2 = sum over rows of p^2 (|q|^2 steepness^2 + (|q|^2 variance spread / 2)^2)

    as if queries had no preferred direction. Ours. Takes no values and no state, and costs 0.5 / kv_block of dense
    attention.

    Args:
        q: [B, H, N_q, D], of any dtype that `attention` takes.
        summaries: of the keys, by `summarise` with "first-order" and the same scale.
        q_block: queries of a block; the last may be ragged.
        scale: of the scores, 1/sqrt(D) by default.

    Returns:
        e, float32 or better [B, H, nQ, nK]; 0 for a block whose keys are all masked.

    Raises:
        KernelInputError: summaries by means, or of other shapes or devices.
    """
    check_blocks(q_block, 1)
    check_summary_error(q, summaries)
    error: Tensor = ops.summary_error(q, list(summaries._replace(slope=None)), q_block, _scale(q, scale))
    return error


def lists_of_largest(
    error: Tensor,
    share: float,
    *,
    q_block: int,
    kv_block: int,
    q_len: int,
    kv_len: int,
    always: Tensor | None = None,
    heads: tuple[int, int] | None = None,
) -> BlockLists:
    """Lists of the blocks with the largest errors, one budget for all heads and rows of a sample, in bounded memory.

    Exactly the share of all blocks, rounded up, the best of each row among them: first these, then the largest others;
    of equals the lower head, row, block. Where rows are more than that, each has its best. What lies 40 octaves below
    the largest error counts for nothing, and is not taken: then there may be fewer.

    Args:
        error: float [B, H, nQ, nK], compared as float32; what is negative or not finite counts as zero.
        share: of the blocks of a sample, in [0, 1].
        q_block: queries of a block.
        kv_block: keys of a block.
        q_len: queries in all.
        kv_len: keys in all.
        always: bool [nQ, nK], blocks that are listed anyway, beside the share.
        heads: the first of those whose lists are made, and the one behind the last; all by default.

    Returns:
        Lists with their bits and their order.

    Raises:
        KernelInputError: shapes or dtypes that don't fit.
    """
    first, last = heads or (0, error.shape[1])
    check_errors(error, (blocks_of(q_len, q_block), blocks_of(kv_len, kv_block)), always, (first, last))
    idx, cnt, bits, order = ops.lists_of_largest(error, share, always, first, last)
    return BlockLists(idx, cnt, q_block, kv_block, q_len, kv_len, order, bits)


def lists_of_rows(
    mass: Tensor,
    keep: int | Tensor,
    *,
    q_block: int,
    kv_block: int,
    q_len: int,
    kv_len: int,
    always: Tensor | None = None,
) -> BlockLists:
    """Lists of the `keep` blocks of each query row with the most mass, as `select_rows` takes them, in bounded memory.

    Args:
        mass: float [B, H, nQ, nK].
        keep: blocks a row, an int or an int tensor [B, H].
        q_block: queries of a block.
        kv_block: keys of a block.
        q_len: queries in all.
        kv_len: keys in all.
        always: bool [nQ, nK], blocks that are listed whatever their mass; they take their places first.

    Returns:
        Lists with their bits and their order.

    Raises:
        KernelInputError: shapes or dtypes that don't fit.
    """
    sizes = {"q_block": q_block, "kv_block": kv_block, "q_len": q_len, "kv_len": kv_len}
    check_errors(mass, (blocks_of(q_len, q_block), blocks_of(kv_len, kv_block)), always, (0, mass.shape[1]))
    return lists_of_bits(bits_of_rows(mass, keep, always), **sizes)


def lists_of_bits(bits: Tensor, *, q_block: int, kv_block: int, q_len: int, kv_len: int) -> BlockLists:
    """Lists of the blocks that are set in `bits`, in bounded memory: what has them for many steps need keep no more.

    Args:
        bits: uint8 [B|1, H, nQ, ceil(nK / 8)], of `BlockLists.packed`.
        q_block: queries of a block.
        kv_block: keys of a block.
        q_len: queries in all.
        kv_len: keys in all.

    Returns:
        Lists with these bits and their order.

    Raises:
        KernelInputError: bits of another shape or dtype.
    """
    columns = blocks_of(kv_len, kv_block)
    check_packed(bits, blocks_of(q_len, q_block), columns)
    idx, cnt, order = ops.lists_of_bits(bits, columns)
    return BlockLists(idx, cnt, q_block, kv_block, q_len, kv_len, order, bits)


def move_rows(*tensors: Tensor, orders: Tensor, picked: Tensor) -> list[Tensor]:
    """The rows of each head in its order; on a GPU up to three tensors in one launch.

    Args:
        tensors: [B, H, N, D], of any dtype, strides and D, all with the same B, H and N.
        orders: int64 [orders, M], which row stands at each place.
        picked: int64 [B|1, H|1], the order of each head.

    Returns:
        For each tensor one [B, H, M, D], contiguous.

    Raises:
        KernelInputError: shapes, dtypes or devices that don't fit.
    """
    for x in tensors:
        check_orders(x, orders, picked)
    moved: list[Tensor] = ops.move_rows(list(tensors), orders, picked)
    return moved


def restore_rows(
    x: Tensor, inverses: Tensor | None = None, picked: Tensor | None = None, correction: Correction | None = None
) -> Tensor:
    """Rows of each head by number, and what a correction adds to them; on a GPU one launch.

    Args:
        x: [B, H, M, D].
        inverses: int64 [orders, N], which row comes to each place; None leaves them where they are.
        picked: int64 [B|1, H|1], the order of each head.
        correction: of the rows of x, as these stand.

    Returns:
        [B, H, N, D] of x's dtype; stored as [B, N, H, D] where rows move. x itself, where there is nothing to do.

    Raises:
        KernelInputError: shapes, dtypes or devices that don't fit.
    """
    if inverses is not None:
        check_orders(x, inverses, picked)
    if correction is not None:
        check_correction(x, correction)
    added = correction is not None and (correction.by_output is not None or correction.codes is not None)
    if inverses is None and not added:
        return x
    restored: Tensor = ops.restore_rows(x, inverses, picked, list(correction) if correction and added else [])
    return restored


def fit_rows(
    exact: Tensor,
    out: Tensor,
    probes: Tensor,
    *,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    basis: Tensor | None = None,
) -> Correction:
    """The affine map that predicts best what probe rows of an output miss, for each head of each sample. Ours.

    Ridge regression on what the rows got, and on the coefficients of a residual of low rank that was kept, if any. It
    starts from nothing, or from that residual as it is. Which of the two, which penalty, whether a mean alone is added
    or nothing at all: whatever predicts the probes best, each from all others. For n centred rows X and
    A = (X X^T + l I)^-1 the error of one that is left out is l (A y)_i / (l A_ii - 1/n).

    Args:
        exact: [B, H, n, D], what the probe rows should be; those that are not finite miss nothing.
        out: [B, H, N, D], the output, of exact's dtype.
        probes: int64 [n], numbers of its rows.
        codes: int8 [B, H, N, r], of all rows of the residual; its scale and basis go with them.
        scale: bfloat16 [B, H, N, 1], of a row's codes.
        basis: float32 [B, H, r, D].

    Returns:
        The correction of all rows, computed in float32 or better.

    Raises:
        KernelInputError: shapes, dtypes or devices that don't fit.
    """
    check_fit(exact, out, probes, codes, scale, basis)
    by_output, constant, *by_code = ops.fit_rows(exact, out, probes, codes, scale, basis)
    return Correction(by_output, constant, *((codes, scale, *by_code) if by_code else ()))


def kernel_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists | None = None,
    *,
    key_mask: Tensor | None = None,
    boxes: Boxes | None = None,
) -> Choice:
    """The backend whose kernel computes this very call, and those that were passed over for it, with their reasons.

    `record` says the same of a call that ran.

    Args:
        q: [B, H, N_q, D].
        k: [B, H, N_kv, D].
        v: [B, H, N_kv, D_v].
        lists: the blocks; None for dense attention.
        key_mask: as in `attention`.
        boxes: as in `block_sparse_attention`.

    Raises:
        NoKernelError: no kernel of the device can do it.
    """
    blocks = DENSE_BLOCKS if lists is None else (lists.q_block, lists.kv_block)
    return choose(Case.of("attend", q, k, v, blocks, key_mask, boxes), q.device)


def break_even(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: Block, tokens: int, masked: bool = False
) -> float:
    """Density above which dense attention is faster than block-sparse attention.

    As `diffsparse doctor --measure` found it on this device, else a cautious default.

    Args:
        device: where it runs.
        dtype: of q, k and v.
        head_dim: D.
        block: tokens of a block, or its queries and keys.
        tokens: N.
        masked: whether there is a key mask.

    Raises:
        NoKernelError: no kernel of the device can do it.
    """
    case = Case("attend", dtype, head_dim, head_dim, *edges(block), masked)
    return density_limit(choose(case, device).name, device_name(device), dtype, head_dim, block, tokens)


def default_block() -> int:
    """Edge of a square block that suits this machine: 128 tokens where there is a CUDA device, 64 where there is none.

    The fastest GPU kernels take blocks of 128 queries only; smaller ones reload keys and values twice as often.
    """
    return edges(best_block())[0]


def best_block() -> Block:
    """The block that suits this machine where it need not be square: 128 queries x 64 keys with a CUDA device, else 64.

    As many queries as the fastest GPU kernels want, and as few keys as these take, for a finer choice.
    """
    return (128, 64) if torch.cuda.is_available() else 64


def rows_per_sample(length: int, block: int, every: int, like: Tensor) -> Tensor:
    """Rows of each block over the rows computed of it, [nQ, 1]; the last block may be ragged."""
    share = like.new_full((like.shape[2], 1), every)
    left = length - (like.shape[2] - 1) * block
    share[-1] = left / -(-left // every)
    return share


def key_parts(q: Tensor, k: Tensor) -> int:
    """Into how many equal parts `attention_of_few` cuts the keys of a call.

    More than one where keys are many, lie without gaps, and the programs of all parts find room on a GPU at once.
    """
    if q.device.type == "cpu" or k.shape[2] < _MANY_KEYS or not k.is_contiguous():
        return 1
    programs = q.shape[0] * q.shape[1] * blocks_of(q.shape[2], DENSE_BLOCKS[0])
    room = max(_PROGRAMS // programs, 1)
    return next(parts for parts in range(min(room, _MOST_PARTS), 0, -1) if k.shape[2] % parts == 0)


def _named(q: Tensor, name: str | None) -> str:
    """A name that is known, or an empty one; whether it can do this is asked inside the op, where no compiler looks."""
    if name is None:
        return ""
    check_known(name)
    if q.device.type not in BACKENDS[name].devices:
        kinds = ", ".join(BACKENDS[name].devices)
        raise BackendError(f"backend {name!r} runs on {kinds}; got tensors on {q.device}")
    return name


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _stand_ins(summary: Summary | Summaries | None) -> tuple[str, list[Tensor | None]]:
    """A summary as the ops take it: its name, empty for none, and its parts, empty if they are to be made."""
    return (summary.by, list(summary)) if isinstance(summary, Summaries) else (summary or "", [])


def _parts(lists: BlockLists) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int]:
    return lists.idx, lists.cnt, lists.order, lists.bits, lists.q_block, lists.kv_block
