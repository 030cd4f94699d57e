"""Stand-ins for dropped blocks: one mean key and one mean value for each block of keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffsparse_kernels.lists import BlockLists
from diffsparse_kernels.masks import each_head
from diffsparse_kernels.strips import strips

_LOG2_E = math.log2(math.e)
_STRIP_BYTES = 64 * 2**20  # scores that exist at a time
_CACHE_BYTES = 4 * 2**20  # what stays in the processor's cache


class Means(NamedTuple):
    """A block of n keys counts as n keys at its mean: n * exp(q . mean key * scale), times its mean value.

    key: [B, H, nK, D].
    value: [B, H, nK, D_v].
    log_count: log n, [B|1, H|1, nK], -inf where all keys are masked.
    """

    key: Tensor
    value: Tensor
    log_count: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, block: int, key_mask: Tensor | None) -> Means:
        """Means over the real keys of each block, in float32 or better; a ragged last block has fewer."""
        exact = torch.promote_types(k.dtype, torch.float32)
        if key_mask is None:
            count = _sums(torch.ones(1, 1, k.shape[2], 1, dtype=exact, device=k.device), block)
        else:
            seen = each_head(key_mask)[..., None]  # [B, H|1, N, 1]
            k, v = (x.masked_fill(~seen, 0) for x in (k, v))
            count = _sums(seen.to(exact), block)
        key, value = (_sums(x, block) / count.clamp(min=1) for x in (k, v))
        return cls(key, value, count[..., 0].log())

    def bias(self, lists: BlockLists) -> Tensor:
        """What to add to the scores of the mean keys: log n, and -inf where a block is listed; [B, H, nQ, nK]."""
        return self.log_count[:, :, None].masked_fill(lists.to_mask(), -torch.inf)


def merge_means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge what the means of the blocks outside the lists give into out [B, H, N_q, D_v] and lse, in place.

    Plain torch, a few rows of blocks at a time, so that nothing leaves the cache between its uses. The means' weights
    meet those of `out` in one softmax, so their own output, which `merge_attention` would need, never exists.
    """
    means = Means.of(k, v, lists.kv_block, key_mask)
    bias, keys = means.bias(lists).mul_(_LOG2_E), means.key.mul(scale * _LOG2_E).mT  # [B, H, nQ, nK], [B, H, D, nK]
    for blocks, rows in _strips(q, lists.q_block, keys.shape[-1]):
        scores = q[:, :, rows].to(keys.dtype) @ keys  # [B, H, rows, nK], powers of two: torch's exp is slower
        scores.unflatten(2, (blocks.stop - blocks.start, -1)).add_(bias[:, :, blocks, None])
        theirs = lse[:, :, rows, None] * _LOG2_E
        top = torch.maximum(scores.amax(-1, keepdim=True), theirs)
        top.masked_fill_(top.isneginf(), 0)
        weights, share = scores.sub_(top).exp2_(), theirs.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True).add_(share)
        lse[:, :, rows] = (top + total.log2()).div_(_LOG2_E)[..., 0]
        total.masked_fill_(total == 0, 1)
        merged = out[:, :, rows].to(keys.dtype).mul_(share.div_(total)).flatten(0, 1)  # in place where it needs no copy
        merged.baddbmm_(weights.div_(total).flatten(0, 1), means.value.flatten(0, 1))
        if merged.data_ptr() != out[:, :, rows].data_ptr():
            out[:, :, rows] = merged.view_as(out[:, :, rows])


def _strips(q: Tensor, q_block: int, kv_blocks: int) -> Iterator[tuple[slice, slice]]:
    """Whole query blocks and their rows, as many as fit the cache; a ragged last block comes alone."""
    batch, heads, length, dim = q.shape
    whole = length // q_block * q_block
    for rows in strips(whole, 4 * batch * heads * (2 * dim + kv_blocks), _CACHE_BYTES, q_block):
        yield slice(rows.start // q_block, rows.stop // q_block), rows
    if whole < length:
        yield slice(whole // q_block, whole // q_block + 1), slice(whole, length)


def means_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    q_block: int,
    kv_block: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """`block_mass` as the mean keys have it: the sum over rows of n * exp(q . mean key * scale - lse).

    exp is convex, so no block has less mass than its mean says. The difference is what is lost where `means` stands
    for it. Costs 1 / kv_block of the scores of dense attention.

    Args and returns as in `block_mass`; float32 or better [B, H, nQ, nK].
    """
    means = Means.of(k, k, kv_block, key_mask)
    keys = (means.key * ((q.shape[-1] ** -0.5 if scale is None else scale) * _LOG2_E)).mT  # [B, H, D, nK]
    bias, masses = means.log_count[:, :, None] * _LOG2_E, []
    row_bytes = q.shape[0] * q.shape[1] * keys.shape[-1] * keys.element_size()
    for rows in strips(q.shape[2], row_bytes, _STRIP_BYTES, q_block):
        cached = lse[:, :, rows, None].to(keys.dtype) * _LOG2_E
        cached = cached.masked_fill(~cached.isfinite(), torch.inf)  # such rows count for nothing
        weights = (q[:, :, rows].to(keys.dtype) @ keys + bias - cached).exp2()
        masses.append(_sums(weights, q_block))
    return torch.cat(masses, 2)


def block_means(x: Tensor, block: int, key_mask: Tensor | None = None) -> Tensor:
    """Mean of the rows of each block.

    Args:
        x: [B, H, N, D].
        block: in tokens; the last may be ragged.
        key_mask: bool [B, N] or [B, H, N], rows that count.

    Returns:
        [B, H, nK, D] of x's dtype; 0 where no row counts.
    """
    return Means.of(x, x[..., :0], block, key_mask).key.to(x.dtype)


def spread(x: Tensor, block: int, key_mask: Tensor | None = None) -> Tensor:
    """How far the rows of each block lie from their mean: the root of their mean square distance.

    Args as in `block_means`; returns float32 or better [B, H, nK].
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square()  # [B, H, N, 1], x is not copied
    of = Means.of(x, squares, block, key_mask)
    return (of.value[..., 0] - of.key.square().sum(-1)).clamp(min=0).sqrt()


def _sums(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] -> [B, H, nK, D], accumulated in float32 or better, without a copy of the whole."""
    exact, whole = torch.promote_types(x.dtype, torch.float32), x.shape[2] // block * block
    sums = x[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=exact) if whole else x[:, :, :0].to(exact)
    if whole == x.shape[2]:
        return sums
    return torch.cat([sums, x[:, :, whole:].sum(2, keepdim=True, dtype=exact)], 2)
