"""Stand-ins for dropped blocks of keys: their means, and how the values vary with the keys about these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from diffsparse_kernels.lists import BlockLists, blocks_of
from diffsparse_kernels.masks import each_head, fold_heads
from diffsparse_kernels.strips import strips

Summary = Literal["means", "first-order"]  # how a block that is not listed stands for its keys
SUMMARIES: tuple[Summary, ...] = ("means", "first-order")

_LOG2_E = math.log2(math.e)
_CACHE_BYTES = 4 * 2**20  # what stays in the processor's cache
_DEVICE_BYTES = 256 * 2**20  # what may exist at a time on a device, where few large products are fast
_KEPT_BYTES = 64 * 2**20  # slopes that are kept by a processor; a device re-reads K and V in less time than it saves
MOST_BIAS = 3.0  # beyond, a few keys hold the mass of a block, and the scores are no normal distribution
Part = tuple[slice, slice]  # samples, heads
_REACH = 0.5  # of a step to first order, in spreads of the values
NOWHERE = -1e30  # log count of a block without keys, where -inf would give NaN


class Summaries(NamedTuple):
    """What stands for each block of n keys, in float32 or better.

    By "means" a block counts to a query q as n keys with the mean key and the mean value: n * exp(q . key * scale).
    "first-order" adds what varies about the means. Scores with the variance |q|^2 t raise the mass of the block by
    exp(|q|^2 t / 2), if they are a normal distribution; and the softmax within the block moves its value by q H, to
    first order in the scores. All dropped blocks of a query block share one matrix, the mean of their H by the weights
    that its mean query gives them: it costs next to nothing, and keeps nearly all that one for each row would gain.
    Where scores vary by more than about 1, first order overshoots: a weighted mean stays among the values. So no step
    q H gets longer than half of the values' spread s, mixed as H is: it is shortened to q H / sqrt(1 + |2 q H / s|^2).
    Means are PISA's (arXiv 2602.01077) and Sol-Attn's (2607.24027), one H for all blocks is PISA's; the matrix of each
    query block and the bound are ours.

    key: mean key [B, H, nK, D].
    value: mean value [B, H, nK, D_v].
    log_count: log n, [B|1, H|1, nK], -inf where all keys are masked.
    variance: t = scale^2 * mean |k - mean key|^2 / D, [B, H, nK]; None adds no mass.
    spread: root mean square distance of the values to their mean, [B, H, nK]; None sets no bound.
    steepness: |H|_F / sqrt(D), [B, H, nK]; for `summary_error` alone.
    slope: H = scale * mean (k - mean key)(v - mean value)^T, [B, H, nK, D, D_v], or [B, H, 1, D, D_v], one for all
        blocks. None, where there is a steepness: too large to keep, it is made where it is needed, heads in groups.
    """

    key: Tensor
    value: Tensor
    log_count: Tensor
    variance: Tensor | None = None
    spread: Tensor | None = None
    steepness: Tensor | None = None
    slope: Tensor | None = None

    @property
    def by(self) -> Summary:
        """What they are."""
        return "means" if self.slope is None and self.steepness is None else "first-order"

    @property
    def mixed(self) -> bool:
        """Whether each query block mixes the slopes of the blocks; not where all have one."""
        return self.by == "first-order" and (self.slope is None or self.slope.shape[2] > 1)

    def by_head(self) -> Summaries:
        """The same for heads that stand as samples of one head, [B * H, 1, ...]."""
        return self._each(lambda x: fold_heads(x)[0])

    def part(self, part: Part) -> Summaries:
        """The same for some samples and heads."""
        return self._each(lambda x: x[part])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Summaries:
        wide = self._replace(log_count=self.log_count.expand(self.key.shape[:3]))
        return Summaries._make(None if x is None else change(x) for x in wide)

    def bias(self, lists: BlockLists) -> Tensor:
        """What to add to the scores of the mean keys: log n, and -inf where a block is listed; [B, H, nQ, nK]."""
        bias = self.log_count[:, :, None].masked_fill(lists.to_mask(), -torch.inf)
        return bias.expand(*self.key.shape[:2], -1, -1)


def summarise(k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None, by: Summary) -> Summaries:
    """Summaries over the real keys of each block; a ragged last block has fewer."""
    return _means(k, v, block, key_mask) if by == "means" else first_order(k, v, block, scale, key_mask)


def keeps_slopes(k: Tensor, v: Tensor, block: int) -> bool:
    """Whether the slopes of all blocks stay from the statistics on until they are mixed.

    On a device they would hold 1.5 GiB at 40 heads of 75,600 tokens, and made again they cost one read of K and V: a
    hundredth of the sparse product.
    """
    numbers = k.shape[0] * k.shape[1] * blocks_of(k.shape[2], block) * k.shape[3] * v.shape[3]
    return k.device.type == "cpu" and numbers * torch.promote_types(k.dtype, torch.float32).itemsize <= _KEPT_BYTES


def first_order(k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None) -> Summaries:
    """`summarise` to first order."""
    means, keeps = _means(k, v, block, key_mask), keeps_slopes(k, v, block)
    found: list[list[Tensor]] = [[], [], [], []]
    for samples, heads in groups(k, v, block):
        part = _varied(k, v, block, scale, key_mask, means, (samples, heads))
        for parts, tensor in zip(found, part if keeps else part[:3], strict=False):
            parts.append(tensor.flatten(0, 1))
    joined = (torch.cat(parts).unflatten(0, k.shape[:2]) for parts in found if parts)
    return means._replace(**dict(zip(("variance", "spread", "steepness", "slope"), joined, strict=False)))


def _means(k: Tensor, v: Tensor, block: int, key_mask: Tensor | None) -> Summaries:
    exact = torch.promote_types(k.dtype, torch.float32)
    if key_mask is None:
        count = _sums(torch.ones(1, 1, k.shape[2], 1, dtype=exact, device=k.device), block)
    else:
        seen = each_head(key_mask)[..., None]  # [B, H|1, N, 1]
        k, v = (x.masked_fill(~seen, 0) for x in (k, v))
        count = _sums(seen.to(exact), block)
    key, value = (_sums(x, block) / count.clamp(min=1) for x in (k, v))
    return Summaries(key, value, count[..., 0].log())


def _varied(
    k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None, means: Summaries, part: Part
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Variance, spread, steepness and slope of some heads.

    Keys and values are centred first: where they have much in common, their products would cancel.
    """
    seen = None if key_mask is None else each_head(key_mask).expand(k.shape[:3])[part]
    counts = means.log_count.exp().expand(k.shape[0], k.shape[1], -1)[part].clamp(min=1)
    keys, values = (
        _centred(x[part], mean[part], block, seen) for x, mean in ((k, means.key), (v, means.value))
    )  # [b, h, nK, n, D]
    slope = (keys.mT @ values).mul_((scale / counts)[..., None, None])
    length, spread, steepness = (torch.linalg.vector_norm(x, dim=(-1, -2)) for x in (keys, values, slope))
    root = k.shape[3] ** -0.5
    return (length * scale * root).square() / counts, spread / counts.sqrt(), steepness * root, slope


