"""Attention by FlashAttention-4 (arXiv 2603.05451), Hopper and Blackwell: our lists are its lists of full blocks.

Needs the package `flash-attn-4`. It takes bfloat16 and float16, blocks of 128 by 128, no key mask, no boxes, no mass;
all else is the triton backend's. The error is that of its kernel, which is tried on the device before it is used.
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

BLOCK = 128


def capability(device: torch.device, case: Case | None = None) -> str | None:
    """Why the kernel doesn't run on `device`, or can't compute `case` there; None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "flash-attn-4 knows block-sparse attention on Hopper and Blackwell (sm_90, sm_100) only"
    return None if case is None else case_capability(case)


def case_capability(case: Case) -> str | None:
    """What the kernel can't do of a case, which the triton backend then does; None if it can do all."""
    if case.axes or case.masked:
        return "it takes no boxes and no key mask"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16; got {case.dtype}"
    if (case.q_block, case.kv_block) != (BLOCK, BLOCK):
        return f"it takes blocks of {BLOCK}; got {case.q_block} and {case.kv_block}"
    return None


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
    """Its kernel takes [B, N, H, D]."""
    blocks = None
    if lists is not None:
        batch = q.shape[0]
        cnt, idx = lists.cnt.expand(batch, -1, -1).contiguous(), lists.idx.expand(batch, -1, -1, -1).int().contiguous()
        blocks = BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(cnt),
            mask_block_idx=torch.zeros_like(idx),
            full_block_cnt=cnt,
            full_block_idx=idx,
            block_size=(lists.q_block, lists.kv_block),
        )
    token_major = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _flash_attn_fwd(*token_major, softmax_scale=scale, block_sparse_tensors=blocks, return_lse=True)
    return out.transpose(1, 2), lse
