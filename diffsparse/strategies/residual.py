"""What an approximation misses, kept in a few bytes a token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffsparse_kernels import Correction

_POWER = 16  # of a matrix of length 1; float32 holds it up to 8000 channels
_ROUNDS = 2


class LowRank(NamedTuple):
    """A residual [B, H, N, D] of rank r for each head; its rows are rounded to eight bits.

    Attributes:
        codes: int8 [B, H, N, r].
        scale: bfloat16 [B, H, N, 1], of a row's codes.
        basis: float32 [B, H, r, D], orthonormal; rows of zeros where there is no residual.
    """

    codes: Tensor
    scale: Tensor
    basis: Tensor

    @classmethod
    def of(cls, residual: Tensor, rank: int) -> LowRank:
        """The nearest of that rank, from the strongest directions of the rows; no device is waited for."""
        exact = residual.float().nan_to_num(0, 0, 0)
        basis = strongest(exact.mT @ exact, rank)
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


def strongest(gram: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, or what holds as much: float32 [B, H, D, D] -> [B, H, count, D].

    Each is the longest row of the 256th power of what those before it leave. Directions that are not told apart by then
    differ in strength by a hundredth or less, and it makes no difference which is taken. About 30 launches for each on
    a device, where `torch.linalg.eigh` asks for 9000 and takes 50 ms (40 heads of 128 channels on an H200).
    """
    gram, tiny = gram.nan_to_num(0, 0, 0), torch.finfo(gram.dtype).tiny
    gram = gram / gram.diagonal(dim1=2, dim2=3).amax(-1).clamp(min=tiny)[..., None, None]  # whose square is a number
    eye = torch.eye(gram.shape[3], dtype=gram.dtype, device=gram.device)
    found = gram.new_zeros(*gram.shape[:2], count, gram.shape[3])
    for number in range(count):
        others = eye - found.mT @ found
        power = others @ (gram @ others)
        for _ in range(_ROUNDS):
            power = torch.linalg.matrix_power(normalize(power.flatten(2), dim=2, eps=tiny).view_as(gram), _POWER)
        longest = power.diagonal(dim1=2, dim2=3).argmax(-1)[..., None, None]
        row = power.gather(2, longest.expand(-1, -1, 1, gram.shape[3])) @ others @ others  # the first may leave noise
        found[:, :, number] = normalize(row, dim=3, eps=tiny)[:, :, 0]
    return found


def affordable_rank(most: int, head_bytes: float, tokens: int, head_dim: int) -> int:
    """The highest rank, up to `most`, that keeps a head within `head_bytes`."""
    return max(0, int(min(most, head_dim, (head_bytes - 2 * tokens) / (tokens + 4 * head_dim))))
