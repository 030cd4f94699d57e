"""What an approximation misses, kept in a few bytes a token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffsparse_kernels import Correction


class LowRank(NamedTuple):
    """A residual [B, H, N, D] of rank r for each head; its rows are rounded to eight bits.

    codes: int8 [B, H, N, r].
    scale: bfloat16 [B, H, N, 1], of a row's codes.
    basis: float32 [B, H, r, D], orthonormal.
    """

    codes: Tensor
    scale: Tensor
    basis: Tensor

    @classmethod
    def of(cls, residual: Tensor, rank: int) -> LowRank:
        """The nearest of that rank, from the strongest directions of the rows; a device is waited for, once a layer."""
        exact = residual.float().nan_to_num(0, 0, 0)
        _, directions = torch.linalg.eigh(exact.mT @ exact)  # ascending
        basis = directions[..., -rank:].mT.contiguous()
        rows = exact @ basis.mT
        scale = (rows.abs().amax(-1, keepdim=True) / 127).bfloat16()
        codes = (rows / scale.float().clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
        return cls(codes.to(torch.int8), scale, basis)

    @property
    def rank(self) -> int:
        """Of each head."""
        return self.basis.shape[2]

    @property
    def correction(self) -> Correction:
        """The residual, to be added to an output [B, H, N, D]."""
        return Correction(codes=self.codes, scale=self.scale, by_code=self.basis)


def affordable_rank(most: int, head_bytes: float, tokens: int, head_dim: int) -> int:
    """The highest rank, up to `most`, that keeps a head within `head_bytes`."""
    return max(0, int(min(most, head_dim, (head_bytes - 2 * tokens) / (tokens + 4 * head_dim))))
