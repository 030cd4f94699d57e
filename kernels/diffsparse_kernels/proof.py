"""A backend is tried on the device before it is trusted: what no test could run where it was written, this does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffsparse_kernels import reference
from diffsparse_kernels.lists import BlockLists

Sparse = Callable[[Tensor, Tensor, Tensor, BlockLists, float, None], tuple[Tensor, Tensor]]


def proven(sparse: Sparse, device: torch.device, block: int = 128) -> bool:
    """Whether block-sparse attention agrees with the reference on ragged lengths, with an empty list among others.

    One small call in bfloat16, and the first of its kind, so it compiles. It waits for the device.
    """
    generator, length = torch.Generator().manual_seed(0), 6 * block - block // 2 - 4
    q, k, v = (torch.randn(1, 2, length, 128, generator=generator).to(device, torch.bfloat16) for _ in range(3))
    mask = torch.rand(1, 2, 6, 6, generator=generator) < 0.7
    mask[0, 0, 0] = False
    lists = BlockLists.from_mask(mask.to(device), q_block=block, kv_block=block, q_len=length, kv_len=length)
    got = sparse(q, k, v, lists, 0.1, None)
    want = reference.block_sparse_attention(q, k, v, lists, 0.1, None)
    return all(torch.allclose(x.float(), y.float(), rtol=0.02, atol=0.02) for x, y in zip(got, want, strict=True))
