"""Attention masks of padded text, read as masks over keys."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from diffsparse.orders.layout import Layout
from diffsparse.seam.call import Call, unexpanded
from diffsparse.site.timing import Reading

_MASKED = -1e4  # an additive mask at or below this is what models mean by "never"
_KINDS = "padding", "a bias of keys", "a mask that differs between video rows"
_ROWS = 2  # the kind that no kernel takes
_CHANGED = (
    "an attention mask changed its kind between the steps of a run, from {} to {}, and was noticed a few calls late: "
    "what was computed meanwhile may be wrong"
)


@dataclass(frozen=True)
class KeyMask:
    """A mask over keys.

    Attributes:
        keys: what every video row sees: bool [B, N], True = attend; or float, what is added to scores.
        by_row: text rows have mask rows of their own.
    """

    keys: Tensor
    by_row: bool

    def repair(self, out: Tensor, call: Call, layout: Layout, backend: AttentionBackendName) -> Tensor:
        """Recompute the text rows under their own mask rows: one small dense call for each side."""
        if not self.by_row or call.attn_mask is None:
            return out
        first, last = layout.text_before, layout.text_before + layout.video
        for rows in (slice(0, first), slice(last, layout.tokens)):
            if rows.start < rows.stop:
                part = replace(call, query=call.query[:, :, rows], attn_mask=call.attn_mask[..., rows, :])
                out[:, :, rows] = part.dense(backend)
        return out


class Masks:
    """Reads the masks of a run, which takes their values; no step but a layer's first waits for these.

    Layers that get the same tensor in a step share one reading. From a layer's second step on, the answer may arrive

    Attributes:
        late: until then the mask is taken for what it was in the step before; a warning says where that was wrong.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Hashable, int]] = {}  # by place: form and kind of the last mask
        self._readings: dict[Hashable, tuple[StorageWeakRef, Reading]] = {}  # by tensor, in this step
        self._pending: list[tuple[Hashable, Hashable, Reading]] = []
        self._moment: Hashable = ()

    def clear(self) -> None:
        """Forget all of them."""
        self._known, self._readings, self._pending = {}, {}, []

    def read(
        self, mask: Tensor, batch: int, layout: Layout, place: Hashable, moment: Hashable
    ) -> tuple[KeyMask | None, str | None]:
        """Read a mask as a `KeyMask`, or say why it can't be one.

        Args:
            mask: broadcastable to [B, H, N, N].
            batch: B.
            layout: where the video is among the N tokens.
            place: of the call in the model, the same in all steps.
            moment: a tensor that lives on may change from one to the next, and not within one.
        """
        mask = unexpanded(mask)
        if mask.shape[1] != 1:
            return None, "a mask that differs by head"
        by_row, kind = mask.shape[2] != 1, 0
        if by_row or mask.dtype != torch.bool:  # else it can be nothing but padding
            kind = self._kind(mask, layout, place, moment)
            if kind == _ROWS:
                return None, _KINDS[kind]
        keys = mask[:, 0, layout.text_before if by_row else 0].expand(batch, -1)
        if keys.dtype == torch.bool:
            return KeyMask(keys, by_row), None
        return KeyMask(keys.masked_fill(keys <= _MASKED, -torch.inf) if kind else keys > _MASKED, by_row), None

    def _kind(self, mask: Tensor, layout: Layout, place: Hashable, moment: Hashable) -> int:
        self._collect()
        reading, form = self._reading(mask, layout, moment), (layout, mask.shape, mask.dtype)
        kind = reading.value()
        if kind is None and self._known.get(place, (None,))[0] != form:
            kind = reading.wait()
        if kind is None:
            self._pending.append((place, form, reading))
        else:
            self._known[place] = form, int(kind)
        return self._known[place][1]

    def _reading(self, mask: Tensor, layout: Layout, moment: Hashable) -> Reading:
        if moment != self._moment:
            self._moment, self._readings = moment, {}
        version = None if mask.is_inference() else mask._version
        key = mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, version, layout
        found = self._readings.get(key)
        if found is None or found[0].expired():  # its memory may be another tensor's by now
            found = self._readings[key] = StorageWeakRef(mask.untyped_storage()), Reading(_kind(mask, layout))
        return found[1]

    def _collect(self) -> None:
        """Take in the readings that have arrived, in order."""
        while self._pending and (kind := self._pending[0][2].value()) is not None:
            place, form, _ = self._pending.pop(0)
            (known, before), now = self._known[place], int(kind)
            if known == form and before != now:
                self._known[place] = form, now
                warnings.warn(_CHANGED.format(_KINDS[before], _KINDS[now]), UserWarning, stacklevel=2)


def _kind(mask: Tensor, layout: Layout) -> Tensor:
    """Which of `_KINDS` a mask [B|1, 1, N|1, N] is: 0-dim, where the mask is."""
    rows = mask[:, 0, layout.span] if mask.shape[2] != 1 else mask[:, 0]
    differs = (rows != rows[:, :1]).any()
    if mask.dtype == torch.bool:
        return differs * _ROWS
    return torch.where(differs, _ROWS, ((rows != 0) & (rows > _MASKED)).any().int())
