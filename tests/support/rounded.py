"""Attention in eight bits as plain torch has it: rounded, multiplied in float64."""

from __future__ import annotations

import torch
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels.case import PRECISIONS
from support import exact
from support.cases import Size, random_mask, uneven
from support.places import Place

SIZES = [
    Size(batch=1, heads=2, q_len=200, kv_len=200, dim=64, q_block=64, kv_block=64),
    Size(batch=2, heads=1, q_len=129, kv_len=257, dim=72, q_block=64, kv_block=128),  # both ends ragged
]
LIMITS = {"int8": 127.0, "fp8": 448.0}


def to_nearest(x: Tensor, kind: str) -> Tensor:
    return x.round() if kind == "int8" else x.float().to(torch.float8_e4m3fn).to(x.dtype)


def by_block(x: Tensor, kind: str, block: int) -> Tensor:
    """[B, H, N, D] with one scale for each block of tokens."""
    parts = []
    for part in x.split(block, 2):
        scale = part.abs().amax((2, 3), keepdim=True).clamp(min=1e-30) / LIMITS[kind]
        parts.append(to_nearest(part / scale, kind) * scale)
    return torch.cat(parts, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    scale: float,
    blocks: tuple[int, int],
    scores_in: str,
    values_in: str,
) -> tuple[Tensor, Tensor]:
    q, k, v = q.double(), k.double(), v.double()
    mean = k.mean(2, keepdim=True)
    scores = by_block(q, scores_in, blocks[0]) @ by_block(k - mean, scores_in, blocks[1]).mT + q @ mean.mT
    scores = exact.masked(scores * scale, allowed)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top.isneginf(), 0)).exp()
    total = weights.sum(-1, keepdim=True)
    if values_in != "plain":
        one = {"int8": 127.0, "fp8": 256.0}[values_in]
        weights = to_nearest(weights * one, values_in) / one
        largest = v.abs().amax(2, keepdim=True) / LIMITS[values_in]
        v = to_nearest(v / largest, values_in) * largest
    return weights @ v / total.masked_fill(total == 0, 1), scores.logsumexp(-1)


def inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that have much in common."""
    q, k, v = size.qkv(dtype)
    return q, k + 2 * torch.randn(size.dim).to(dtype), v


def assert_no_worse_than_rounding(place: Place, size: Size, dtype: torch.dtype, precision: str, masked: str) -> None:
    """The error against float64 is that of rounded inputs and weights, and of what it is stored in."""
    qkv, mask = inputs(size, dtype), random_mask(size)
    mask[0, 0, 0] = False
    keys = {"not": None, "bool": torch.rand(size.batch, size.kv_len) < 0.7, "bias": uneven(size)}[masked]
    out, lse = place(dk.block_sparse_attention, *qkv, size.lists(mask), key_mask=keys, precision=precision)
    allowed = size.allowed(mask, keys)
    want, want_lse = exact.softmax_attention(*qkv, allowed, size.scale)
    kinds = PRECISIONS[precision]
    low, low_lse = attention(*qkv, allowed, size.scale, (size.q_block, size.kv_block), *kinds)
    assert out.dtype == dtype
    # What the integer kernel rounds against the running maximum, and fp8's subnormals, are rounded a little otherwise.
    error, limit = ((x.double() - want).norm() / want.norm() for x in (out, low))
    assert error <= 1.3 * limit + torch.finfo(dtype).eps
    dead = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), dead)
    assert (out[dead] == 0).all()
    error, limit = ((x.double() - want_lse)[~dead].abs().max() for x in (lse, low_lse))
    assert error <= 1.1 * limit + 1e-5
