"""Key masks, bool [B, N_kv] or [B, H, N_kv], and how the GPU kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def each_head(key_mask: Tensor) -> Tensor:
    """A key mask [B, N_kv] or [B, H, N_kv] as [B, H|1, N_kv]."""
    return key_mask[:, None] if key_mask.ndim == 2 else key_mask


def by_head(op: Callable[..., Any], tensors: tuple[Tensor, ...], key_mask: Tensor, **rest: Any) -> Any:
    """`op(*tensors, key_mask=...)` where the mask differs by head: each head stands as a sample that has one head.

    So a kernel knows masks [B, N_kv] alone. Tensors [B, H, ...] in and out; no copies where they are contiguous.
    """
    batch, heads = key_mask.shape[:2]
    apart = (x.reshape(batch * heads, 1, *x.shape[2:]) for x in tensors)
    found = op(*apart, key_mask=key_mask.flatten(0, 1), **rest)
    if torch.is_tensor(found):
        return found.view(batch, heads, *found.shape[2:])
    return tuple(x.view(batch, heads, *x.shape[2:]) for x in found)


def mask_pointers(key_mask: Tensor | None, unread: Tensor) -> dict[str, Tensor]:
    """What a kernel gets of a bool mask [B, N_kv], by two launches and no wait; `unread` where there is none.

    key_mask_ptr: its bytes, uint8 [B, N_kv]. clear_ptr: int32 [B], how many leading keys are all allowed; tiles that
    lie before that need no mask, which are all but a few where a sample's keys are padded at their end.
    """
    if key_mask is None:
        return {"key_mask_ptr": unread, "clear_ptr": unread}
    allowed = key_mask.contiguous().view(torch.uint8)
    least, first = allowed.min(1)  # the first of the least: 0 and the first hidden key, or 1 and key 0
    clear = torch.empty(allowed.shape[0], dtype=torch.int32, device=allowed.device)
    torch.add(first, least, alpha=allowed.shape[1], out=clear)
    return {"key_mask_ptr": allowed, "clear_ptr": clear}
