"""Attention in eight bits in Triton's interpreter, on the CPU. Run by test_eight_bits.py in a process of its own."""

from __future__ import annotations

import pytest
import torch

import diffsparse_kernels as dk
from diffsparse_kernels import registry, summaries
from diffsparse_kernels.backend import selftest
from diffsparse_kernels.backend.triton import eight_bits
from diffsparse_kernels.backend.triton import launch as triton
from diffsparse_kernels.case import Case
from support import exact
from support.cases import Size, random_mask
from support.places import Place
from support.rounded import SIZES, assert_no_worse_than_rounding

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("chip", "masked"), [(80, "bool"), (90, "not"), (90, "bias")])
@pytest.mark.parametrize("precision", eight_bits.PRECISIONS)
@pytest.mark.parametrize(("size", "dtype"), list(zip(SIZES, (torch.bfloat16, torch.float16), strict=True)), ids=str)
def test_no_worse_than_rounding(
    size: Size, dtype: torch.dtype, precision: str, masked: str, chip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "chip", lambda device: chip)
    assert_no_worse_than_rounding(Place("triton"), size, dtype, precision, masked)


def test_without_the_mean_the_scores_of_common_keys_are_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SIZES[0]
    q, k, v = size.qkv(torch.bfloat16)
    k = k + 20
    lists, allowed = size.lists(torch.ones(size.blocks, dtype=torch.bool)), torch.ones(1, 2, 200, 200, dtype=torch.bool)
    want, _ = exact.softmax_attention(q, k, v, allowed, size.scale)
    with_mean, _ = dk.block_sparse_attention(q, k, v, lists, precision="int8", backend="triton")
    monkeypatch.setattr(torch.Tensor, "mean", lambda x, *_, **__: x.new_zeros(x.shape[:2] + x.shape[3:]).float())
    without, _ = dk.block_sparse_attention(q, k, v, lists, precision="int8", backend="triton")
    errors = [(x.double() - want).norm() for x in (with_mean, without)]
    assert 3 * errors[0] < errors[1]


@pytest.mark.parametrize("by_head", [False, True])
def test_eight_bits_take_the_fast_kernel(by_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_EIGHT_BIT_DEVICES", ("cpu",))  # the interpreter in the place of a GPU
    registry._choose_rounded.cache_clear()
    size = SIZES[0]
    qkv, mask = size.qkv(torch.bfloat16), random_mask(size)
    mask[0, 0, 0] = False
    keys = torch.rand(size.batch, *((size.heads,) if by_head else ()), size.kv_len) < 0.7
    with dk.record() as ran:
        got = dk.quantised_attention(*qkv, size.lists(mask), bits=8, key_mask=keys)
        want = dk.block_sparse_attention(*qkv, size.lists(mask), precision="int8-int8", key_mask=keys)
        dk.quantised_attention(*(x.float() for x in qkv), size.lists(mask), bits=8)
    assert all(map(torch.equal, got, want))
    fast, named, slow = ran
    assert fast == named == dk.Choice("triton int8-int8")
    assert slow.name == "int8-int8 emulated"
    assert "bfloat16 or float16; got torch.float32" in slow.passed_over[0]


def test_means_join_unrounded() -> None:
    size = SIZES[1]
    qkv, lists = size.qkv(torch.float16), size.lists(random_mask(size))
    out, lse = dk.quantised_attention(*qkv, lists, bits=8)
    means = dk.summarise(*qkv[1:], lists.kv_block, by="means")
    theirs = summaries.stand_ins(*qkv, lists, size.scale, None, means)
    summaries.merge(*qkv, lists, size.scale, theirs, out, lse)
    got, got_lse = dk.quantised_attention(*qkv, lists, bits=8, summary="means")
    torch.testing.assert_close(got, out, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(got_lse, lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", eight_bits.PRECISIONS)
def test_the_trial_passes_it(precision: str) -> None:
    case = Case("attend", torch.bfloat16, 32, 32, 32, 32, True, precision=precision)
    kernel = selftest.kernel_of(f"triton-{precision}")
    for sample in selftest.samples(case, torch.device("cpu"), long=False):
        assert selftest.examine(case, kernel, sample, 2).problem == ""
