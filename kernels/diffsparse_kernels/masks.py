"""What hides keys: masks, bool [B, N_kv] or [B, H, N_kv], and boxes."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

from torch import Tensor


class Boxes(NamedTuple):
    """Which keys each query may see, token by token, within the listed blocks: those inside its box.

    place: int32 [A, N_kv], coordinates of the keys on A axes; a key whose first coordinate is negative is seen by all.
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
