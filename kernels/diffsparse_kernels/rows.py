"""Rows of tokens moved, and put back with what an approximation lacks added to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Correction(NamedTuple):
    """What is added to the rows p of an output: p W + c V + b, with c = codes * scale.

    Attributes:
        by_output: W [B, H, D, D]; None adds nothing of the output.
        constant: b [B, H, 1, D], wherever there is W.
        codes: of each row, int8 [B, H, N, r]; None adds no such product.
        scale: of a row's codes, bfloat16 [B, H, N, 1].
        by_code: V [B, H, r, D].
        rows: bool [N, 1], those that it is added to; None: all.
    """

    by_output: Tensor | None = None
    constant: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    by_code: Tensor | None = None
    rows: Tensor | None = None

    def added_to(self, out: Tensor) -> Tensor:
        """out [B, H, N, D] and this, in its dtype; plain torch."""
        rows, dtype = out.flatten(0, 1), out.dtype
        found = rows
        if self.by_output is not None and self.constant is not None:
            by_output, constant = (x.flatten(0, 1).to(dtype) for x in (self.by_output, self.constant))
            found = torch.baddbmm(constant, rows, by_output).add_(rows)
        if self.codes is not None and self.scale is not None and self.by_code is not None:
            coefficients = decoded(self.codes, self.scale).flatten(0, 1).to(dtype)
            found = torch.baddbmm(found, coefficients, self.by_code.flatten(0, 1).to(dtype))
        found = found.view(out.shape)
        return found if self.rows is None else torch.where(self.rows, found, out)


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes times the scale of their row, in float32 or better."""
    exact = torch.promote_types(codes.dtype if codes.is_floating_point() else scale.dtype, torch.float32)
    return codes.to(exact) * scale.to(exact)


def move_rows(tensors: Sequence[Tensor], orders: Tensor, picked: Tensor) -> list[Tensor]:
    """Rows of each head by number: [B, H, N, D] -> [B, H, M, D], contiguous, one copy.

    Args:
        orders: int64 [orders, M], which row stands at each place.
        picked: int64 [B|1, H|1], the order of each head.
    """
    batch, heads, tokens = tensors[0].shape[:3]
    sample, head = _numbers(batch, heads, orders.device)
    rows, moved = orders[picked], []
    by_head, by_token = (sample * heads + head) * tokens + rows, (sample * tokens + rows) * heads + head
    for x in tensors:
        token_major = x.transpose(1, 2).is_contiguous()
        flat = (x.transpose(1, 2) if token_major else x).reshape(-1, x.shape[3])
        numbers = by_token if token_major else by_head
        moved.append(flat.index_select(0, numbers.flatten()).view(batch, heads, -1, x.shape[3]))
    return moved


def restore_rows(
    x: Tensor, inverses: Tensor | None, picked: Tensor | None, correction: Correction | None = None
) -> Tensor:
    """x [B, H, M, D], corrected, its rows by number: [B, H, N, D], stored as [B, N, H, D].

    Args:
        inverses: int64 [orders, N], which row comes to each place; None leaves them where they are.
        picked: as in `move_rows`.
    """
    x = x if correction is None else correction.added_to(x)
    if inverses is None or picked is None:
        return x
    batch, heads, tokens, dim = x.shape
    sample, head = _numbers(batch, heads, x.device)
    rows = ((sample * heads + head) * tokens + inverses[picked]).transpose(1, 2)  # [B, N, H]
    return x.reshape(-1, dim).index_select(0, rows.flatten()).view(batch, -1, heads, dim).transpose(1, 2)


def _numbers(batch: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the samples, [B, 1, 1], and of the heads, [H, 1]."""
    return torch.arange(batch, device=device)[:, None, None], torch.arange(heads, device=device)[:, None]
