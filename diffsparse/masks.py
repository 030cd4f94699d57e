"""Attention masks of padded text, read as masks over keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffsparse.layout import Layout

if TYPE_CHECKING:
    from diffusers.models.attention_dispatch import AttentionBackendName

    from diffsparse.run import Call

_MASKED = -1e4  # an additive mask at or below this is what models mean by "never"


@dataclass(frozen=True)
class KeyMask:
    """keys: bool [B, N], True = attend, what every video row sees; by_row: text rows have rows of their own."""

    keys: Tensor
    by_row: bool

    def repair(self, out: Tensor, call: Call, layout: Layout, backend: AttentionBackendName) -> Tensor:
        """Give text rows their own mask rows back: one small dense call for each side."""
        if not self.by_row or call.attn_mask is None:
            return out
        first, last = layout.text_before, layout.text_before + layout.video
        for rows in (slice(0, first), slice(last, layout.tokens)):
            if rows.start < rows.stop:
                part = replace(call, query=call.query[:, :, rows], attn_mask=call.attn_mask[..., rows, :])
                out[:, :, rows] = part.dense(backend)
        return out


def read_mask(
    mask: Tensor, layout: Layout, verdicts: dict[tuple[Any, ...], str | None], key: tuple[Any, ...]
) -> tuple[KeyMask | None, str | None]:
    """Read `mask`, broadcastable to [B, H, N, N], as a `KeyMask`; or else say why it can't be one.

    The check looks at values, which waits for the device: `verdicts` remembers its outcome under `key` for the run.
    """
    mask = mask[(None,) * (4 - mask.ndim)]  # [B|1, H|1, N|1, N]
    if mask.shape[1] != 1:
        return None, "a mask that differs by head"
    by_row = mask.shape[2] != 1
    if key not in verdicts:
        verdicts[key] = _verdict(mask, layout)
    if verdicts[key]:
        return None, verdicts[key]
    row = layout.text_before if by_row else 0
    keys = mask[:, 0, row]
    return KeyMask(keys if keys.dtype == torch.bool else keys > _MASKED, by_row), None


def _verdict(mask: Tensor, layout: Layout) -> str | None:
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask <= _MASKED)).all()):
        return "an additive mask that is more than padding"
    first = layout.text_before
    rows = mask[:, 0, first : first + layout.video] if mask.shape[2] != 1 else mask[:, 0]
    if not bool((rows == rows[:, :1]).all()):
        return "a mask that differs between video rows"
    return None
