"""Probes: query rows computed exactly tell what an approximation still misses, and how to mend it. Ours."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from diffsparse.orders.layout import Layout, kept

FEWEST = 32  # that a fit is worth
_LEAST_CAP = 64
_RIDGES = (0.03, 0.3, 3.0)  # penalties that are tried, for features of unit variance


def probe_count(work: float, tokens: int, head_dim: int) -> int:
    """How many rows are computed exactly: one for each channel, at least 64; fewer, or none, where that is too much.

    work: share of dense attention that they and their fit may take.
    """
    most = min(max(head_dim, _LEAST_CAP), int(work * tokens - head_dim / 2))
    return most if most >= FEWEST else 0


def probe_work(count: int, tokens: int, head_dim: int) -> float:
    """What `count` rows cost, and to apply their fit to all, in dense passes."""
    return (count + head_dim / 2) / tokens if count else 0.0


class Rows(NamedTuple):
    """Which rows are mended.

    probes: int64 [n], evenly spread over them.
    mended: bool [N, 1]; None where all are.
    """

    probes: Tensor
    mended: Tensor | None


@lru_cache(maxsize=16)
@kept
def mended_rows(layout: Layout, q_block: int, count: int, device: torch.device) -> Rows:
    """All rows but those in blocks that hold text, which are computed whole; no probes where there are no others."""
    others = ~layout.text_blocks(q_block).repeat_interleave(q_block)[: layout.tokens]
    places = others.nonzero()[:, 0]
    probes = places[torch.linspace(0, len(places) - 1, min(count, len(places))).long()]
    return Rows(probes.to(device), None if others.all() else others[:, None].to(device))


class Affine(NamedTuple):
    """What is added to rows p of an approximation with features c: p W + c V + b.

    by_output: W [B, H, D, D].
    by_kept: V [B, H, r, D]; None without such features.
    constant: b [B, H, 1, D].
    """

    by_output: Tensor
    by_kept: Tensor | None
    constant: Tensor

    def added_to(self, out: Tensor, kept: Tensor | None) -> Tensor:
        """out [B, H, N, D] and what it misses, in its dtype; kept [B, H, N, r]."""
        rows, dtype = out.flatten(0, 1), out.dtype
        by_output, constant = (x.flatten(0, 1).to(dtype) for x in (self.by_output, self.constant))
        mended = torch.baddbmm(constant, rows, by_output).add_(rows)
        if kept is not None and self.by_kept is not None:
            mended.baddbmm_(kept.flatten(0, 1).to(dtype), self.by_kept.flatten(0, 1).to(dtype))
        return mended.view(out.shape)


def fit(missing: Tensor, out: Tensor, kept: Tensor | None = None, basis: Tensor | None = None) -> Affine:
    """The affine map that predicts best what probe rows miss, for each head of each sample.

    Ridge regression on what the rows got, and on the coefficients of a residual of low rank that was kept, if any. It
    starts from nothing, or from that residual as it is. Which of the two, which penalty, whether a mean alone is added
    or nothing at all: whatever predicts the probes best, each from all others. For n centred rows X and
    A = (X X^T + l I)^-1 the error of one that is left out is l (A y)_i / (l A_ii - 1/n).

    Args:
        missing: exact rows less those of the approximation, [B, H, n, D], as all others float32 or better.
        out: these rows of the approximation, [B, H, n, D].
        kept: these rows' coefficients of the residual, [B, H, n, r].
        basis: of the residual, [B, H, r, D].
    """
    parts = [_standardised(x) for x in (out, kept) if x is not None]
    features = torch.cat([part.rows for part in parts], -1)  # [B, H, n, F]
    starts = [missing] if kept is None or basis is None else [missing, missing - kept @ basis]
    inverses, penalties = _inverses(features)
    found = [_candidates(start, features, inverses, penalties) for start in starts]
    errors, maps, means = (torch.cat(x) for x in zip(*found, strict=True))
    best = errors.argmin(0)  # [B, H]
    by, mean = (x.gather(0, best[None, ..., None, None].expand(1, *x.shape[1:]))[0] for x in (maps, means))
    by_part = [x / part.scale for x, part in zip(by.split([p.rows.shape[-1] for p in parts], 2), parts, strict=True)]
    constant = mean - sum(part.mean @ x for part, x in zip(parts, by_part, strict=True))
    if basis is None:
        return Affine(by_part[0], None, constant)
    from_kept = (best >= len(found[0][0]))[..., None, None]
    return Affine(by_part[0], by_part[1] + from_kept * basis, constant)


class _Standardised(NamedTuple):
    rows: Tensor  # of mean 0, their squares 1 on average, [B, H, n, F]
    mean: Tensor  # [B, H, 1, F]
    scale: Tensor  # [B, H, 1, 1]


def _standardised(x: Tensor) -> _Standardised:
    mean = x.mean(2, keepdim=True)
    scale = (x - mean).square().mean((-2, -1), keepdim=True).sqrt().clamp(min=1e-12)
    return _Standardised((x - mean) / scale, mean, scale)


def _inverses(features: Tensor) -> tuple[Tensor, Tensor]:
    """(X X^T + l I)^-1, [ridges, B, H, n, n], and the penalties l, [ridges, 1, 1, 1]."""
    n = features.shape[2]
    penalties = torch.stack([features.new_full((1, 1, 1), ridge * n) for ridge in _RIDGES])
    eye = torch.eye(n, dtype=features.dtype, device=features.device)
    inverses, _ = torch.linalg.inv_ex(features @ features.mT + penalties[..., None] * eye)  # waits for no device
    return inverses, penalties


def _candidates(missing: Tensor, features: Tensor, inverses: Tensor, penalties: Tensor) -> tuple[Tensor, ...]:
    """Nothing, the mean, each ridge: errors when left out [c, B, H], maps [c, B, H, F, D], means [c, B, H, 1, D]."""
    n = missing.shape[2]
    mean = missing.mean(2, keepdim=True)
    duals = inverses @ (missing - mean)  # [ridges, B, H, n, D]
    unexplained = penalties * inverses.diagonal(dim1=-2, dim2=-1) - 1 / n  # 1 - leverage
    left_out = penalties[..., None] * duals / unexplained.clamp(min=0.05)[..., None]
    errors = torch.stack([missing, (missing - mean) * (n / (n - 1)), *left_out]).square().sum((-2, -1))
    maps = features.mT @ torch.cat([torch.zeros_like(duals[:2]), duals])
    return errors, maps, torch.stack([torch.zeros_like(mean), *[mean] * (1 + len(_RIDGES))])