def _centred(x: Tensor, mean: Tensor, block: int, seen: Tensor | None) -> Tensor:
    """Distances of rows to the mean of their block, [B, H, nK, block, D]; 0 for masked ones and beyond the last."""
    padding = mean.shape[2] * block - x.shape[2]
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
        there = torch.arange(x.shape[2], device=x.device) < x.shape[2] - padding
        seen = there.expand(x.shape[:3]) if seen is None else torch.nn.functional.pad(seen, (0, padding))
    centred: Tensor = x.unflatten(2, (-1, block)) - mean[:, :, :, None]
    return centred if seen is None else centred.masked_fill_(~seen.unflatten(2, (-1, block))[..., None], 0)


def groups(k: Tensor, v: Tensor, block: int) -> Iterator[Part]:
    """Samples and heads, as many as have room for the matrices of their blocks, twice, and for their keys and values.

    Flattened and joined, the groups give all heads in order.
    """
    _, _, length, dim = k.shape
    numbers = 2 * blocks_of(length, block) * dim * v.shape[3] + length * (dim + v.shape[3])
    return parts_of(k, numbers * torch.promote_types(k.dtype, torch.float32).itemsize)


def parts_of(x: Tensor, head_bytes: int) -> Iterator[Part]:
    """Samples and heads of x [B, H, ...], as many as there is room for."""
    (batch, heads), most = x.shape[:2], _room(x)
    for samples in strips(batch, heads * head_bytes, most):
        for part in strips(heads, (samples.stop - samples.start) * head_bytes, most):
            yield samples, part


