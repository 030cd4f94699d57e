"""Attention on Hopper (sm_90) in Gluon. The kernel is in `kernels.py`; what it can't do, the triton backend does.

It takes bfloat16 and float16 [B, H, N, D] whose rows are dense and whose addresses and strides are multiples of 16
bytes, D at most 128, blocks of 128 queries and 64 or 128 keys, any bool key mask, no boxes; over lists with or without
summaries of the other blocks, and dense with or without the block mass. All else is the triton backend's, and so is
everything where the kernel was wrong in its trial on the device. Scores, softmax and LSE are float32, and the error
against float64 stays below twice that of plain attention in the same dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from diffsparse_kernels.backend.gluon import kernels
from diffsparse_kernels.backend.gluon.kernels import Constants
from diffsparse_kernels.backend.nvidia import LOG2E, mask_pointers, positive
from diffsparse_kernels.case import Case
from diffsparse_kernels.lists import BlockLists, blocks_of
from diffsparse_kernels.masks import Boxes
from diffsparse_kernels.measured import HEAD_DIMS
from diffsparse_kernels.summaries import StandIns

VERSIONS = (3, 6), (3, 10)  # of Triton, the last excluded: Gluon is experimental, and renames things
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
if not VERSIONS[0] <= _VERSION < VERSIONS[1]:
    raise ImportError(f"the gluon backend wants Triton 3.6 to 3.9; found {triton.__version__}")

Q_BLOCK: int = kernels.Q_BLOCK.value
KV_BLOCKS = (64, 128)
_ROWS: int = kernels.ROWS.value  # of a tile of queries or of the output


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
    if case.biased:
        return "it takes no key mask that is added to the scores"
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
    if case.summary is not None and case.head_dim % 8:
        return f"with summaries it takes heads of a multiple of 8 channels; got {case.head_dim}"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    return _attend(q, k, v, scale, key_mask, KV_BLOCKS[-1])[:2]


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its LSE and the block mass, one pass."""
    out, fresh, halves = _attend(q, k, v, scale, key_mask, kv_block, cached=lse)
    return out, fresh, halves.unflatten(2, (-1, 2)).sum(3)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    boxes: Boxes | None = None,
    stand_ins: StandIns | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks, and over what stands for all others."""
    return _attend(q, k, v, scale, key_mask, lists.kv_block, lists, stand_ins)[:2]


def constants(
    head_dim: int,
    kv_block: int,
    lists: BlockLists | None = None,
    masked: bool = False,
    mass: bool = False,
    stand_ins: StandIns | None = None,
) -> Constants:
    """What the kernel is compiled for: as many stages as the shared memory of one block of threads holds."""
    padded = 64 if head_dim <= 64 else 128
    return Constants(
        D=head_dim,
        D_PAD=padded,
        KV_BLOCK=kv_block,
        STAGES=2 if kv_block * padded > 8192 else 4,
        SPARSE=lists is not None,
        ORDERED=lists is not None and lists.order is not None,
        MASKED=masked,
        MASS=mass,
        SUMMARISED=stand_ins is not None,
        VARIED=stand_ins is not None and stand_ins.variance is not None,
        SLOPED=stand_ins is not None and stand_ins.slope is not None,
        BOUNDED=stand_ins is not None and stand_ins.slope is not None and stand_ins.reach is not None,
    )


@cache
def layout(rank: int) -> gl.NVMMASharedLayout:
    """Of a tile [1, ..., rows, D_PAD] in shared memory, as the tensor cores read it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None,
    kv_block: int,
    lists: BlockLists | None = None,
    stand_ins: StandIns | None = None,
    cached: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `kernels.attend` -> out, lse, mass by half query blocks (empty if there is no cached LSE)."""
    if stand_ins is not None and stand_ins.slope is not None and scale < 0:
        stand_ins = stand_ins._replace(slope=-stand_ins.slope)  # as the queries will be
    q, scale = positive(q, scale)
    (batch, heads, n_q, head_dim), n_kv = q.shape, k.shape[2]
    q_blocks, kv_blocks = blocks_of(n_q, Q_BLOCK), blocks_of(n_kv, kv_block)
    out = q.new_empty(batch, heads, n_q, head_dim)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32)
    mass = q.new_empty((0,) if cached is None else (batch, heads, 2 * q_blocks, kv_blocks), dtype=torch.float32)
    C = constants(head_dim, kv_block, lists, key_mask is not None, cached is not None, stand_ins)
    programs = batch * heads * q_blocks
    with torch.cuda.device_of(q):
        kernels.attend[(programs,)](
            queries=_tiles(q, _ROWS, C),
            keys=_tiles(k, kv_block, C),
            values=_tiles(v, kv_block, C),
            outs=_tiles(out, _ROWS, C) if C.COPIED else None,
            out_ptr=out,
            lse_ptr=lse,
            cached_ptr=None if cached is None else cached.float().contiguous(),
            mass_ptr=None if cached is None else mass,
            **_list_arguments(lists, programs),
            **_summary_arguments(stand_ins, lists, q, C),
            **mask_pointers(key_mask, lse),
            scale=scale * LOG2E,
            n_q=n_q,
            n_kv=n_kv,
            heads=heads,
            q_blocks=q_blocks,
            kv_blocks=kv_blocks,
            C=C,
            num_warps=4,
        )
    return out, lse, mass


def _tiles(x: Tensor, rows: int, C: Constants) -> TensorDescriptor:
    """A descriptor of x [..., N, D] for the copy engine."""
    shape = [1] * (x.ndim - 2) + [rows, C.D_PAD]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout(x.ndim))


def _list_arguments(lists: BlockLists | None, programs: int) -> dict[str, Any]:
    if lists is None:
        return {"idx_ptr": None, "cnt_ptr": None, "order_ptr": None, "listed": programs, "width": 0}
    return {
        "idx_ptr": lists.idx.contiguous(),
        "cnt_ptr": lists.cnt.contiguous(),
        "order_ptr": lists.order,
        "listed": lists.cnt.numel(),
        "width": lists.idx.shape[3],
    }


def _summary_arguments(stand_ins: StandIns | None, lists: BlockLists | None, q: Tensor, C: Constants) -> dict[str, Any]:
    pointers = ("bits_ptr", "log_count_ptr", "variance_ptr", "reach_ptr")
    unread = dict.fromkeys(("mean_keys", "mean_values", "slopes", *pointers)) | {"log_b": 0, "log_h": 0}
    if stand_ins is None or lists is None:
        return unread
    counts = stand_ins.log_count.float().contiguous()
    found = {
        "mean_keys": _tiles(stand_ins.key.to(q.dtype).contiguous(), C.KV_BLOCK, C),
        "mean_values": _tiles(stand_ins.value.to(q.dtype).contiguous(), C.KV_BLOCK, C),
        "bits_ptr": lists.packed(),
        "log_count_ptr": counts,
        "log_b": 0 if counts.shape[0] == 1 else counts.stride(0),
        "log_h": 0 if counts.shape[1] == 1 else counts.stride(1),
    }
    if stand_ins.variance is not None:
        found["variance_ptr"] = stand_ins.variance.float().contiguous()
    if stand_ins.slope is not None:
        found["slopes"] = _tiles(stand_ins.slope.to(q.dtype).contiguous(), C.D_PAD, C)
        if stand_ins.reach is not None:
            found["reach_ptr"] = stand_ins.reach.float().contiguous()
    return unread | found
