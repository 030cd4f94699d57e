"""Attention in 2 to 8 bits, emulated: the numbers that such a kernel would give, in plain torch, and no faster.

Sums of the weights, and all that is accumulated, stay float32 (float64 for float64 inputs). The products of the
rescaled numbers are those of the rounded ones up to rounding. Any dtype, device and size will do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse_kernels.case import FORMATS, PRECISIONS
from diffsparse_kernels.catalog import load
from diffsparse_kernels.checks import check_bits
from diffsparse_kernels.lists import BlockLists
from diffsparse_kernels.masks import masked
from diffsparse_kernels.strips import joined, strips

_STRIP_BYTES = 256 * 2**20  # scores of one strip of query rows


def quantise(x: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Symmetric whole numbers with one scale for each block of rows (PAROAttention, arXiv 2506.16054).

    The scale of a block is its largest magnitude over 2^(bits - 1) - 1.

    Args:
        x: [..., N, D].
        bits: from 2 to 8.
        block: rows that share a scale; the last block may be ragged.

    Returns:
        Whole numbers, int8 [..., N, D], and scales [..., N, 1], equal within a block, float32 (float64 for float64 x).

    Raises:
        KernelInputError: bits out of range.
    """
    check_bits(bits)
    x = _exact(x)
    top = _blocks(x.abs(), block).amax((-2, -1))  # [..., n]
    scale = _safe(top / _levels(bits)).repeat_interleave(block, -1)[..., : x.shape[-2], None]
    return (x / scale).round().to(torch.int8), scale


def incoherence(x: Tensor, block: int) -> Tensor:
    """max |x| / mean |x| of each block of rows: how much of its range is wasted (PAROAttention, arXiv 2506.16054).

    Args:
        x: [..., N, D].
        block: rows of a block; the last block may be ragged.

    Returns:
        [..., n], float32 or better.
    """
    size = _exact(x).abs()
    rows = _blocks(torch.ones_like(size[..., :1]), block).sum((-2, -1))  # without those that pad the last block
    blocks = _blocks(size, block)
    return blocks.amax((-2, -1)) / _safe(blocks.sum((-2, -1)) / (rows * x.shape[-1]))


def quantised_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_mask: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks in whole numbers -> out, lse; the key mask is [B, N_kv] or [B, H, N_kv].

    Queries, keys and values have a scale for each block; the softmax weights, taken against the maximum of their row,
    have one for each tile.
    """
    numbers, steps = quantise(q, bits, lists.q_block)
    keys, values = (number * step for number, step in (quantise(x, bits, lists.kv_block) for x in (k, v)))
    rounded = partial(_rounded_tiles, bits=bits, lists=lists)
    out, lse = _attend(numbers * steps * scale, keys, values, lists, key_mask, rounded)
    return out.to(q.dtype), lse


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """The same in eight bits, rounded as `triton.eight_bits` rounds; weights of "plain" values are not."""
    scores_in, values_in = PRECISIONS[precision]
    queries, keys, values = map(_exact, (q, k, v))
    mean = keys.mean(2, keepdim=True)
    shift = (queries @ mean.mT)[..., 0] * scale
    queries, keys = (_by_block(queries, lists.q_block, scores_in), _by_block(keys - mean, lists.kv_block, scores_in))
    if values_in == "plain":  # then any kernel can do the rest
        own = load("cpu" if q.device.type == "cpu" else "reference")
        out, lse = own.block_sparse_attention(queries, keys, values, lists, scale, key_mask)
    else:
        values = _nearest(values, values.abs().amax(2, keepdim=True), values_in)
        rounded = partial(_rounded_weights, kind=values_in)
        out, lse = _attend(queries * scale, keys, values, lists, key_mask, rounded)
    return out.to(q.dtype), lse + shift


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    key_mask: Tensor | None,
    rounded: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries -> out, lse; `rounded` is given weights [B, H, rows, N_kv] of at most 1."""
    mask, parts = lists.to_mask(), []
    row_bytes = q.shape[0] * q.shape[1] * k.shape[2] * 8
    for rows in strips(q.shape[2], row_bytes, _STRIP_BYTES, lists.q_block):
        scores = q[:, :, rows] @ k.mT  # [B, H, rows, N_kv]
        scores = scores.masked_fill(~lists.to_token_mask(rows, mask), -torch.inf)
        scores = scores if key_mask is None else masked(scores, key_mask)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top.masked_fill(top.isneginf(), 0)).exp()
        total = weights.sum(-1, keepdim=True)
        out = rounded(weights) @ v / total.masked_fill(total == 0, 1)
        parts.append((out, (top + total.log())[..., 0]))
    return joined(parts, q.dtype)


def _by_block(x: Tensor, block: int, kind: str) -> Tensor:
    """x [B, H, N, D] in eight bits, with one scale for each block of rows, and back."""
    largest = _blocks(x.abs(), block).amax((-2, -1)).repeat_interleave(block, -1)[..., : x.shape[-2], None]
    return _nearest(x, largest, kind)


def _nearest(x: Tensor, largest: Tensor, kind: str) -> Tensor:
    """x in eight bits, whose range ends at `largest`, and back."""
    scale = (largest / FORMATS[kind].largest).clamp(min=1e-30)
    return _eight_bits(x / scale, kind) * scale


def _rounded_weights(weights: Tensor, kind: str) -> Tensor:
    """Softmax weights in eight bits, and back."""
    return _eight_bits(weights * FORMATS[kind].one, kind) / FORMATS[kind].one


def _eight_bits(x: Tensor, kind: str) -> Tensor:
    """To the nearest number of this format; of two whole ones as near the higher, as the kernel has it."""
    return (x + 0.5).floor() if kind == "int8" else x.to(FORMATS[kind].dtype).to(x.dtype)


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
