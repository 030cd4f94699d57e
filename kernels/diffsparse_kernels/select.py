"""Which blocks to keep, from their softmax mass. Static shapes, no device sync; of equals the lower number wins."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BINS = 4096
_OCTAVES = 40.0


def select_rows(mass: Tensor, keep: int | Tensor, always: Tensor | None = None) -> Tensor:
    """The `keep` blocks of each query row with the most mass (AdaSpa, arXiv 2502.21079, row-wise selection).

    Args:
        mass: float [..., nQ, nK]; NaN counts as zero.
        keep: blocks a row, an int or an int tensor [...], one number for each head.
        always: bool, broadcastable to mass: blocks that are kept whatever their mass. They take their places first; a
            row that has more of them than `keep` keeps them all.

    Returns:
        bool mask [..., nQ, nK].
    """
    mass = mass.nan_to_num(0.0)
    if always is not None:
        mass = mass.masked_fill(always, torch.inf)
    threshold, keep = _nth_largest(mass, keep)
    above, equal = mass > threshold, mass == threshold
    room = keep - above.sum(-1, keepdim=True)
    mask = above | (equal & (equal.cumsum(-1) <= room))
    return mask if always is None else mask | always


def _nth_largest(mass: Tensor, n: int | Tensor) -> tuple[Tensor, int | Tensor]:
    """The n-th largest of each row [..., nQ, 1], and n as it compares with rows: one number needs no sort."""
    length = mass.shape[-1]
    if isinstance(n, int):
        return mass.kthvalue(length + 1 - min(max(n, 1), length), -1, keepdim=True).values, n
    n = n[..., None, None]
    ranked = mass.sort(-1, descending=True).values
    return ranked.gather(-1, (n - 1).clamp(0, length - 1).expand(*mass.shape[:-1], 1)), n


def select_heads(mass: Tensor, density: float) -> Tensor:
    """The share `density` of each head's blocks with the most mass, by one threshold for the whole head.

    The threshold is an edge of a histogram of 4096 bins over 40 octaves below the head's largest mass, so slightly
    more than `density` may be kept. Every row keeps at least its best block.

    Args:
        mass: float [..., nQ, nK]; NaN counts as zero.
        density: share of blocks to keep, in (0, 1].

    Returns:
        bool mask [..., nQ, nK].
    """
    mass = mass.nan_to_num(0.0).float()
    top = mass.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    level = ((mass / top).log2() / _OCTAVES + 1).clamp(min=0) * (_BINS - 1)
    bins = level.long().flatten(-2)  # [..., nQ * nK]
    counts = torch.zeros(*bins.shape[:-1], _BINS, dtype=torch.int64, device=mass.device)  # float32 stops at 2^24
    counts.scatter_add_(-1, bins, counts.new_ones(()).expand(bins.shape))
    from_top = counts.flip(-1).cumsum(-1).flip(-1)  # blocks in this bin or above
    wanted = math.ceil(round(density * bins.shape[-1], 6))  # 0.7 of 10 is 7, though 0.7 * 10 is a little more
    threshold = (from_top >= wanted).sum(-1, keepdim=True) - 1  # the highest bin that leaves enough
    mask = (bins >= threshold).view(mass.shape)
    return mask.scatter(-1, mass.argmax(-1, keepdim=True), True)


def select_mass(mass: Tensor, share: float) -> Tensor:
    """The fewest blocks of each query row that together hold at least `share` of the row's mass (top-p).

    Args:
        mass: float [..., nQ, nK]; NaN counts as zero.
        share: of the row's mass, in (0, 1].

    Returns:
        bool mask [..., nQ, nK]; a row without mass keeps its first block.
    """
    mass = mass.nan_to_num(0.0)
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    kept = (before < share * ranked.sum(-1, keepdim=True)) & (ranked > 0)
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)
