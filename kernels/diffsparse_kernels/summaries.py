"""Stand-ins for dropped blocks of keys: their means, and how the values vary with the keys about these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from diffsparse_kernels.case import Summary
from diffsparse_kernels.lists import BlockLists, blocks_of
from diffsparse_kernels.masks import NEVER, each_head, fold_heads, is_bias, shown
from diffsparse_kernels.strips import room, strips

SUMMARIES: tuple[Summary, ...] = get_args(Summary)

_LOG2_E = math.log2(math.e)
_KEPT_BYTES, _DEVICE_KEPT_BYTES = 64 * 2**20, 512 * 2**20  # slopes that are kept, by a processor and on a device
MOST_BIAS = 3.0  # beyond, a few keys hold the mass of a block, and the scores are no normal distribution
Part = tuple[slice, slice]  # samples, heads
REACH = 0.5  # of a step to first order, in spreads of the values
NOWHERE = -1e30  # log count of a block without keys, where -inf would give NaN


class Summaries(NamedTuple):
    """What stands for each block of n keys, in float32 or better; on a device what is multiplied is in the keys' dtype.

    By "means" a block counts to a query q as n keys with the mean key and the mean value: n * exp(q . key * scale).
    "first-order" adds what varies about the means. Scores with the variance |q|^2 t raise the mass of the block by
    exp(|q|^2 t / 2), if they are a normal distribution; and the softmax within the block moves its value by q H, to
    first order in the scores. All dropped blocks of a query block share one matrix, the mean of their H by the weights
    that its mean query gives them: it costs next to nothing, and keeps nearly all that one for each row would gain.
    Where scores vary by more than about 1, first order overshoots: a weighted mean stays among the values. So no step
    q H gets longer than half of the values' spread s, mixed as H is: it is shortened to q H / sqrt(1 + |2 q H / s|^2).
    A key whose mask is a bias b counts exp(b) times: n is the sum of these weights, and all means are weighted by them.
    Means are PISA's (arXiv 2602.01077) and Sol-Attn's (2607.24027), one H for all blocks is PISA's; the matrix of each
    query block and the bound are ours.

    Attributes:
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
        """Whether each query block mixes the slopes of the blocks; not where several have one."""
        return self.by == "first-order" and (self.slope is None or self.slope.shape[2] == self.key.shape[2])

    def by_head(self) -> Summaries:
        """The same for heads that stand as samples of one head, [B * H, 1, ...]."""
        return self._each(lambda x: fold_heads(x)[0])

    def part(self, part: Part) -> Summaries:
        """The same for some samples and heads."""
        return self._each(lambda x: x[part])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Summaries:
        wide = self._replace(log_count=self.log_count.expand(self.key.shape[:3]))
        return Summaries._make(None if x is None else change(x) for x in wide)


def summarise(k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None, by: Summary) -> Summaries:
    """Summaries over the real keys of each block; a ragged last block has fewer."""
    if by == "first-order":
        return first_order(k, v, block, scale, key_mask)
    means, dtype = _means(k, v, block, key_mask), kept_dtype(k)
    return means._replace(key=means.key.to(dtype), value=means.value.to(dtype))


def keeps_slopes(k: Tensor, v: Tensor, block: int) -> bool:
    """Whether the slopes of all blocks stay from the statistics on until they are mixed.

    At 40 heads of 75,600 tokens they would hold 1.5 GiB, and made again they cost one read of K and V: a hundredth of
    the sparse product.
    """
    numbers = k.shape[0] * k.shape[1] * blocks_of(k.shape[2], block) * k.shape[3] * v.shape[3]
    return numbers * kept_dtype(k).itemsize <= (_KEPT_BYTES if k.device.type == "cpu" else _DEVICE_KEPT_BYTES)


def kept_dtype(k: Tensor) -> torch.dtype:
    """Of mean keys, mean values and slopes."""
    return torch.promote_types(k.dtype, torch.float32) if k.device.type == "cpu" else k.dtype


def first_order(k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None) -> Summaries:
    """`summarise` to first order."""
    means, keeps = _means(k, v, block, key_mask), keeps_slopes(k, v, block)
    found: list[list[Tensor]] = [[], [], [], []]
    for samples, heads in groups(k, v, block):
        part = _varied(k, v, block, scale, key_mask, means, (samples, heads))
        for parts, tensor in zip(found, part if keeps else part[:3], strict=False):
            parts.append(tensor.flatten(0, 1))
    variance, spread, steepness, *slope = (torch.cat(parts).unflatten(0, k.shape[:2]) for parts in found if parts)
    key, value, *slope = (x.to(kept_dtype(k)) for x in (means.key, means.value, *slope))
    return Summaries(key, value, means.log_count, variance, spread, steepness, *slope)


