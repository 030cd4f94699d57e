"""Few bits: whole numbers against products made one by one, eight bits emulated, and what computes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels import registry, trials
from diffsparse_kernels.backend import emulated
from diffsparse_kernels.case import PRECISIONS, Case
from support import exact
from support.cases import MASKS, Size, as_bias, uneven
from support.devices import pretended
from support.rounded import attention as attention_in_eight_bits

SIZES = (Size(dim=16), Size(batch=1, q_len=83, kv_len=83, dim=20), Size(1, 2, 40, 70, 8, 12, q_block=16, kv_block=24))


def by_hand(x: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Whole numbers int64 [N, D] and a step for each row, float64 [N], of x [N, D]."""
    numbers, steps = torch.empty(x.shape, dtype=torch.int64), torch.empty(len(x), dtype=torch.float64)
    for first in range(0, len(x), block):
        part = x[first : first + block].double()
        step = float(part.abs().max()) / (2 ** (bits - 1) - 1)
        numbers[first : first + block] = (part / step).round().long() if step else 0
        steps[first : first + block] = step
    return numbers, steps


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: Size, bits: int) -> tuple[Tensor, Tensor]:
    """One head: products of whole numbers, tile by tile. mask: bool [nQ, nK]."""
    (qi, qs), (ki, ks), (vi, vs) = by_hand(q, bits, size.q_block), *(by_hand(x, bits, size.kv_block) for x in (k, v))
    scores = (qi @ ki.T).double() * qs[:, None] * ks * size.scale
    allowed = exact.element_mask(mask[None, None], size.q_block, size.kv_block, len(q), len(k))[0, 0]
    scores = scores.masked_fill(~allowed, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top.isneginf(), 0)).exp()
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for row, column in mask.nonzero().tolist():
        rows, columns = (slice(i * b, (i + 1) * b) for i, b in ((row, size.q_block), (column, size.kv_block)))
        tile = weights[rows, columns]
        step = float(tile.max()) / (2 ** (bits - 1) - 1)
        out[rows] += ((tile / step).round().long() @ vi[columns]).double() * step * vs[columns][0]
    total = weights.sum(-1, keepdim=True)
    return out / total.masked_fill(total == 0, 1), (top + total.log())[:, 0]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_multiplies_whole_numbers(size: Size, kind: str) -> None:
    q, k, v = size.qkv(torch.float64)
    mask = MASKS[kind](size)
    for bits in (7, 4):
        out, lse = dk.quantised_attention(q, k, v, size.lists(mask), bits=bits)
        for b in range(size.batch):
            for h in range(size.heads):
                want, want_lse = attention_by_hand(q[b, h], k[b, h], v[b, h], mask[b, h], size, bits)
                torch.testing.assert_close(out[b, h], want)
                torch.testing.assert_close(lse[b, h], want_lse)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_bits_come_closer_to_the_exact_product(dtype: torch.dtype, biased: bool) -> None:
    size = Size(q_len=83, kv_len=83, dim=20)
    q, k, v = size.qkv(dtype)
    keys = torch.randn(size.batch, size.kv_len) if biased else torch.rand(size.batch, size.kv_len) < 0.8
    mask = MASKS["random"](size)
    want, _ = exact.softmax_attention(q, k, v, size.allowed(mask, keys), size.scale)
    errors = []
    for bits in (2, 4, 6, 8):
        out, _ = dk.quantised_attention(q, k, v, size.lists(mask), bits=bits, key_mask=keys)
        assert out.dtype == dtype
        errors.append(float((out.double() - want).square().mean().sqrt()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_hides_as_a_bool_mask_and_moves_the_lse(bits: int, by_head: bool) -> None:
    size = Size(q_len=83, kv_len=83, dim=20)
    qkv, lists = size.qkv(torch.float64), size.lists(MASKS["random"](size))
    keys = torch.rand(size.batch, *((size.heads,) if by_head else ()), size.kv_len) < 0.7
    few = partial(dk.quantised_attention, *qkv, lists, bits=bits, summary="means")
    want, hidden = few(key_mask=keys), as_bias(keys)
    assert all(map(torch.equal, few(key_mask=hidden), want))
    moved = few(key_mask=hidden - 1.0)
    torch.testing.assert_close(moved, (want[0], want[1] - 1))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 16), st.sampled_from([2, 4, 8]), st.floats(1e-6, 1e6))
