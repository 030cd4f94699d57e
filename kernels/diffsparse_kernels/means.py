"""Stand-ins for dropped blocks: one mean key and one mean value for each block of keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Means(NamedTuple):
    """A block of n keys counts as n keys at its mean: n * exp(q . mean key * scale), times its mean value.

    key: [B, H, nK, D]. value: [B, H, nK, D_v]. log_count: log n, [B|1, nK], -inf where all keys are masked.
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
            k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
            count = _sums(key_mask[:, None, :, None].to(exact), block)  # [B, 1, nK, 1]
        key, value = (_sums(x, block) / count.clamp(min=1) for x in (k, v))
        return cls(key, value, count[:, 0, :, 0].log())


def _sums(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] -> [B, H, nK, D], accumulated in float32 or better, without a copy of the whole."""
    exact, whole = torch.promote_types(x.dtype, torch.float32), x.shape[2] // block * block
    sums = x[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=exact) if whole else x[:, :, :0].to(exact)
    if whole == x.shape[2]:
        return sums
    return torch.cat([sums, x[:, :, whole:].sum(2, keepdim=True, dtype=exact)], 2)