def _means(k: Tensor, v: Tensor, block: int, key_mask: Tensor | None) -> Summaries:
    exact = torch.promote_types(k.dtype, torch.float32)
    if key_mask is None:
        count = _sums(torch.ones(1, 1, k.shape[2], 1, dtype=exact, device=k.device), block)
        key, value = (_sums(x, block) / count for x in (k, v))
        return Summaries(key, value, count[..., 0].log())
    weights = _Weights.of(each_head(key_mask), block, exact)
    k, v = (x.masked_fill(~weights.seen[..., None], 0) for x in (k, v))
    if weights.each is not None:
        k, v = (x * weights.each[..., None] for x in (k, v))
    count = weights.counts(block, exact)  # [B, H|1, nK]
    key, value = (_sums(x, block) / count.clamp(min=1)[..., None] for x in (k, v))
    return Summaries(key, value, count.log() + weights.base)


class _Weights(NamedTuple):
    """How often each key counts, as a key mask has it: exp(base) times what is held here, so that none overflows.

    Attributes:
        seen: bool [B, H|1, N].
        each: [B, H|1, N], the largest of a block 1; None where all that are seen count once.
        base: of each block, [B, H|1, nK], or 0.
    """

    seen: Tensor
    each: Tensor | None = None
    base: Tensor | float = 0.0

    @classmethod
    def of(cls, mask: Tensor, block: int, dtype: torch.dtype) -> _Weights:
        """Those of a mask [B, H|1, N]."""
        if not is_bias(mask):
            return cls(mask)
        bias, padding = mask.to(dtype), -mask.shape[2] % block
        base = torch.nn.functional.pad(bias, (0, padding), value=-torch.inf).unflatten(2, (-1, block)).amax(3)
        base = base.masked_fill(base <= NEVER, 0)
        each = bias.sub(base.repeat_interleave(block, 2)[..., : mask.shape[2]]).exp()
        return cls(shown(mask), each, base)

    def counts(self, block: int, dtype: torch.dtype) -> Tensor:
        """Sums of what is held here over each block, [B, H|1, nK]."""
        return _sums((self.seen.to(dtype) if self.each is None else self.each)[..., None], block)[..., 0]


