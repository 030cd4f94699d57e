"""Attention by torch's FlexAttention: our lists as its `BlockMask`. Compiled on a GPU, eager and slow on the CPU.

The error is that of torch's kernel: scores and softmax in float32, weights rounded to the inputs' dtype. It knows no
boxes and no block mass; the mass is taken from the device's own kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

from diffsparse_kernels.case import Case
from diffsparse_kernels.catalog import load
from diffsparse_kernels.lists import BlockLists
from diffsparse_kernels.masks import Boxes, is_bias


def capability(device: torch.device, case: Case | None = None) -> str | None:
    """Why it can't run on `device`, or compute `case` there; what else it can't do torch raises."""
    if case is not None and case.axes:  # for other boxes it would have to be compiled again
        return "the flex backend takes no boxes"
    return None


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
    """Attention over the listed blocks."""
    return _flex(q, k, v, scale, key_mask, lists.to_block_mask())


def _flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, blocks: BlockMask | None
) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        out, aux = _kernel(q.device.type)(q, k, v, _hides(key_mask), blocks, scale, return_aux=AuxRequest(lse=True))
    lse = aux.lse
    assert lse is not None  # it was asked for
    return out.masked_fill(lse.isneginf()[..., None], 0.0), lse


def _hides(key_mask: Tensor | None) -> Callable[..., Tensor] | None:
    """A score modifier that gives hidden keys -inf, or adds their bias."""
    if key_mask is None:
        return None
    if is_bias(key_mask):
        return lambda score, b, h, q, kv: score + key_mask[b, kv]
    return lambda score, b, h, q, kv: torch.where(key_mask[b, kv], score, -torch.inf)


@cache
def _kernel(device: str) -> Callable[..., tuple[Tensor, AuxOutput]]:
    kernel: Callable[..., tuple[Tensor, AuxOutput]] = flex_attention
    return torch.compile(kernel, dynamic=False) if device == "cuda" else kernel


def _own(device: str) -> ModuleType:
    return load("triton" if device == "cuda" else "cpu")
