"""An order for each head: the tokens of a call moved, and put back."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from diffsparse.orders.layout import Layout, kept
from diffsparse.orders.named import permutation, permutation_on
from diffsparse_kernels.masks import each_head


class HeadOrders(NamedTuple):
    """An order for each head, or for each head of each sample, and its inverse.

    M is N, or more where tiles are not full.

    forward: int64 [H, M] or [B, H, M], which token stands at each place; H is 1 where all heads have the same order.
    back: int64 [H, N] or [B, H, N], where each token stands.
    filled: bool [M], False for the copies that fill the gaps of tiles; None if there are no gaps.
    """

    forward: Tensor
    back: Tensor
    filled: Tensor | None = None

    @classmethod
    def of(
        cls, names: tuple[str, ...], picked: Tensor, layout: Layout, device: torch.device, *, move_text: bool = True
    ) -> HeadOrders:
        """Head h gets the order `names[picked[h]]`.

        picked: int [H] or [B, H].
        move_text: text comes last, wherever it was: the blocks of the video are then the same for prompts of any
            length.
        """
        forward, back = _tables(names, layout, device, move_text)
        picked = picked.to(device, torch.int64, non_blocking=True)
        return cls(forward[picked], back[picked])

    @classmethod
    def same(cls, name: str, layout: Layout, device: torch.device) -> HeadOrders:
        """One order for all heads; text stays where it is."""
        forward, back = permutation_on(name, layout, device)
        return cls(forward[None], back[None])

    def apply(self, x: Tensor) -> Tensor:
        """x [B, H, N, D] -> [B, H, M, D], each head's tokens in its order; contiguous. One copy."""
        batch, heads, tokens, dim = x.shape
        sample, head = _numbers(batch, heads, x.device)
        if x.transpose(1, 2).is_contiguous():
            flat, rows = x.transpose(1, 2).reshape(-1, dim), (sample * tokens + self.forward) * heads + head
        else:
            flat, rows = x.reshape(-1, dim), (sample * heads + head) * tokens + self.forward
        return flat.index_select(0, rows.flatten()).view(batch, heads, -1, dim)

    def undo(self, x: Tensor) -> Tensor:
        """[B, H, M, D] in raster order again: [B, H, N, D], stored as [B, N, H, D], as processors want it next."""
        batch, heads, tokens, dim = x.shape
        sample, head = _numbers(batch, heads, x.device)
        rows = ((sample * heads + head) * tokens + self.back).transpose(1, 2)  # [B, N, H]
        return x.reshape(-1, dim).index_select(0, rows.flatten()).view(batch, -1, heads, dim).transpose(1, 2)

    def keys(self, mask: Tensor | None) -> Tensor | None:
        """A key mask, bool [B|1, N] or [B, H, N], over the moved tokens: with M for N, and H where heads differ."""
        if mask is None:
            return None if self.filled is None else self.filled[None]
        if len(self.forward) == 1 and self.forward.ndim == 2:
            moved = mask.index_select(-1, self.forward[0])
        else:
            forward = self.forward.expand(len(mask), *self.forward.shape[-2:])
            moved = each_head(mask).expand(-1, forward.shape[1], -1).gather(2, forward)
        return moved if self.filled is None else moved & self.filled


def _numbers(batch: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the samples, [B, 1, 1], and of the heads, [H, 1]."""
    return torch.arange(batch, device=device)[:, None, None], torch.arange(heads, device=device)[:, None]


@lru_cache(maxsize=4)
@kept
def _tables(names: tuple[str, ...], layout: Layout, device: torch.device, move_text: bool) -> tuple[Tensor, Tensor]:
    """All orders and their inverses, int64 [orders, N] each, on the device."""
    forward = torch.stack([permutation(name, layout)[0] for name in names])
    forward = (_text_last(forward, layout) if move_text else forward).to(device)
    return forward, forward.argsort()


def _text_last(x: Tensor, layout: Layout) -> Tensor:
    """x [..., N] with the tokens before the video moved behind it."""
    before, rest = x.split([layout.text_before, layout.tokens - layout.text_before], -1)
    return torch.cat([rest[..., : layout.video], before, rest[..., layout.video :]], -1)
