"""An order for each head: the tokens of a call moved, and put back."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import diffsparse_kernels as kernels
from diffsparse.orders.layout import Layout, kept
from diffsparse.orders.named import permutation, permutation_on
from diffsparse_kernels.masks import each_head, hide


class HeadOrders(NamedTuple):
    """An order for each head, or for each head of each sample, and its inverse.

    M is N, or more where tiles are not full.

    Attributes:
        orders: int64 [orders, M], which token stands at each place.
        inverses: int64 [orders, N], where each token stands.
        picked: int64 [1, 1], [1, H] or [B, H], which of the orders each head has.
        filled: bool [M], False for the copies that fill the gaps of tiles; None if there are no gaps.
    """

    orders: Tensor
    inverses: Tensor
    picked: Tensor
    filled: Tensor | None = None

    @classmethod
    def of(
        cls, names: tuple[str, ...], picked: Tensor, layout: Layout, device: torch.device, *, move_text: bool = True
    ) -> HeadOrders:
        """Head h gets the order `names[picked[h]]`.

        Args:
            picked: int [H] or [B, H].
            move_text: text comes last, wherever it was: the blocks of the video are then the same for prompts of any
                length.
        """
        picked = picked.to(device, torch.int64, non_blocking=True)
        return cls(*_tables(names, layout, device, move_text), picked if picked.ndim == 2 else picked[None])

    @classmethod
    def same(cls, name: str, layout: Layout, device: torch.device) -> HeadOrders:
        """One order for all heads; text stays where it is."""
        return cls.shared(*permutation_on(name, layout, device))

    @classmethod
    def shared(cls, order: Tensor, inverse: Tensor, filled: Tensor | None = None) -> HeadOrders:
        """One order for all heads, int64 [M], and its inverse [N]."""
        return cls(order[None], inverse[None], _first(order.device), filled)

    @classmethod
    def each(cls, orders: Tensor) -> HeadOrders:
        """The orders [B, H, N] of each head of each sample."""
        flat = orders.flatten(0, 1)
        picked = torch.arange(len(flat), device=flat.device).view(orders.shape[:2])
        return cls(flat, flat.argsort(-1), picked)

    @property
    def forward(self) -> Tensor:
        """Which token stands at each place of each head: int64 [B|1, H|1, M]."""
        return self.orders[self.picked]

    @property
    def back(self) -> Tensor:
        """Where each token of each head stands: int64 [B|1, H|1, N]."""
        return self.inverses[self.picked]

    def apply(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors [B, H, N, D] as [B, H, M, D], each head's tokens in its order; contiguous. One copy."""
        return kernels.move_rows(*tensors, orders=self.orders, picked=self.picked)

    def undo(self, x: Tensor, correction: kernels.Correction | None = None) -> Tensor:
        """[B, H, M, D] in raster order again: [B, H, N, D], stored as [B, N, H, D], as processors want it next.

        Args:
            correction: of x as it stands, added on the way.
        """
        return kernels.restore_rows(x, self.inverses, self.picked, correction)

    def keys(self, mask: Tensor | None) -> Tensor | None:
        """A key mask, bool [B|1, N] or [B, H, N], over the moved tokens: with M for N, and H where heads differ."""
        if mask is None:
            return None if self.filled is None else self.filled[None]
        if len(self.orders) == 1:
            moved = mask.index_select(-1, self.orders[0])
        else:
            forward = self.forward
            forward = forward.expand(len(mask), *forward.shape[1:])
            moved = each_head(mask).expand(-1, forward.shape[1], -1).gather(2, forward)
        return moved if self.filled is None else hide(moved, self.filled)


@lru_cache(maxsize=4)
@kept
def _tables(names: tuple[str, ...], layout: Layout, device: torch.device, move_text: bool) -> tuple[Tensor, Tensor]:
    """All orders and their inverses, int64 [orders, N] each, on the device."""
    forward = torch.stack([permutation(name, layout)[0] for name in names])
    forward = (_text_last(forward, layout) if move_text else forward).to(device)
    return forward, forward.argsort()


@lru_cache(maxsize=4)
@kept
def _first(device: torch.device) -> Tensor:
    """What all heads have picked where there is one order."""
    return torch.zeros(1, 1, dtype=torch.int64, device=device)


def _text_last(x: Tensor, layout: Layout) -> Tensor:
    """x [..., N] with the tokens before the video moved behind it."""
    before, rest = x.split([layout.text_before, layout.tokens - layout.text_before], -1)
    return torch.cat([rest[..., : layout.video], before, rest[..., layout.video :]], -1)
