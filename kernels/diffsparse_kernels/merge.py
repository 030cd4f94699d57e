"""Merge attention to two disjoint sets of keys into attention to both, by their log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the union of two disjoint sets of keys, from the attention to each.

    out = (exp(lse) out + exp(other_lse) other) / (exp(lse) + exp(other_lse)), without overflow.

    Args:
        out: [B, H, N, D_v], any float dtype.
        lse: [B, H, N], natural logarithm, float32 or float64; -inf where a query saw no key.
        other: as `out`; it may be of another dtype.
        other_lse: as `lse`.

    Returns:
        The merged output in the dtype of `out`, and its LSE. A query that saw no key in either gets 0 and -inf.
    """
    both = torch.logaddexp(lse, other_lse)
    base = both.masked_fill(both.isneginf(), 0)
    theirs, ours = ((x - base).exp()[..., None] for x in (other_lse, lse))
    return (ours * out + theirs * other).to(out.dtype), both
