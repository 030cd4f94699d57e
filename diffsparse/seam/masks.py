"""Attention masks of padded text, read as masks over keys."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from diffsparse.orders.layout import Layout
from diffsparse.site.timing import Reading

if TYPE_CHECKING:
    from diffusers.models.attention_dispatch import AttentionBackendName

    from diffsparse.seam.call import Call

_MASKED = -1e4  # an additive mask at or below this is what models mean by "never"
_OBSTACLES = None, "an additive mask that is more than padding", "a mask that differs between video rows"
_CHANGED = (
    "an attention mask changed its kind between the steps of a run, from {} to {}, and was noticed a few calls late: "
    "what was computed meanwhile may be wrong"
)


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


class Masks:
    """Reads the masks of a run. What a mask is, its values tell, and no step but a layer's first waits for these.

    Layers that get the same tensor in a step share one look at it. From a layer's second step on, a device answers
    late: until then the mask is taken for what it was; where that was wrong, a warning says so.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[Any, str | None]] = {}  # by place: the last mask's form and obstacle
        self._looks: dict[tuple[Any, ...], tuple[StorageWeakRef, Reading]] = {}  # by tensor, in this step
        self._open: list[tuple[tuple[Any, ...], Any, Reading]] = []
        self._moment: tuple[Any, ...] = ()

    def clear(self) -> None:
        """Forget all of them."""
        self._known, self._looks, self._open = {}, {}, []

    def read(
        self, mask: Tensor, batch: int, layout: Layout, place: tuple[Any, ...], moment: tuple[Any, ...]
    ) -> tuple[KeyMask | None, str | None]:
        """Read `mask`, broadcastable to [B, H, N, N], as a `KeyMask`; or else say why it can't be one.

        place: of the call in the model, the same in all steps. moment: in which a tensor that stays does not change.
        """
        mask = mask[(None,) * (4 - mask.ndim)]  # [B|1, H|1, N|1, N]
        if mask.shape[1] != 1:
            return None, "a mask that differs by head"
        by_row = mask.shape[2] != 1
        if by_row or mask.dtype != torch.bool:  # else it can be nothing but padding
            obstacle = self._obstacle(mask, layout, place, moment)
            if obstacle:
                return None, obstacle
        keys = mask[:, 0, layout.text_before if by_row else 0].expand(batch, -1)
        return KeyMask(keys if keys.dtype == torch.bool else keys > _MASKED, by_row), None

    def _obstacle(self, mask: Tensor, layout: Layout, place: tuple[Any, ...], moment: tuple[Any, ...]) -> str | None:
        self._settle()
        reading, form = self._look(mask, layout, moment), (layout, mask.shape, mask.dtype)
        kind = reading.value()
        if kind is None and self._known.get(place, (None,))[0] != form:
            kind = reading.wait()
        if kind is None:
            self._open.append((place, form, reading))
        else:
            self._known[place] = form, _OBSTACLES[int(kind)]
        return self._known[place][1]

    def _look(self, mask: Tensor, layout: Layout, moment: tuple[Any, ...]) -> Reading:
        if moment != self._moment:
            self._moment, self._looks = moment, {}
        version = None if mask.is_inference() else mask._version
        key = mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, version, layout
        found = self._looks.get(key)
        if found is None or found[0].expired():  # its memory may be another's by now
            found = self._looks[key] = StorageWeakRef(mask.untyped_storage()), Reading(_kind(mask, layout))
        return found[1]

    def _settle(self) -> None:
        """Take note of what has arrived."""
        while self._open and (kind := self._open[0][2].value()) is not None:
            place, form, _ = self._open.pop(0)
            (known, before), now = self._known[place], _OBSTACLES[int(kind)]
            if known == form and before != now:
                self._known[place] = form, now
                warnings.warn(_CHANGED.format(before or "padding", now or "padding"), UserWarning, stacklevel=2)


def _kind(mask: Tensor, layout: Layout) -> Tensor:
    """Which of `_OBSTACLES` a mask [B|1, 1, N|1, N] is: 0-dim, where the mask is."""
    rows = mask[:, 0, layout.span] if mask.shape[2] != 1 else mask[:, 0]
    differs = (rows != rows[:, :1]).any() * 2
    if mask.dtype == torch.bool:
        return differs
    return torch.where(((mask != 0) & (mask > _MASKED)).any(), 1, differs)
