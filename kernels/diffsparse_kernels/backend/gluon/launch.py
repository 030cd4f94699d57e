"""Attention on Hopper (sm_90) in Gluon. The kernel is in `kernels.py`; what it can't do, the triton backend does.

It takes bfloat16 and float16 [B, H, N, D] whose rows are dense and whose addresses and strides are multiples of 16
bytes, D at most 128, blocks of 128 queries and 64 or 128 keys, any key mask, no boxes, no mass. All else is the triton
backend's, and so is everything where the kernel was wrong in its trial on the device. Scores, softmax and LSE are
float32, and the error against float64 stays below twice that of plain attention in the same dtype.
"""

from __future__ import annotations

from typing import TypedDict

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from diffsparse_kernels.backend.gluon import kernels
from diffsparse_kernels.backend.nvidia import LOG2E, mask_pointers, positive
from diffsparse_kernels.case import Case
from diffsparse_kernels.lists import BlockLists, blocks_of
from diffsparse_kernels.masks import Boxes
from diffsparse_kernels.measured import HEAD_DIMS

VERSIONS = (3, 6), (3, 10)  # of Triton, the last excluded: Gluon is experimental, and renames things
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
if not VERSIONS[0] <= _VERSION < VERSIONS[1]:
    raise ImportError(f"the gluon backend wants Triton 3.6 to 3.9; found {triton.__version__}")

Q_BLOCK = 128
KV_BLOCKS = (64, 128)


class Constants(TypedDict):
    """The constants of `kernels.attend`."""

    D: int
    D_PAD: int
    KV_BLOCK: int
    STAGES: int
    SPARSE: bool
    ORDERED: bool
    MASKED: bool


def capability(device: torch.device, case: Case | None = None) -> str | None:
    """Why the kernel doesn't run on `device`, or can't compute `case` there; None if it can."""
    reason = device_capability(device)
    return reason if reason is not None or case is None else case_capability(case)


def device_capability(device: torch.device) -> str | None:
    """Why the kernel doesn't run on `device`; None if it does."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "the gluon backend is for Hopper (sm_90)"
    return None


def case_capability(case: Case) -> str | None:
    """What the kernel can't do of a case, which the triton backend then does; None if it can do all."""
    if case.axes:
        return "it takes no boxes"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16; got {case.dtype}"
    if case.head_dim != case.value_dim or case.head_dim > HEAD_DIMS[-1]:
        sizes = f"{case.head_dim} and {case.value_dim}"
        return f"it takes heads of at most {HEAD_DIMS[-1]} channels, as many of keys as of values; got {sizes}"
    if case.q_block != Q_BLOCK or case.kv_block not in KV_BLOCKS:
        wanted = f"{Q_BLOCK} queries and {' or '.join(map(str, KV_BLOCKS))} keys"
        return f"it takes blocks of {wanted}; got {case.q_block} and {case.kv_block}"
    if not case.copyable:
        return "it takes dense rows, with addresses and strides that are multiples of 16 bytes"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    return _attend(q, k, v, scale, key_mask, KV_BLOCKS[-1], None)


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
    return _attend(q, k, v, scale, key_mask, lists.kv_block, lists)


def constants(head_dim: int, kv_block: int, lists: BlockLists | None, masked: bool) -> Constants:
    """The constants of `kernels.attend`: as many stages as the shared memory of one block of threads holds."""
    padded = 64 if head_dim <= 64 else 128
    return {
        "D": head_dim,
        "D_PAD": padded,
        "KV_BLOCK": kv_block,
        "STAGES": 2 if kv_block * padded > 8192 else 4,
        "SPARSE": lists is not None,
        "ORDERED": lists is not None and lists.order is not None,
        "MASKED": masked,
    }


def layout() -> gl.NVMMASharedLayout:
    """Of a tile [1, 1, rows, D_PAD] in shared memory, as the tensor cores read it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, kv_block: int, lists: BlockLists | None
) -> tuple[Tensor, Tensor]:
    q, scale = positive(q, scale)
    batch, heads, n_q, head_dim = q.shape
    out = q.new_empty(batch, heads, n_q, head_dim)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32)
    constant = constants(head_dim, kv_block, lists, key_mask is not None)
    programs = batch * heads * blocks_of(n_q, Q_BLOCK)
    with torch.cuda.device_of(q):
        kernels.attend[(programs,)](
            _tiles(q, Q_BLOCK, constant["D_PAD"]),
            _tiles(k, kv_block, constant["D_PAD"]),
            _tiles(v, kv_block, constant["D_PAD"]),
            out,
            lse,
            *_list_pointers(lists, lse),
            *mask_pointers(key_mask, lse).values(),
            scale * LOG2E,
            n_q,
            k.shape[2],
            heads,
            programs if lists is None else lists.cnt.numel(),
            0 if lists is None else lists.idx.shape[3],
            **constant,
            num_warps=4,
        )
    return out, lse


def _tiles(x: Tensor, rows: int, padded: int) -> TensorDescriptor:
    """A descriptor of x [B, H, N, D] for the copy engine."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, padded], layout())


def _list_pointers(lists: BlockLists | None, unread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if lists is None:
        return unread, unread, unread
    return lists.idx.contiguous(), lists.cnt.contiguous(), unread if lists.order is None else lists.order
