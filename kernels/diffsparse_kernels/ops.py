"""Kernels as custom ops: opaque to `torch.compile`, each with a fake that knows the shapes of its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from diffsparse_kernels.lists import BlockLists, Boxes, blocks_of


def _module(backend: str, q: Tensor):  # type: ignore[no-untyped-def]  # a module, checked where it is defined
    """The backend of that name, or the device's if it is empty: chosen here, where no compiler looks."""
    from diffsparse_kernels.dispatch import module_for

    return module_for(backend, q.device)


def _means_of(device: torch.device):  # type: ignore[no-untyped-def]  # a module, checked where it is defined
    """Where `merge_means` is: the same for all backends of a device."""
    from diffsparse_kernels import dispatch, means

    return dispatch.load("triton") if device.type == "cuda" else means


def _accumulated(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


@torch.library.custom_op("diffsparse_kernels::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    out, lse = _module(backend, q).attention(q, k, v, scale, key_mask)
    return out.contiguous(), lse.contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=_accumulated(q))


@torch.library.custom_op("diffsparse_kernels::attention_with_mass", mutates_args=())
def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_cached: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention with the block mass -> out, lse, mass."""
    module = _module(backend, q)
    if lse_cached is None and not getattr(module, "SEES_WHOLE_ROWS", False):  # the LSE is known when the pass ends
        out, lse = module.attention(q, k, v, scale, key_mask)
        mass = module.block_mass(q, k, lse, q_block, kv_block, scale, key_mask)
    else:
        out, lse, mass = module.attention_with_mass(q, k, v, lse_cached, q_block, kv_block, scale, key_mask)
    return out.contiguous(), lse.contiguous(), mass.contiguous()


@attention_with_mass.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_cached: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = blocks_of(q.shape[2], q_block), blocks_of(k.shape[2], kv_block)
    accumulated = _accumulated(q)
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(q.shape[:3], dtype=accumulated),
        q.new_empty(*q.shape[:2], *tiles, dtype=accumulated),
    )


@torch.library.custom_op("diffsparse_kernels::block_mass", mutates_args=())
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    backend: str,
) -> Tensor:
    """Block mass alone."""
    mass: Tensor = _module(backend, q).block_mass(q, k, lse, q_block, kv_block, scale, key_mask)
    return mass.contiguous()


@block_mass.register_fake
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    backend: str,
) -> Tensor:
    tiles = blocks_of(q.shape[2], q_block), blocks_of(k.shape[2], kv_block)
    return q.new_empty(*q.shape[:2], *tiles, dtype=_accumulated(q))


@torch.library.custom_op("diffsparse_kernels::eight_bit_attention", mutates_args=())
def eight_bit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    order: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention in eight bits -> out, lse."""
    from diffsparse_kernels.dispatch import module_for

    module_for("triton", q.device)
    from diffsparse_kernels.eight_bits import block_sparse_attention as rounded

    lists = BlockLists(idx, cnt, q_block, kv_block, q.shape[2], k.shape[2], order)
    return rounded(q, k, v, lists, scale, key_mask, precision)


@eight_bit_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    order: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("diffsparse_kernels::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    order: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    place: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    means: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention -> out, lse."""
    lists = BlockLists(idx, cnt, q_block, kv_block, q.shape[2], k.shape[2], order)
    boxes = None if place is None or low is None or high is None else Boxes(place, low, high)
    out, lse = _module(backend, q).block_sparse_attention(q, k, v, lists, scale, key_mask, boxes)
    if means:
        out, lse = out.contiguous(), lse.contiguous()
        _means_of(q.device).merge_means(q, k, v, lists, scale, key_mask, out, lse)
    return out.contiguous(), lse.contiguous()


@block_sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    order: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    place: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    means: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=_accumulated(q))
