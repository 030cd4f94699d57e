"""Attention by torch's FlexAttention: our lists as its `BlockMask`. Compiled on a GPU, eager and slow on the CPU.

The error is that of torch's kernel: scores and softmax in float32, weights rounded to the inputs' dtype. It knows no
boxes and no block mass; the mass is taken from the device's own kernel.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from diffsparse_kernels.errors import KernelInputError
from diffsparse_kernels.lists import BlockLists, Boxes


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    return _flex(q, k, v, scale, key_mask, None)


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
    """Dense attention, its LSE and the block mass, in two passes."""
    return (*attention(q, k, v, scale, key_mask), block_mass(q, k, lse, q_block, kv_block, scale, key_mask))


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Sum of exp(score - lse) over each tile, by the device's own kernel."""
    mass: Tensor = _own(q.device.type).block_mass(q, k, lse, q_block, kv_block, scale, key_mask)
    return mass


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    boxes: Boxes | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks.

    Raises:
        KernelInputError: boxes, which FlexAttention would have to be compiled for anew.
    """
    if boxes is not None:
        raise KernelInputError("the flex backend takes no boxes; got some. Use backend='triton', or 'cpu' on the CPU")
    return _flex(q, k, v, scale, key_mask, lists.to_block_mask())


def _flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, blocks: BlockMask | None
) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        out, aux = _kernel(q.device.type)(q, k, v, _hides(key_mask), blocks, scale, return_aux=AuxRequest(lse=True))
    empty = aux.lse.isneginf()[..., None]
    return out.masked_fill(empty, 0.0), aux.lse


def _hides(key_mask: Tensor | None) -> Any:
    """A score modifier that gives hidden keys -inf."""
    if key_mask is None:
        return None
    return lambda score, b, h, q, kv: torch.where(key_mask[b, kv], score, -torch.inf)


@cache
def _kernel(device: str) -> Any:
    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention


def _own(device: str) -> ModuleType:
    from diffsparse_kernels.registry import load

    return load("triton" if device == "cuda" else "cpu")