def _varied(
    k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None, means: Summaries, part: Part
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Variance, spread, steepness and slope of some heads.

    Keys and values are centred first: where they have much in common, their products would cancel.
    """
    counts, weights = means.log_count.exp().expand(k.shape[0], k.shape[1], -1)[part], None
    if key_mask is not None:
        weights = _Weights.of(each_head(key_mask).expand(k.shape[:3])[part], block, counts.dtype)
        counts = weights.counts(block, counts.dtype)
    counts = counts.clamp(min=1)
    keys, values = (
        _centred(x[part], mean[part], block, weights) for x, mean in ((k, means.key), (v, means.value))
    )  # [b, h, nK, n, D]
    slope = (keys.mT @ values).mul_((scale / counts)[..., None, None])
    length, spread, steepness = (torch.linalg.vector_norm(x, dim=(-1, -2)) for x in (keys, values, slope))
    root = k.shape[3] ** -0.5
    return (length * scale * root).square() / counts, spread / counts.sqrt(), steepness * root, slope


def _centred(x: Tensor, mean: Tensor, block: int, weights: _Weights | None) -> Tensor:
    """Distances of rows to the mean of their block, [B, H, nK, block, D]; 0 for masked ones and beyond the last.

    Times the root of their weight, so that products of two are weighted.
    """
    padding, seen = mean.shape[2] * block - x.shape[2], None if weights is None else weights.seen
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
        there = torch.arange(x.shape[2], device=x.device) < x.shape[2] - padding
        seen = there.expand(x.shape[:3]) if seen is None else torch.nn.functional.pad(seen, (0, padding))
    centred: Tensor = x.unflatten(2, (-1, block)) - mean[:, :, :, None]
    if seen is None:
        return centred
    centred.masked_fill_(~seen.unflatten(2, (-1, block))[..., None], 0)
    if weights is None or weights.each is None:
        return centred
    roots = torch.nn.functional.pad(weights.each.sqrt(), (0, padding)).unflatten(2, (-1, block))
    return centred.mul_(roots[..., None])


def groups(k: Tensor, v: Tensor, block: int) -> Iterator[Part]:
    """Samples and heads, as many as have room for the matrices of their blocks, twice, and for their keys and values.

    Flattened and joined, the groups give all heads in order.
    """
    _, _, length, dim = k.shape
    numbers = 2 * blocks_of(length, block) * dim * v.shape[3] + length * (dim + v.shape[3])
    return parts_of(k, numbers * torch.promote_types(k.dtype, torch.float32).itemsize)


def parts_of(x: Tensor, head_bytes: int) -> Iterator[Part]:
    """Samples and heads of x [B, H, ...], as many as there is room for."""
    (batch, heads), most = x.shape[:2], room(x)
    for samples in strips(batch, heads * head_bytes, most):
        for part in strips(heads, (samples.stop - samples.start) * head_bytes, most):
            yield samples, part


class StandIns(NamedTuple):
    """What stands for the blocks outside the lists of one call, as kernels take it into their loop.

    Each such block is one more key of its query block, with the score q . key * scale + log n + min(|q|^2 t / 2, 3) and
    the block's mean value. What all of them hold together moves by one step q H, where there is an H, shortened where
    there is a reach.

    Attributes:
        key: mean key [B, H, nK, D], in float32 or better; on devices in the inputs' dtype, as values and slopes.
        value: mean value [B, H, nK, D_v].
        log_count: log n, [B|1, H|1, nK].
        variance: t, [B, H, nK]; None adds no mass.
        slope: H of each query block, [B, H, nQ, D, D_v], or [B, H, 1, D, D_v], one for all; None moves no values.
        reach: the longest step of each query block, [B, H, nQ]; None sets no bound.
    """

    key: Tensor
    value: Tensor
    log_count: Tensor
    variance: Tensor | None = None
    slope: Tensor | None = None
    reach: Tensor | None = None

    @property
    def by(self) -> Summary:
        """How they stand for their keys."""
        return "means" if self.slope is None else "first-order"

    def rows(self, blocks: slice) -> StandIns:
        """The same for some query blocks."""
        slope, reach = self.slope, self.reach
        if slope is not None and slope.shape[2] > 1:
            slope = slope[:, :, blocks]
        return self._replace(slope=slope, reach=None if reach is None else reach[:, :, blocks])

    def bias(self, lists: BlockLists) -> Tensor:
        """What to add to the scores of the mean keys: log n, and -inf where a block is listed; [B|1, H, nQ, nK]."""
        return self.log_count[:, :, None].masked_fill(lists.to_mask(), -torch.inf)


def stand_ins(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_mask: Tensor | None, summaries: Summaries
) -> StandIns:
    """What stands for the blocks outside the lists. Slopes that were not kept are made again, heads in groups."""
    made = StandIns(*summaries[:4])
    if not summaries.mixed:
        return made._replace(slope=summaries.slope)
    weights, reach = mixing(q, lists, scale, summaries, made.bias(lists))
    slopes = []
    for part in groups(k, v, lists.kv_block):
        some = None if summaries.slope is None else summaries.slope[part]
        if some is None:
            some = _varied(k, v, lists.kv_block, scale, key_mask, summaries, part)[3]
        slopes.append((weights[part].to(some.dtype) @ some.flatten(3)).flatten(0, 1))
    slope = torch.cat(slopes).view(*weights.shape[:3], k.shape[3], v.shape[3])
    return made._replace(slope=slope, reach=reach)


def mixing(
    q: Tensor, lists: BlockLists, scale: float, summaries: Summaries, bias: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weights [B, H, nQ, nK] of the blocks outside the lists as the mean query sees them, and the reach [B, H, nQ].

    0 where none is outside.

    Args:
        bias: of `StandIns`.
    """
    middle = _means(q, q[..., :0], lists.q_block, None).key  # [B, H, nQ, D]
    scores = middle @ summaries.key.to(middle.dtype).mT
    weights = scores.mul_(scale).add_(bias).softmax(-1).nan_to_num_(0)
    if summaries.spread is None:
        return weights, None
    return weights, (weights @ summaries.spread[..., None]).mul_(REACH)[..., 0]


def merge(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, stand_ins: StandIns, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge what stands for the blocks outside the lists into out [B, H, N_q, D_v] and lse, in place -> out, lse.

    Plain torch, a few rows of blocks at a time, so that nothing leaves the cache between its uses. Their weights meet
    those of `out` in one softmax, so their own output, which `merge_attention` would need, never exists.
    """
    bias = stand_ins.bias(lists) * _LOG2_E  # [B|1, H, nQ, nK]
    keys = stand_ins.key.to(bias.dtype).mul(scale * _LOG2_E).mT  # [B, H, D, nK]
    values = stand_ins.value.to(bias.dtype)
    for blocks, rows in _strips(q, lists.q_block, keys.shape[-1]):
        by_block = blocks.stop - blocks.start, -1
        queries = q[:, :, rows].to(keys.dtype)
        scores = queries @ keys  # [B, H, rows, nK], powers of two: torch's exp is slower
        scores.unflatten(2, by_block).add_(bias[:, :, blocks, None])
        if stand_ins.variance is not None:
            scores.add_(_log2_mass(queries, stand_ins.variance))
        theirs = lse[:, :, rows, None] * _LOG2_E
        top = torch.maximum(scores.amax(-1, keepdim=True), theirs)
        top.masked_fill_(top.isneginf(), 0)
        weights, share = scores.sub_(top).exp2_(), theirs.sub_(top).exp2_()
        ours = weights.sum(-1, keepdim=True)
        total = ours + share
        lse[:, :, rows] = (top + total.log2()).div_(_LOG2_E)[..., 0]
        total.masked_fill_(total == 0, 1)
        merged = out[:, :, rows].to(keys.dtype).mul_(share.div_(total)).flatten(0, 1)  # in place where it needs no copy
        merged.baddbmm_(weights.div_(total).flatten(0, 1), values.flatten(0, 1))
        if stand_ins.slope is not None:
            steps = _steps(queries.unflatten(2, by_block), stand_ins.rows(blocks))
            merged.add_(steps.view_as(merged).mul_(ours.div_(total).flatten(0, 1)))
        if merged.data_ptr() != out[:, :, rows].data_ptr():
            out[:, :, rows] = merged.view_as(out[:, :, rows])
    return out, lse


def _steps(queries: Tensor, stand_ins: StandIns) -> Tensor:
    """How far the queries [B, H, b, rows, D] of each block move what the stand-ins hold, [B, H, b, rows, D_v]."""
    steps = queries @ cast(Tensor, stand_ins.slope).to(queries.dtype)
    return steps if stand_ins.reach is None else steps.mul_(_shortening(steps, stand_ins.reach[..., None, None]))


def _shortening(steps: Tensor, reach: Tensor) -> Tensor:
    """What to multiply steps [..., D_v] with, so that none is longer than its reach [..., 1]."""
    squares = torch.linalg.vector_norm(steps, dim=-1, keepdim=True).square_().add_(reach.square())
    shortened: Tensor = reach * squares.clamp_(min=torch.finfo(squares.dtype).tiny).rsqrt_()
    return shortened


def _log2_mass(q: Tensor, variance: Tensor) -> Tensor:
    """What varied scores add to the mass of a block, as a power of two: [B, H, rows, nK]."""
    squares = q.square().sum(-1, keepdim=True).mul_(_LOG2_E / 2)
    return (squares * variance[:, :, None]).clamp_(max=MOST_BIAS * _LOG2_E)


def _strips(q: Tensor, q_block: int, kv_blocks: int) -> Iterator[tuple[slice, slice]]:
    """Whole query blocks and their rows, as many as there is room for; a ragged last block comes alone."""
    batch, heads, length, dim = q.shape
    whole = length // q_block * q_block
    for rows in strips(whole, 4 * batch * heads * (2 * dim + kv_blocks), room(q), q_block):
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
        squares = queries.to(bias.dtype).square().sum(-1, keepdim=True)  # [B * H, rows, 1]
        scores = (queries @ flat).to(bias.dtype).add_(bias)  # powers of two
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
        key_mask: [B, N] or [B, H, N], rows that count, if bool; as float a row counts exp(bias) times.

    Returns:
        [B, H, nK, D] of x's dtype; 0 where no row counts.
    """
    return _means(x, x[..., :0], block, key_mask).key.to(x.dtype)


def spread(x: Tensor, block: int, key_mask: Tensor | None = None) -> Tensor:
    """How far the rows of each block lie from their mean: the root of their mean square distance.

    Args:
        x: [B, H, N, D].
        block: rows of a block; the last may be ragged.
        key_mask: as in `block_means`.

    Returns:
        [B, H, nK], float32 or better.
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
