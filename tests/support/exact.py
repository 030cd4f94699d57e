"""Plain float64 attention, element by element as the textbook has it: the oracle of the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor


def masked(scores: Tensor, allowed: Tensor) -> Tensor:
    """Scores with what hides keys, bool, or with what is added to them, in their dtype."""
    if allowed.dtype == torch.bool:
        return scores.masked_fill(~allowed, -torch.inf)
    return (scores + allowed).to(scores.dtype)


def element_mask(blocks: Tensor, q_block: int, kv_block: int, q_len: int, kv_len: int) -> Tensor:
    """Block mask [B, H, nQ, nK] -> token mask [B, H, N_q, N_kv]."""
    return blocks.repeat_interleave(q_block, 2).repeat_interleave(kv_block, 3)[:, :, :q_len, :kv_len]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and LSE in float64; rows without any allowed key give 0 and -inf."""
    scores = masked(q.double() @ k.double().mT * scale, allowed)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()
    return weights @ v.double(), lse


def eager(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """The same in the inputs' own number format, every step rounded: what a tolerance is made of."""
    scores = masked(q @ k.mT * scale, allowed)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights @ v


def tile_sums(weights: Tensor, q_block: int, kv_block: int) -> Tensor:
    """Sum of weights [B, H, N_q, N_kv] in each tile, by a loop over tiles."""
    rows = [
        torch.stack([tile.sum((-2, -1)) for tile in strip.split(kv_block, -1)], -1)
        for strip in weights.split(q_block, -2)
    ]
    return torch.stack(rows, -2)


def tolerance(exact: Tensor, low: Tensor) -> float:
    """Twice the error of the low-precision computation, and one rounding of the largest value."""
    error = (low.double() - exact).abs().max().item()
    return 2 * error + torch.finfo(low.dtype).eps * max(1.0, exact.abs().max().item())