def test_half_a_step_is_the_largest_error(rows: int, dim: int, block: int, bits: int, size: float) -> None:
    x = torch.randn(2, rows, dim) * size
    numbers, steps = dk.quantise(x, bits, block)
    assert numbers.dtype == torch.int8
    assert int(numbers.abs().max()) == 2 ** (bits - 1) - 1
    assert ((numbers * steps - x).abs() <= 0.5001 * steps).all()
    for part, step in zip(x.split(block, 1), steps.split(block, 1), strict=True):
        peak = part.abs().amax((1, 2))
        torch.testing.assert_close(step[:, 0, 0] * (2 ** (bits - 1) - 1), peak)
        torch.testing.assert_close(step, step[:, :1].expand_as(step))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 16))
def test_incoherence_by_its_definition(rows: int, dim: int, block: int) -> None:
    x = torch.randn(3, rows, dim)
    parts = x.split(block, 1)
    want = torch.stack([part.abs().amax((1, 2)) / part.abs().mean((1, 2)) for part in parts], -1)
    torch.testing.assert_close(dk.incoherence(x, block), want)


def test_zeros_and_bad_input() -> None:
    numbers, steps = dk.quantise(torch.zeros(4, 2), 8, 2)
    assert not numbers.any()
    assert steps.isfinite().all()
    assert not dk.incoherence(torch.zeros(4, 2), 2).any()
    with pytest.raises(dk.KernelInputError, match="wanted 2 to 8 bits; got 16"):
        dk.quantise(torch.zeros(4, 2), 16, 2)


FEW = {"int4": partial(dk.quantised_attention, bits=4), "int8": partial(dk.block_sparse_attention, precision="int8")}


@pytest.mark.parametrize("few", FEW.values(), ids=FEW)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_means_join_unrounded(size: Size, few: Callable[..., tuple[Tensor, Tensor]]) -> None:
    q, k, v = size.qkv(torch.float64)
    lists = size.lists(MASKS["random"](size))
    out, lse = few(q, k, v, lists)
    got, got_lse = few(q, k, v, lists, summary="means")
    total, summed = lse.exp()[..., None], out * lse.exp()[..., None]
    for number in range(lists.kv_blocks):
        block = slice(number * size.kv_block, (number + 1) * size.kv_block)
        key, value = (x[:, :, block].mean(2, keepdim=True) for x in (k, v))
        dropped = ~lists.to_mask()[..., number].repeat_interleave(size.q_block, 2)[..., : q.shape[2], None]
        weight = k[:, :, block].shape[2] * (q @ key.mT * size.scale).exp() * dropped
        total, summed = total + weight, summed + weight * value
    torch.testing.assert_close(got, summed / total)
    torch.testing.assert_close(got_lse, total.log()[..., 0])


def test_on_the_cpu_it_is_emulated_and_says_so() -> None:
    size = Size(q_len=95, kv_len=95)
    qkv, lists = size.qkv(torch.bfloat16), size.lists(MASKS["random"](size))
    keys = torch.rand(size.batch, size.heads, size.kv_len) < 0.7
    with dk.record() as ran:
        got = dk.quantised_attention(*qkv, lists, bits=8, key_mask=keys)
        dk.quantised_attention(*qkv, lists, bits=4)
        dk.block_sparse_attention(*qkv, lists, precision="fp8", summary="means")
    names = [choice.name for choice in ran]
    assert names[:3] == ["int8-int8 emulated", "int4 emulated", "fp8 emulated"]
    assert not any(choice.passed_over for choice in ran)
    want = emulated.block_sparse_attention(*qkv, lists, size.scale, keys, "int8-int8")
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_eight_bits_are_rounded_as_the_kernel_does(size: Size, precision: str, biased: bool) -> None:
    """Against the construction that the kernel's own results are held to."""
    q, k, v = size.qkv(torch.float64)
    k = k + 2 * torch.randn(size.dim, dtype=torch.float64)
    mask, keys = MASKS["random"](size), uneven(size) if biased else torch.rand(size.batch, size.kv_len) < 0.8
    mask[0, 0, 0] = False
    out, lse = dk.block_sparse_attention(q, k, v, size.lists(mask), key_mask=keys, precision=precision)
    kinds = PRECISIONS[precision]
    allowed, blocks = size.allowed(mask, keys), (size.q_block, size.kv_block)
    want, want_lse = attention_in_eight_bits(q, k, v, allowed, size.scale, blocks, *kinds)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_cost_what_is_documented(dtype: torch.dtype) -> None:
    size = Size(1, 2, 500, 500, 64, q_block=64, kv_block=64)
    q, k, v = size.qkv(dtype)
    k = k + 2 * torch.randn(size.dim).to(dtype)
    mask, errors = MASKS["random"](size), []
    want, _ = exact.softmax_attention(q, k, v, size.allowed(mask, None), size.scale)
    for precision in (None, "int8", "int8-int8", "int8-fp8", "fp8"):
        out, _ = dk.block_sparse_attention(q, k, v, size.lists(mask), precision=precision)
        assert out.dtype == dtype
        errors.append(float((out.double() - want).norm() / want.norm()))
    assert errors == sorted(errors)
    assert errors[-1] < 0.08


