"""The affine map that predicts best what some rows of an approximation lack. Ours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffsparse_kernels.rows import Correction, decoded

RIDGES = (0.03, 0.3, 3.0)  # penalties that are tried, for features of unit variance
LEAST_UNEXPLAINED = 0.05  # of a row by the others


def fit_rows(
    exact: Tensor,
    out: Tensor,
    probes: Tensor,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    basis: Tensor | None = None,
) -> Correction:
    """Plain torch of `functional.fit_rows`."""
    wide = torch.promote_types(out.dtype, torch.float32)
    got = out.index_select(2, probes).to(wide).nan_to_num(0, 0, 0)  # a row that is lost takes no other with it
    missing = (exact.to(wide) - got).nan_to_num(0, 0, 0)
    if codes is None or scale is None or basis is None:
        by_output, _, constant = _fitted(missing, got, None, None)
        return Correction(by_output.to(out.dtype), constant)
    kept = decoded(*(x.index_select(2, probes) for x in (codes, scale))).to(wide)
    by_output, by_code, constant = _fitted(missing, got, kept, basis.to(wide))
    return Correction(by_output.to(out.dtype), constant, codes, scale, by_code)


def _fitted(
    missing: Tensor, out: Tensor, kept: Tensor | None, basis: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """W [B, H, D, D], V [B, H, r, D] and b [B, H, 1, D], of the candidate that predicts best what is missing.

    Args:
        missing: of the probe rows, [B, H, n, D].
        out: of the probe rows, [B, H, n, D].
        kept: their coefficients in `basis`, [B, H, n, r].
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
        return by_part[0], None, constant
    from_kept = (best >= len(found[0][0]))[..., None, None]
    return by_part[0], by_part[1] + from_kept * basis, constant


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
    penalties = torch.stack([features.new_full((1, 1, 1), ridge * n) for ridge in RIDGES])
    eye = torch.eye(n, dtype=features.dtype, device=features.device)
    inverses, _ = torch.linalg.inv_ex(features @ features.mT + penalties[..., None] * eye)  # waits for no device
    return inverses, penalties


def _candidates(missing: Tensor, features: Tensor, inverses: Tensor, penalties: Tensor) -> tuple[Tensor, ...]:
    """Nothing, the mean, each ridge: errors when left out [c, B, H], maps [c, B, H, F, D], means [c, B, H, 1, D]."""
    n = missing.shape[2]
    mean = missing.mean(2, keepdim=True)
    duals = inverses @ (missing - mean)  # [ridges, B, H, n, D]
    unexplained = penalties * inverses.diagonal(dim1=-2, dim2=-1) - 1 / n  # 1 - leverage
    left_out = penalties[..., None] * duals / unexplained.clamp(min=LEAST_UNEXPLAINED)[..., None]
    errors = torch.stack([missing, (missing - mean) * (n / (n - 1)), *left_out]).square().sum((-2, -1))
    maps = features.mT @ torch.cat([torch.zeros_like(duals[:2]), duals])
    return errors, maps, torch.stack([torch.zeros_like(mean), *[mean] * (1 + len(RIDGES))])
