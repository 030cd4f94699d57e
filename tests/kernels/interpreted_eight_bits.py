"""Attention in eight bits in Triton's interpreter, on the CPU. Run by test_eight_bits.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels import eight_bits, triton
from support import exact, rounded
from support.cases import Size, random_mask

SIZES = [
    Size(batch=1, heads=2, q_len=200, kv_len=200, dim=64, q_block=64, kv_block=64),
    Size(batch=2, heads=1, q_len=129, kv_len=257, dim=72, q_block=64, kv_block=128),  # both ends ragged
]
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that have much in common."""
    q, k, v = size.qkv(dtype)
    return q, k + 2 * torch.randn(size.dim).to(dtype), v


@pytest.mark.parametrize(("chip", "masked"), [(80, True), (90, False)])
@pytest.mark.parametrize("precision", eight_bits.PRECISIONS)
@pytest.mark.parametrize(("size", "dtype"), list(zip(SIZES, (torch.bfloat16, torch.float16), strict=True)), ids=str)
def test_no_worse_than_rounding(
    size: Size, dtype: torch.dtype, precision: str, masked: bool, chip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error against float64 is that of rounded inputs and weights, and of what it is stored in."""
    monkeypatch.setattr(triton, "chip", lambda device: chip)
    qkv, mask = inputs(size, dtype), random_mask(size)
    mask[0, 0, 0] = False
    keys = torch.rand(size.batch, size.kv_len) < 0.7 if masked else None
    out, lse = dk.block_sparse_attention(*qkv, size.lists(mask), key_mask=keys, precision=precision)
    allowed = size.allowed(mask, keys)
    want, want_lse = exact.softmax_attention(*qkv, allowed, size.scale)
    kinds = eight_bits.PRECISIONS[precision]
    low, low_lse = rounded.attention(*qkv, allowed, size.scale, (size.q_block, size.kv_block), *kinds)
    assert out.dtype == dtype
    # What the integer kernel rounds against the running maximum, and fp8's subnormals, are rounded a little otherwise.
    error, limit = ((x.double() - want).norm() / want.norm() for x in (out, low))
    assert error <= 1.3 * limit + torch.finfo(dtype).eps
    dead = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), dead)
    assert (out[dead] == 0).all()
    error, limit = ((x.double() - want_lse)[~dead].abs().max() for x in (lse, low_lse))
    assert error <= 1.1 * limit + 1e-5


def test_without_the_mean_the_scores_of_common_keys_are_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SIZES[0]
    q, k, v = size.qkv(torch.bfloat16)
    k = k + 20
    lists, allowed = size.lists(torch.ones(size.blocks, dtype=torch.bool)), torch.ones(1, 2, 200, 200, dtype=torch.bool)
    want, _ = exact.softmax_attention(q, k, v, allowed, size.scale)
    with_mean, _ = dk.block_sparse_attention(q, k, v, lists, precision="int8")
    monkeypatch.setattr(torch.Tensor, "mean", lambda x, *_, **__: x.new_zeros(x.shape[:2] + x.shape[3:]).float())
    without, _ = dk.block_sparse_attention(q, k, v, lists, precision="int8")
    errors = [(x.double() - want).norm() for x in (with_mean, without)]
    assert 3 * errors[0] < errors[1]