def merge_summaries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    summaries: Summaries,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge what the summaries of the blocks outside the lists give into out [B, H, N_q, D_v] and lse, in place.

    Plain torch, a few rows of blocks at a time, so that nothing leaves the cache between its uses. The summaries'
    weights meet those of `out` in one softmax, so their own output, which `merge_attention` would need, never exists.
    """
    bias = summaries.bias(lists)
    if summaries.by == "means":
        return _merge(q, lists, scale, summaries, bias, None, out, lse)
    for part in groups(k, v, lists.kv_block):
        some = summaries.part(part)
        if some.slope is None:
            some = some._replace(slope=_varied(k, v, lists.kv_block, scale, key_mask, summaries, part)[3])
        mixed = mixed_slopes(q[part], lists, scale, some, bias[part])
        _merge(q[part], lists, scale, some, bias[part], mixed, out[part], lse[part])


class Slopes(NamedTuple):
    """How the value of all dropped blocks together varies with the query, for each query block.

    slope: [B, H, nQ, D, D_v].
    reach: the longest step, [B, H, nQ]; None where there is no bound.
    """

    slope: Tensor
    reach: Tensor | None


def mixed_slopes(q: Tensor, lists: BlockLists, scale: float, summaries: Summaries, bias: Tensor) -> Slopes:
    """Slopes of the dropped blocks as the mean query of each block weighs them, 0 where none is dropped.

    bias: `summaries.bias(lists)`.
    summaries: with their slopes, in whose dtype these are mixed: few bits are faster on tensor cores.
    """
    slope = cast(Tensor, summaries.slope)
    if slope.shape[2] == 1:
        return Slopes(slope.expand(-1, -1, lists.q_blocks, -1, -1), None)
    middle = _means(q, q[..., :0], lists.q_block, None).key  # [B, H, nQ, D]
    weights = torch.baddbmm(bias.flatten(0, 1), middle.flatten(0, 1), summaries.key.flatten(0, 1).mT, alpha=scale)
    weights = weights.softmax(-1).nan_to_num_(0)
    mixed = (weights.to(slope.dtype) @ slope.flatten(3).flatten(0, 1)).view(*middle.shape, -1)
    if summaries.spread is None:
        return Slopes(mixed, None)
    reach = weights @ summaries.spread.flatten(0, 1)[..., None] * _REACH
    return Slopes(mixed, reach.view(middle.shape[:3]))


def _merge(
    q: Tensor,
    lists: BlockLists,
    scale: float,
    summaries: Summaries,
    bias: Tensor,
    mixed: Slopes | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`merge_summaries` for some heads, with the bias and the slopes of each query block."""
    bias, keys = bias * _LOG2_E, summaries.key.mul(scale * _LOG2_E).mT  # [B, H, nQ, nK], [B, H, D, nK]
    for blocks, rows in _strips(q, lists.q_block, keys.shape[-1]):
        by_block = blocks.stop - blocks.start, -1
        queries = q[:, :, rows].to(keys.dtype)
        scores = queries @ keys  # [B, H, rows, nK], powers of two: torch's exp is slower
        scores.unflatten(2, by_block).add_(bias[:, :, blocks, None])
        if summaries.variance is not None:
            scores.add_(_log2_mass(queries, summaries.variance))
        theirs = lse[:, :, rows, None] * _LOG2_E
        top = torch.maximum(scores.amax(-1, keepdim=True), theirs)
        top.masked_fill_(top.isneginf(), 0)
        weights, share = scores.sub_(top).exp2_(), theirs.sub_(top).exp2_()
        ours = weights.sum(-1, keepdim=True)
        total = ours + share
        lse[:, :, rows] = (top + total.log2()).div_(_LOG2_E)[..., 0]
        total.masked_fill_(total == 0, 1)
        merged = out[:, :, rows].to(keys.dtype).mul_(share.div_(total)).flatten(0, 1)  # in place where it needs no copy
        merged.baddbmm_(weights.div_(total).flatten(0, 1), summaries.value.flatten(0, 1))
        if mixed is not None:
            steps = queries.unflatten(2, by_block) @ mixed.slope[:, :, blocks]  # [B, H, nQ, rows, D_v]
            if mixed.reach is not None:
                steps.mul_(_shortening(steps, mixed.reach[:, :, blocks, None, None]))
            merged.add_(steps.view_as(merged).mul_(ours.div_(total).flatten(0, 1)))
        if merged.data_ptr() != out[:, :, rows].data_ptr():
            out[:, :, rows] = merged.view_as(out[:, :, rows])


