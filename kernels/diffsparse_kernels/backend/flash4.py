"""Attention by FlashAttention-4 (arXiv 2603.05451), Hopper and Blackwell: our lists are its lists of full blocks.

Needs the package `flash-attn-4` (read at 4.0.0b36). It takes bfloat16 and float16, heads of up to 128 channels, blocks
of 128 x 128 or 128 x 64 on Hopper and of 256 x 128 on Blackwell, no key mask, no boxes, no mass; all else is the triton
backend's. The error is that of its kernel, which is tried on the device before it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse_kernels.case import Case
from diffsparse_kernels.lists import BlockLists
from diffsparse_kernels.masks import Boxes

try:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd
except ImportError as error:
    raise ImportError(f"wants the package flash-attn-4: {error}") from error

# By generation of chips, queries and keys of its blocks: whole tiles of 128 queries, of Blackwell's two at a time.
_BLOCKS = {9: ((128, 128), (128, 64)), 10: ((256, 128),)}


def capability(device: torch.device, case: Case | None = None) -> str | None:
    """Why the kernel doesn't run on `device`, or can't compute `case` there; None if it can."""
    reason = device_capability(device)
    return reason if reason is not None or case is None else case_capability(case, device)


def device_capability(device: torch.device) -> str | None:
    """Why the kernel doesn't run on `device`; None if it does."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if _generation(device) not in _BLOCKS:
        return "flash-attn-4 knows block-sparse attention on Hopper and Blackwell (sm_90, sm_100) only"
    return None


def case_capability(case: Case, device: torch.device) -> str | None:
    """What the kernel can't do of a case, which the triton backend then does; None if it can do all."""
    if case.axes or case.masked:
        return "it takes no boxes and no key mask"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16; got {case.dtype}"
    if max(case.head_dim, case.value_dim) > 128 or case.head_dim % 8 or case.value_dim % 8:
        sizes = f"{case.head_dim} and {case.value_dim}"
        return f"it takes heads of at most 128 channels, a multiple of 8; got {sizes}"
    blocks = _BLOCKS[_generation(device)]
    if (case.q_block, case.kv_block) not in blocks:
        wanted = " or ".join(f"{queries} x {keys}" for queries, keys in blocks)
        return f"it takes blocks of {wanted}; got {case.q_block} x {case.kv_block}"
    return None


def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    return _flash(q, k, v, scale, None)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    boxes: Boxes | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks."""
    return _flash(q, k, v, scale, lists)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, lists: BlockLists | None) -> tuple[Tensor, Tensor]:
    """Its kernel takes [B, N, H, D], and hides keys beyond the last in the last block of a list, for ours ascend."""
    blocks = None
    if lists is not None:
        blocks = BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(lists.cnt),
            mask_block_idx=lists.cnt.new_zeros(*lists.cnt.shape, 1),
            full_block_cnt=lists.cnt,
            full_block_idx=lists.idx.int(),
            block_size=(lists.q_block, lists.kv_block),
        )
    token_major = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _flash_attn_fwd(*token_major, softmax_scale=scale, block_sparse_tensors=blocks, return_lse=True)
    return out.transpose(1, 2), lse
