"""What hides keys: masks [B, N_kv] or [B, H, N_kv], and boxes.

A mask is bool, True where a key may be attended to, or of floats, a bias that is added to the key's scaled score, as
SDPA adds it: the key counts exp(bias) times, and never with -inf.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

NEVER = -1e29  # a bias so low hides its key as -inf does: some kernels count with such numbers in its place


class Boxes(NamedTuple):
    """Which keys each query may see, token by token, within the listed blocks: those inside its box.

    Keys that boxes hide within listed blocks stay hidden where summaries stand for dropped blocks, too.

    Attributes:
        place: int32 [A, N_kv], coordinates of the keys on A axes; a key whose first coordinate is negative is seen by
            all.
        low: int32 [A, N_q], the first coordinate that each query sees.
        high: int32 [A, N_q], the last.
    """

    place: Tensor
    low: Tensor
    high: Tensor

    def visible(self, queries: slice = slice(None)) -> Tensor:
        """The same as a bool mask [queries, N_kv]."""
        low, high = self.low[:, queries, None], self.high[:, queries, None]
        place = self.place[:, None]
        return ((low <= place) & (place <= high)).all(0) | (place[0] < 0)


def is_bias(key_mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a key mask is added to the scores."""
    return key_mask is not None and key_mask.is_floating_point()


def readable(key_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A key mask as back ends take it, by no sync: bool, or a bias in float32 or better with -inf for all that hides.

    Args:
        like: queries or keys that it belongs to.
    """
    if not is_bias(key_mask):
        return key_mask
    bias = key_mask.to(torch.promote_types(like.dtype, torch.float32))
    return bias.masked_fill(bias <= NEVER, -torch.inf).contiguous()


def shown(key_mask: Tensor) -> Tensor:
    """Which keys a key mask lets through, with whatever weight: bool, of its shape."""
    return key_mask > NEVER if is_bias(key_mask) else key_mask


def hide(key_mask: Tensor, kept: Tensor) -> Tensor:
    """A key mask that hides all but the `kept` keys too, bool and broadcastable; bool or a bias, as it was."""
    return key_mask.masked_fill(~kept, -torch.inf) if is_bias(key_mask) else key_mask & kept


def masked(scores: Tensor, key_mask: Tensor) -> Tensor:
    """Scaled scores [B, H, rows, N_kv] as a key mask has them, in their dtype; -inf for keys that are hidden."""
    mask = each_head(key_mask)[:, :, None]
    return (scores + mask).to(scores.dtype) if is_bias(key_mask) else scores.masked_fill(~mask, -torch.inf)


def each_head(key_mask: Tensor) -> Tensor:
    """A key mask [B, N_kv] or [B, H, N_kv] as [B, H|1, N_kv]."""
    return key_mask[:, None] if key_mask.ndim == 2 else key_mask


def differs_by_head(key_mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a key mask is [B, H, N_kv]. Kernels take [B, N_kv] only: each head then stands as a sample of its own."""
    return key_mask is not None and key_mask.ndim == 3


def fold_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors [B, H, ...] as [B * H, 1, ...], without a copy where they are contiguous."""
    return tuple(x.reshape(-1, 1, *x.shape[2:]) for x in tensors)


def unfold_heads(like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors [B * H, 1, ...] as [B, H, ...], with B and H of `like`; those that are so already stay as they are."""
    wanted = like.shape[:2]
    return tuple(x if x.shape[:2] == wanted else x.view(*wanted, *x.shape[2:]) for x in tensors)
