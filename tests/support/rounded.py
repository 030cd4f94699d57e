"""Attention in eight bits as plain torch has it: rounded, multiplied in float64."""

from __future__ import annotations

import torch
from torch import Tensor

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
    scores = (scores * scale).masked_fill(~allowed, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top.isneginf(), 0)).exp()
    total = weights.sum(-1, keepdim=True)
    if values_in != "plain":
        one = {"int8": 127.0, "fp8": 256.0}[values_in]
        weights = to_nearest(weights * one, values_in) / one
        largest = v.abs().amax(2, keepdim=True) / LIMITS[values_in]
        v = to_nearest(v / largest, values_in) * largest
    return weights @ v / total.masked_fill(total == 0, 1), scores.logsumexp(-1)