CASE = Case("attend", torch.bfloat16, 64, 64, 64, 64, precision="int8-int8")
FAST, EMULATED = "triton int8-int8", "int8-int8 emulated"
CPU = torch.device("cpu")


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as if it were a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(registry, "_EIGHT_BIT_DEVICES", ("cuda", "cpu"))
    with pretended(monkeypatch, "triton"):
        yield


@pytest.mark.usefixtures("gpu_here")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.float16, "masked": True, "kv_block": 128}, ""),
        ({"dtype": torch.float32}, "in eight bits it wants bfloat16 or float16; got torch.float32"),
        ({"q_block": 48, "kv_block": 48}, "it wants blocks of 16, 32, 64, 128 tokens; got 48 and 48"),
        ({"kv_block": 16}, "in eight bits it wants heads of more than 16 channels and blocks of more than 16 keys"),
        ({"head_dim": 256, "value_dim": 256}, "heads of at most 128 channels; got 256"),
        ({"axes": 2}, "without boxes"),
    ],
)
def test_the_fast_kernel_runs_where_it_can(change: dict[str, object], reason: str) -> None:
    choice = registry.choose_rounded(CASE._replace(**change), CPU)
    assert choice.name == (EMULATED if reason else FAST)
    assert len(choice.passed_over) == bool(reason)
    assert all(told.startswith(f"{FAST}: ") and reason in told for told in choice.passed_over)
    if reason:
        with pytest.raises(dk.NoKernelError, match=re.escape(reason)):
            registry.choose_rounded(CASE._replace(**change), CPU, "triton")
    else:
        assert registry.choose_rounded(CASE._replace(**change), CPU, "triton") == choice


def test_the_interpreter_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton runs on the CPU, eight bits are emulated unless it is named."""
    pytest.importorskip("triton")
    with pretended(monkeypatch, "triton"):
        assert registry.choose_rounded(CASE, CPU) == dk.Choice(EMULATED)
        monkeypatch.setenv("DIFFSPARSE_BACKEND", "triton")
        assert registry.choose_rounded(CASE, CPU) == dk.Choice(FAST)


@pytest.mark.usefixtures("gpu_here")
def test_a_fast_kernel_that_is_wrong_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def verdict(kernel: str, case: Case, device: torch.device) -> str:
        tried.append(f"{kernel} {case.precision}")
        return "hang in its trial"

    monkeypatch.setattr(trials, "verdict", verdict)
    assert registry.choose_rounded(CASE, CPU) == dk.Choice(EMULATED, (f"{FAST}: hang in its trial",))
    assert tried == ["triton-int8-int8 int8-int8"]
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "triton")  # named, so without a trial
    assert registry.choose_rounded(CASE, CPU) == dk.Choice(FAST)
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "reference")
    assert registry.choose_rounded(CASE, CPU) == dk.Choice(EMULATED)
    assert len(tried) == 1


@pytest.mark.usefixtures("gpu_here")
def test_what_was_chosen_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(dim=64, q_block=64, kv_block=64)
    qkv, lists = size.qkv(torch.bfloat16), size.lists(MASKS["random"](size))
    right, asked = registry.load, []

    def fast(q: Tensor, *_: object, precision: str) -> tuple[Tensor, Tensor]:
        asked.append(precision)
        return torch.full_like(q, 7), q.new_zeros(q.shape[:3], dtype=torch.float32)

    fake = SimpleNamespace(block_sparse_attention=fast)
    monkeypatch.setattr(registry, "load", lambda name: fake if name == FAST else right(name))
    with dk.record() as ran:
        out, _ = dk.quantised_attention(*qkv, lists, bits=8)
        exact_, _ = dk.quantised_attention(*(x.float() for x in qkv), lists, bits=8)
    assert [choice.name for choice in ran] == [FAST, EMULATED]
    assert asked == ["int8-int8"]
    assert (out == 7).all()
    assert not (exact_ == 7).any()
