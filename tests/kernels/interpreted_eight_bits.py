"""Attention in eight bits in Triton's interpreter, on the CPU. Run by test_eight_bits.py in a process of its own."""

from __future__ import annotations

import pytest
import torch

import diffsparse_kernels as dk
from diffsparse_kernels.backend.triton import eight_bits
from diffsparse_kernels.backend.triton import launch as triton
from support import exact
from support.cases import Size
from support.places import Place
from support.rounded import SIZES, assert_no_worse_than_rounding

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("chip", "masked"), [(80, True), (90, False)])
@pytest.mark.parametrize("precision", eight_bits.PRECISIONS)
@pytest.mark.parametrize(("size", "dtype"), list(zip(SIZES, (torch.bfloat16, torch.float16), strict=True)), ids=str)
def test_no_worse_than_rounding(
    size: Size, dtype: torch.dtype, precision: str, masked: bool, chip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "chip", lambda device: chip)
    assert_no_worse_than_rounding(Place("triton"), size, dtype, precision, masked)


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