def _shortening(steps: Tensor, reach: Tensor) -> Tensor:
    """What to multiply steps [..., D_v] with, so that none is longer than its reach [..., 1]."""
    squares = torch.linalg.vector_norm(steps, dim=-1, keepdim=True).square_().add_(reach.square())
    shortened: Tensor = reach * squares.clamp_(min=torch.finfo(squares.dtype).tiny).rsqrt_()
    return shortened


def _log2_mass(q: Tensor, variance: Tensor) -> Tensor:
    """What varied scores add to the mass of a block, as a power of two: [B, H, rows, nK]."""
    squares = q.square().sum(-1, keepdim=True).mul_(_LOG2_E / 2)
    return (squares * variance[:, :, None]).clamp_(max=MOST_BIAS * _LOG2_E)


def _room(x: Tensor) -> int:
    """Bytes that exist at a time beside what is kept: a processor is fast as long as they stay in its cache."""
    return _CACHE_BYTES if x.device.type == "cpu" else _DEVICE_BYTES


def _strips(q: Tensor, q_block: int, kv_blocks: int) -> Iterator[tuple[slice, slice]]:
    """Whole query blocks and their rows, as many as there is room for; a ragged last block comes alone."""
    batch, heads, length, dim = q.shape
    whole = length // q_block * q_block
    for rows in strips(whole, 4 * batch * heads * (2 * dim + kv_blocks), _room(q), q_block):
        yield slice(rows.start // q_block, rows.stop // q_block), rows
    if whole < length:
        yield slice(whole // q_block, whole // q_block + 1), slice(whole, length)


def summary_error(q: Tensor, summaries: Summaries, q_block: int, scale: float) -> Tensor:
    """Estimated error of each tile's summary, [B, H, nQ, nK], a few rows of blocks at a time."""
    keys, moments = summaries.key, (summaries.steepness, summaries.variance, summaries.spread)
    steepness, variance, spread = (x for x in moments if x is not None)
    flat = keys.flatten(0, 1).mul(scale * _LOG2_E).mT  # [B * H, D, nK]
    bias = summaries.log_count.clamp(min=NOWHERE).mul(_LOG2_E).expand(keys.shape[:3]).flatten(0, 1)[:, None]
    found = []
    for blocks, rows in _strips(q, q_block, keys.shape[2]):
        queries = q[:, :, rows].to(keys.dtype).flatten(0, 1)
        squares = queries.square().sum(-1, keepdim=True)  # [B * H, rows, 1]
        scores = torch.baddbmm(bias, queries, flat)  # powers of two
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp2_()
        once = squares / weights.sum(-1, keepdim=True).square_()
        rowwise = torch.cat((once, once * squares), -1).unflatten(1, (blocks.stop - blocks.start, -1))
        sums = rowwise.mT @ weights.square_().unflatten(1, rowwise.shape[1:3])  # [B * H, blocks, 2, nK]
        found.append(sums)
    first, second = torch.cat(found, 1).unflatten(0, keys.shape[:2]).unbind(3)
    curved = variance * spread / 2
    error: Tensor = first * steepness.square()[:, :, None] + second * curved.square()[:, :, None]
    return error.sqrt()


def block_means(x: Tensor, block: int, key_mask: Tensor | None = None) -> Tensor:
    """Mean of the rows of each block.

    Args:
        x: [B, H, N, D].
        block: in tokens; the last may be ragged.
        key_mask: bool [B, N] or [B, H, N], rows that count.

    Returns:
        [B, H, nK, D] of x's dtype; 0 where no row counts.
    """
    return _means(x, x[..., :0], block, key_mask).key.to(x.dtype)


def spread(x: Tensor, block: int, key_mask: Tensor | None = None) -> Tensor:
    """How far the rows of each block lie from their mean: the root of their mean square distance.

    Args as in `block_means`; returns float32 or better [B, H, nK].
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square()  # [B, H, N, 1], x is not copied
    of = _means(x, squares, block, key_mask)
    return (of.value[..., 0] - of.key.square().sum(-1)).clamp(min=0).sqrt()


def _sums(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] -> [B, H, nK, D], accumulated in float32 or better, without a copy of the whole."""
    exact, whole = torch.promote_types(x.dtype, torch.float32), x.shape[2] // block * block
    sums = x[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=exact) if whole else x[:, :, :0].to(exact)
    if whole == x.shape[2]:
        return sums
    return torch.cat([sums, x[:, :, whole:].sum(2, keepdim=True, dtype=exact)], 2)
