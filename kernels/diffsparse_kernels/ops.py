"""Kernels as custom ops: opaque to `torch.compile`, each with a fake that knows the shapes of its outputs."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from diffsparse_kernels import means as plain_means
from diffsparse_kernels.case import DENSE_BLOCKS, Case, Kind
from diffsparse_kernels.errors import NoKernelError
from diffsparse_kernels.lists import BlockLists, Boxes, blocks_of
from diffsparse_kernels.registry import check_named, choose


def _module(
    backend: str,
    kind: Kind,
    qkv: tuple[Tensor, Tensor, Tensor],
    blocks: tuple[int, int] = DENSE_BLOCKS,
    key_mask: Tensor | None = None,
    boxes: Boxes | None = None,
) -> ModuleType:
    """The module that answers this call: chosen here, where no compiler looks."""
    return choose(Case.of(kind, *qkv, blocks, key_mask, boxes), qkv[0].device, backend).module


def merge_means(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge what the means of the blocks outside the lists give into out and lse, in place, whoever made these."""
    try:
        case = Case.of("means", q, k, v, (lists.q_block, lists.kv_block), key_mask)
        merge = getattr(choose(case, q.device).module, "merge_means", plain_means.merge_means)
    except NoKernelError:  # plain torch always can
        merge = plain_means.merge_means
    merge(q, k, v, lists, scale, key_mask, out, lse)


def _accumulated(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


@torch.library.custom_op("diffsparse_kernels::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    module = _module(backend, "attend", (q, k, v), key_mask=key_mask)
    out, lse = module.attention(q, k, v, scale, key_mask)
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
    blocks, rest = (q_block, kv_block), (q_block, kv_block, scale, key_mask)
    if lse_cached is not None:
        module = _module(backend, "fused", (q, k, v), blocks, key_mask)
        out, lse, mass = module.attention_with_mass(q, k, v, lse_cached, *rest)
        return out.contiguous(), lse.contiguous(), mass.contiguous()
    module = _module(backend, "attend", (q, k, v), key_mask=key_mask)
    if getattr(module, "SEES_WHOLE_ROWS", False):
        out, lse, mass = module.attention_with_mass(q, k, v, None, *rest)
    else:  # the LSE is known when the pass ends
        second = _module(backend, "mass", (q, k, k), blocks, key_mask)
        out, lse = module.attention(q, k, v, scale, key_mask)
        mass = second.block_mass(q, k, lse, *rest)
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
    module = _module(backend, "mass", (q, k, k), (q_block, kv_block), key_mask)
    mass: Tensor = module.block_mass(q, k, lse, q_block, kv_block, scale, key_mask)
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
    check_named("triton", q.device)
    from diffsparse_kernels.backend.triton.eight_bits import block_sparse_attention as rounded

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
    module = _module(backend, "attend", (q, k, v), (q_block, kv_block), key_mask, boxes)
    out, lse = module.block_sparse_attention(q, k, v, lists, scale, key_mask, boxes)
    if means:
        out, lse = out.contiguous(), lse.contiguous()
        merge_means(q, k, v, lists, scale, key_mask, out, lse)
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
