"""Attention in 8 or 4 bits, emulated: the numbers that such a kernel would give, in plain torch, and no faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse_kernels.backend.reference import _join, _strips
from diffsparse_kernels.errors import KernelInputError
from diffsparse_kernels.functional import _check, _check_lists, _scale
from diffsparse_kernels.lists import BlockLists, blocks_of
from diffsparse_kernels.masks import each_head
from diffsparse_kernels.ops import merge_means


def quantise(x: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Symmetric whole numbers with one scale for each block of rows (PAROAttention, arXiv 2506.16054).

    The scale of a block is its largest magnitude over 2^(bits - 1) - 1.

    Args:
        x: [..., N, D]. bits: from 2 to 8. block: rows that share a scale; the last block may be ragged.

    Returns:
        int8 [..., N, D], and scales [..., N, 1], equal within a block: float32, or float64 as x.

    Raises:
        KernelInputError: bits out of range.
    """
    if bits not in range(2, 9):
        raise KernelInputError(f"wanted 2 to 8 bits; got {bits!r}")
    x = _exact(x)
    top = _blocks(x.abs(), block).amax((-2, -1))  # [..., n]
    scale = _safe(top / _levels(bits)).repeat_interleave(block, -1)[..., : x.shape[-2], None]
    return (x / scale).round().to(torch.int8), scale


def incoherence(x: Tensor, block: int) -> Tensor:
    """max |x| / mean |x| of each block of rows of x [..., N, D], float [..., n]: how much of its range is wasted."""
    size = _exact(x).abs()
    rows = _blocks(torch.ones_like(size[..., :1]), block).sum((-2, -1))  # without those that pad the last block
    blocks = _blocks(size, block)
    return blocks.amax((-2, -1)) / _safe(blocks.sum((-2, -1)) / (rows * x.shape[-1]))


def quantised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    bits: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    means: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks whose two products are of whole numbers (arXiv 2506.16054).

    Queries, keys and values have a scale for each block; the softmax weights, taken against the maximum of their row,
    have one for each tile. Sums of the weights, and all that is accumulated, stay float32 (float64 for
    float64 inputs). The products of the rescaled numbers are those of the whole numbers up to rounding.

    Args and returns as in `block_sparse_attention`; bits: 8 or 4, or any number from 2 to 8. Means are not rounded.
    """
    _check(q, k, v, key_mask)
    _check_lists(q, k, lists)
    numbers, steps = quantise(q, bits, lists.q_block)
    q_rounded = numbers * steps * _scale(q, scale)
    k_rounded, v_rounded = (number * step for number, step in (quantise(x, bits, lists.kv_block) for x in (k, v)))
    mask, parts = lists.to_mask(), []
    for rows in _strips(q, k, lists.q_block):
        scores = q_rounded[:, :, rows] @ k_rounded.mT  # [B, H, rows, N_kv]
        blocks = mask[:, :, rows.start // lists.q_block : blocks_of(rows.stop, lists.q_block)]
        seen = blocks.repeat_interleave(lists.q_block, 2)[:, :, : scores.shape[2]]
        seen = seen.repeat_interleave(lists.kv_block, 3)[..., : scores.shape[3]]
        seen = seen if key_mask is None else seen & each_head(key_mask)[:, :, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top.masked_fill(top.isneginf(), 0)).exp()
        total = weights.sum(-1, keepdim=True)
        out = _rounded_tiles(weights, bits, lists) @ v_rounded / total.masked_fill(total == 0, 1)
        parts.append((out, (top + total.log())[..., 0]))
    out, lse = _join(parts, q)
    if means:
        merge_means(q, k, v, lists, _scale(q, scale), key_mask, out, lse)
    return out, lse


def _rounded_tiles(weights: Tensor, bits: int, lists: BlockLists) -> Tensor:
    """Weights [B, H, rows, N_kv] rounded to their tile's steps."""
    padding = (0, -weights.shape[3] % lists.kv_block, 0, -weights.shape[2] % lists.q_block)
    tiles = F.pad(weights, padding).unflatten(3, (-1, lists.kv_block)).unflatten(2, (-1, lists.q_block))
    step = _safe(tiles.amax((3, 5), keepdim=True) / _levels(bits))  # [B, H, nQ, 1, nK, 1]
    rounded: Tensor = (tiles / step).round().mul(step).flatten(4).flatten(2, 3)
    return rounded[:, :, : weights.shape[2], : weights.shape[3]]


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., N, D] -> [..., n, block, D], the last block filled with zeros."""
    blocks: Tensor = F.pad(x, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))
    return blocks


def _levels(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _safe(x: Tensor) -> Tensor:
    """A divisor that is never zero."""
    return x.clamp(min=torch.finfo(torch.float32).tiny)
