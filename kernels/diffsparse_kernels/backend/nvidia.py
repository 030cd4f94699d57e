"""What the kernels for NVIDIA GPUs have in common, in whatever language."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse_kernels.masks import is_bias

LOG2E = 1.4426950408889634


def chip(device: torch.device) -> int:
    """Its compute capability, such as 90; the CPU, where kernels are interpreted, counts as the oldest."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return int(10 * major + minor)


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take the maximum before they scale, so the scale must be positive -> q and scale of equal scores."""
    return (-q, -scale) if scale < 0 else (q, max(scale, 1e-30))


def in_base_two(bias: Tensor) -> Tensor:
    """A bias of scores as kernels add it, float32 and contiguous; far below zero -inf."""
    return (bias.float() * LOG2E).contiguous()


def mask_pointers(key_mask: Tensor | None, unread: Tensor) -> dict[str, Tensor]:
    """What a kernel gets of a mask [B, N_kv], by two launches and without a sync; `unread` where there is none.

    key_mask_ptr: its bytes, uint8 [B, N_kv]; of a bias, that in base 2, float32.
    clear_ptr: int32 [B], how many leading keys are all allowed; tiles before that need no mask, which are all but a few
        where a sample's keys are padded at their end. A bias is read everywhere, and has none.
    """
    if key_mask is None:
        return {"key_mask_ptr": unread, "clear_ptr": unread}
    if is_bias(key_mask):
        return {"key_mask_ptr": in_base_two(key_mask), "clear_ptr": unread}
    allowed = key_mask.contiguous().view(torch.uint8)
    least, first = allowed.min(1)  # the first of the least: 0 and the first hidden key, or 1 and key 0
    clear = torch.empty(allowed.shape[0], dtype=torch.int32, device=allowed.device)
    torch.add(first, least, alpha=allowed.shape[1], out=clear)
    return {"key_mask_ptr": allowed, "clear_ptr": clear}
