"""One attention call as a strategy sees it: where it is, what it may remember, and how it may compute."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import diffsparse_kernels as kernels
from diffsparse.errors import DenseFallbackError
from diffsparse.orders.layout import Layout
from diffsparse.orders.order import HeadOrders, text_last
from diffsparse.site.report import CallRecord, Reading
from diffsparse.site.shard import WHOLE, Shard
from diffsparse.strategies.work import MASS_PASS

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Look = Callable[[torch.Tensor, torch.Tensor, kernels.BlockLists, torch.Tensor | None], None]


@dataclass
class Site:
    """The place of one self-attention call, given to `Strategy.attend(q, k, v, site)`.

    q, k, v are [B, H, N, D] after rotary embedding; `layout` tells which of the N tokens lie on the grid, `key_mask`
    which may be attended to: bool [B, N], or [B, H, N] where the tokens stand in an order that differs by head.
    `model` is the transformer's name in the pipeline, `layer` the attention module's in the transformer.
    The model has `layers` such modules. H counts this rank's heads; `shard` is their place among those of all ranks.
    `step` counts denoising steps from 0; `steps` is None if nobody knows the length of the run. `branch` names the
    guidance branch. `memory` is a dict that starts empty for each run x layer x branch and lasts to its end.
    """

    model: str
    layer: str
    index: int
    step: int
    steps: int | None
    branch: str
    layout: Layout
    memory: dict[str, Any]
    scale: float | None = None
    key_mask: torch.Tensor | None = None
    strict: bool = False
    layers: int = 1
    shard: Shard = WHOLE
    _dense: Attend = field(repr=False, kw_only=True)
    _backend: str = field(repr=False, kw_only=True)
    _record: CallRecord = field(repr=False, kw_only=True)
    _look: Look | None = field(default=None, repr=False, kw_only=True)

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, reason: str = "strategy") -> torch.Tensor:
        """Dense attention on the user's own backend; `reason` goes into the report as a planned dense call."""
        self._record.ran_dense(reason, planned=True, backend=self._backend)
        return self._dense(q, k, v)

    def dense_with_lse(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention and its log-sum-exp, float32 [B, H, N]."""
        self._ran_search(q, k, v, self.key_mask)
        return kernels.attention(q, k, v, scale=self.scale, key_mask=self.key_mask)

    def dense_with_mass(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Dense attention, its log-sum-exp and the `block_mass` that goes with it: a fused search."""
        self._ran_search(q, k, v, self.key_mask)
        self._record.beside += MASS_PASS
        return kernels.attention_with_mass(
            q, k, v, q_block=block, kv_block=block, scale=self.scale, key_mask=self.key_mask
        )

    def block_mass(self, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, block: int) -> torch.Tensor:
        """Sum of exp(score - lse) over each tile, float32 [B, H, nQ, nK]; `lse` may be of an earlier step."""
        self._record.beside += MASS_PASS
        return kernels.block_mass(q, k, lse, q_block=block, kv_block=block, scale=self.scale, key_mask=self.key_mask)

    def means_mass(self, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, block: int) -> torch.Tensor:
        """`block_mass` as the mean keys of the blocks would have it: never more, but for rounding."""
        self._record.beside += MASS_PASS / block
        return kernels.means_mass(q, k, lse, q_block=block, kv_block=block, scale=self.scale, key_mask=self.key_mask)

    def text_last(self) -> Site:
        """This call as one whose text comes after the video: what `order.HeadOrders` makes of it."""
        text = self.layout.tokens - self.layout.video
        keys = None if self.key_mask is None else text_last(self.key_mask, self.layout)
        return replace(self, layout=replace(self.layout.grid, text_after=text), key_mask=keys)

    def found(self, recall: torch.Tensor) -> None:
        """Report the share of the softmax mass that the chosen blocks hold, any shape."""
        self._record.searched(recall)

    def chose(self, modes: list[str]) -> None:
        """Report by name what each head does."""
        self._record.heads = tuple(modes)

    def note(self, text: str) -> None:
        """Report what the user should know; equal notes are shown once."""
        self._record.note = text

    def sparse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lists: kernels.BlockLists,
        *,
        orders: HeadOrders | None = None,
        boxes: kernels.Boxes | None = None,
        heads: int | None = None,
        bits: int = 16,
        means: bool = False,
        plus: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Block-sparse attention over `lists`; dense, with the reason reported, where that is faster.

        orders: in which the lists count the tokens, if not as they stand; the output stands as q does.
        boxes: hide keys token by token within the listed blocks; of the moved tokens too.
        heads: of the whole call, where q, k, v are a part of them and the others ran dense; for the report.
        bits: 8 or 4: of the numbers multiplied, emulated and so never faster; 16 leaves them as they are.
        means: let dropped blocks stand as their mean keys and values.
        plus: [B, H, N, D], added to the output of the tokens as the lists count them, unless the call runs dense.
        """
        density = self._computed(lists)
        masked = self.key_mask is not None
        limit = kernels.break_even(q.device, q.dtype, q.shape[-1], lists.kv_block, q.shape[2], masked)
        known = self._known_density(lists, density)
        if bits == 16 and known is not None and known > limit:
            return self.fall_back(q, k, v, f"density above the break-even of {limit:.2f}")
        computed = self._computed(lists, means)
        overall = computed if heads is None else 1 - (1 - computed) * q.shape[1] / heads
        keys = self.key_mask
        if orders is not None:
            (q, k, v), keys = (orders.apply(x) for x in (q, k, v)), orders.keys(keys)
        if bits < 16:
            kernel = kernels.Choice(f"int{bits} emulated")
        else:
            kernel = kernels.kernel_for(q, k, v, lists, key_mask=keys, boxes=boxes)
        self._record.ran_sparse(overall, kernel.name, kernel.passed_over)
        if keys is not None:
            keys = keys.expand(len(q), *keys.shape[1:])
        if self._look is not None:
            self._look(q, k, lists, keys)
        out, _ = self._product(q, k, v, lists, bits=bits, boxes=boxes, key_mask=keys, means=means)
        if plus is not None:
            out.add_(plus)
        return out if orders is None else orders.undo(out)

    def product(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: kernels.BlockLists, *, means: bool = False
    ) -> torch.Tensor:
        """What `sparse` would give, where that is not the call's output: never dense, and work beside the call's."""
        self._record.beside += self._computed(lists, means)
        return self._product(q, k, v, lists, bits=16, boxes=None, key_mask=self.key_mask, means=means)[0]

    def _computed(self, lists: kernels.BlockLists, means: bool = False) -> torch.Tensor:
        """Share of dense attention that a product over `lists` computes: 0-dim, on their device."""
        density = lists.density() * (lists.q_len * lists.kv_len / self.layout.tokens**2)  # gaps are computed too
        return density + (1 - density) / lists.kv_block if means else density  # a mean counts as one key

    def _product(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lists: kernels.BlockLists,
        *,
        bits: int,
        boxes: kernels.Boxes | None,
        **rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's output and LSE, of the moved tokens; what `Compensated` changes."""
        if bits < 16:
            return kernels.quantised_attention(q, k, v, lists, bits=bits, scale=self.scale, **rest)
        return kernels.block_sparse_attention(q, k, v, lists, scale=self.scale, boxes=boxes, **rest)

    def _ran_search(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor | None, reason: str = "search"
    ) -> None:
        """Note a dense call that our own kernel answers."""
        kernel = kernels.kernel_for(q, k, v, key_mask=keys)
        self._record.ran_dense(reason, planned=True, backend=kernel.name, kind="search", passed_over=kernel.passed_over)

    def _known_density(self, lists: kernels.BlockLists, density: torch.Tensor) -> float | None:
        """The density as a number; on a device only from the next call with these lists on, for nobody waits for it."""
        of, reading = self.memory.get("density", (lambda: None, None))
        if of() is not lists:
            reading = Reading(density)
            self.memory["density"] = weakref.ref(lists), reading  # strategies may make new lists at each call
        return reading.value()  # type: ignore[no-any-return]

    def fall_back(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reason: str) -> torch.Tensor:
        """Dense attention that nobody planned: counted by reason, an error under `strict=True`."""
        if self.strict:
            raise DenseFallbackError(
                f"layer {self.layer!r} at step {self.step} would run dense ({reason}); apply with strict=False "
                "to allow it"
            )
        self._record.ran_dense(reason, planned=False, backend=self._backend)
        return self._dense(q, k, v)
