"""SoftPAG without a map equals the map pulled toward its target, written out in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffsparse import Layout
from diffsparse.guidance.perturb import KINDS, perturbed
from diffsparse.seam.call import Call
from support.exact import tolerance

LAYOUTS = {
    "no text": Layout(3, 2, 5),
    "text before": Layout(2, 3, 3, text_before=7),
    "text after": Layout(2, 3, 3, text_after=5),
    "both": Layout(1, 4, 3, 2, 3),
}


def softmax_map(call: Call) -> Tensor:
    """The attention map [B, H, N, N] in float64, mask and all."""
    q, k = call.query.double(), call.key.double()
    scores = q @ k.mT * (call.scale or q.shape[-1] ** -0.5)
    return (scores + bias(call)).softmax(-1)


def bias(call: Call) -> Any:
    mask = call.attn_mask
    if mask is None:
        return 0.0
    return torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask


def target_map(kind: str, call: Call, rows: slice, layout: Layout) -> Tensor:
    """The map [B, H, N, N] toward which `rows` are pulled, made of the definitions."""
    q, k, n = call.query.double(), call.key.double(), layout.tokens
    scores = q @ k.mT * (call.scale or q.shape[-1] ** -0.5) + bias(call)
    video = torch.arange(n)[layout.text_before : layout.text_before + layout.video]
    if kind == "identity":
        return torch.eye(n).double().expand(scores.shape)
    if kind == "zero":
        return torch.zeros_like(scores)
    if kind == "uniform":
        return (torch.zeros_like(scores) + bias(call)).softmax(-1)
    if kind == "query-mean":
        mean = q[:, :, rows].mean(2, keepdim=True).expand(q.shape)
        return (mean @ k.mT * (call.scale or q.shape[-1] ** -0.5) + bias(call)).softmax(-1)
    hidden = torch.zeros(n, n, dtype=torch.bool)
    hidden[video[:, None], video] = ~torch.eye(len(video), dtype=torch.bool)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def product_of(layout: Layout, dtype: torch.dtype, masked: bool = False, batch: int = 2, heads: int = 3) -> Call:
    q, k, v = (torch.randn(batch, heads, layout.tokens, 4).to(dtype) for _ in range(3))
    mask = None
    if masked:  # a key of the text (or the last one) is padding
        mask = torch.ones(batch, 1, 1, layout.tokens, dtype=torch.bool)
        mask[:, :, :, 0 if layout.text_before else -1] = False
    return Call(q, k, v, mask)


def explicit(call: Call, kind: str, strength: float, rows: slice, heads: tuple[int, ...], layout: Layout) -> Tensor:
    attention = softmax_map(call)
    target = target_map(kind, call, rows, layout)
    for h in heads:
        attention[:, h, rows] = (1 - strength) * attention[:, h, rows] + strength * target[:, h, rows]
    return attention @ call.value.double()


@pytest.mark.parametrize("place", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_interpolated_map(kind: str, place: str) -> None:
    layout, heads = LAYOUTS[place], (0, 2)
    for strength, text, masked in product((0.0, 0.25, 0.5, 1.0), (False, True), (False, True)):
        if (kind == "self" and text) or (masked and not layout.has_text):
            continue
        call = product_of(layout, torch.float64, masked)
        rows = slice(0, layout.tokens)
        if not text:
            rows = slice(layout.text_before, layout.text_before + layout.video)
        dense = softmax_map(call) @ call.value
        before = dense.clone()
        got = perturbed(dense, call, heads, layout, kind=kind, strength=strength, text=text)
        want = explicit(call, kind, strength, rows, heads, layout)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert torch.equal(dense, before), "the input is left as it is"
        assert torch.equal(got[:, 1], before[:, 1]), "other heads are left alone"
        outside = [i for i in range(layout.tokens) if not rows.start <= i < rows.stop]
        assert torch.equal(got[:, :, outside], before[:, :, outside]), "other rows are left alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind: str, dtype: torch.dtype) -> None:
    layout = LAYOUTS["text after"]
    call = product_of(layout, dtype)
    rows = slice(0, layout.video)
    dense = (softmax_map(call) @ call.value.double()).to(dtype)
    got = perturbed(dense, call, (1,), layout, kind=kind, strength=0.5)
    want = explicit(call, kind, 0.5, rows, (1,), layout)
    target = (target_map(kind, call, rows, layout).to(dtype) @ call.value)[:, :, rows]
    low = dense.clone()
    low[:, 1, rows] = (0.5 * dense[:, 1, rows] + 0.5 * target[:, 1]).to(dtype)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max().item() <= tolerance(want, low)


def test_masks_with_a_row_for_each_query() -> None:
    layout = LAYOUTS["text after"]
    call = product_of(layout, torch.float64)
    mask = torch.ones(2, 1, layout.tokens, layout.tokens, dtype=torch.bool)
    mask[:, :, :, -2:] = False
    mask[:, :, -2:, -2:] = True
    call = Call(call.query, call.key, call.value, mask)
    dense = softmax_map(call) @ call.value
    for kind in KINDS:
        got = perturbed(dense, call, (0, 1), layout, kind=kind, strength=0.75)
        want = explicit(call, kind, 0.75, slice(0, layout.video), (0, 1), layout)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"self"}))  # a token's own key gets no bias there
def test_additive_masks(kind: str) -> None:
    layout = LAYOUTS["text before"]
    call = product_of(layout, torch.float64)
    call = Call(call.query, call.key, call.value, torch.randn(2, 3, layout.tokens, layout.tokens).double())
    dense = softmax_map(call) @ call.value
    rows = slice(7, 7 + layout.video)
    got = perturbed(dense, call, (2,), layout, kind=kind, strength=0.5)
    want = explicit(call, kind, 0.5, rows, (2,), layout)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_some_samples_of_a_batch() -> None:
    layout = LAYOUTS["no text"]
    call = product_of(layout, torch.float64, batch=4)
    dense = softmax_map(call) @ call.value
    got = perturbed(dense, call, (0,), layout, kind="identity", strength=1.0, samples=slice(0, 2))
    assert torch.equal(got[2:], dense[2:])
    assert torch.equal(got[:2, 0], call.value[:2, 0])


@given(st.floats(0, 1), st.floats(0, 1))
def test_strengths_are_points_on_one_line(u: float, w: float) -> None:
    """Linear interpolation: the perturbation at a mean strength is the mean of the perturbations."""
    torch.manual_seed(0)
    layout = LAYOUTS["both"]
    call = product_of(layout, torch.float64)
    dense = softmax_map(call) @ call.value
    outs = [perturbed(dense, call, (1,), layout, kind="uniform", strength=s) for s in (u, w, (u + w) / 2)]
    torch.testing.assert_close((outs[0] + outs[1]) / 2, outs[2])


def test_the_ends_are_exact() -> None:
    layout = LAYOUTS["no text"]
    call = product_of(layout, torch.float32)
    dense = torch.randn_like(call.value)
    ends = [perturbed(dense, call, (0, 1, 2), layout, kind="identity", strength=s) for s in (0.0, 1.0)]
    assert torch.equal(ends[0], dense)
    assert torch.equal(ends[1], call.value)


@pytest.mark.parametrize("by_row", [False, True])
def test_a_token_and_the_text_under_an_added_mask(by_row: bool) -> None:
    """Kind "self" by the formula: softmax over the token's own key and those of the text, each with what is added."""
    layout, heads, dim = Layout(1, 2, 3, 3, 1), 2, 8
    n, seeded = layout.tokens, torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, heads, n, dim, generator=seeded)
    mask = torch.randn(1, 1, n if by_row else 1, n, generator=seeded)
    out = perturbed(torch.zeros_like(v), Call(q, k, v, mask), (0, 1), layout, kind="self", strength=1.0)
    scores = q.double() @ k.double().mT * dim**-0.5 + mask
    seen = torch.eye(n, dtype=torch.bool)
    seen[:, :3] = seen[:, -1:] = True
    want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()
    torch.testing.assert_close(out[:, :, layout.span].double(), want[:, :, layout.span], atol=1e-5, rtol=1e-5)


def test_the_mean_query_is_of_the_queries_that_there_are() -> None:
    layout = Layout(1, 2, 3, 3, 0, asked=((3, 9),))
    q, k, v = torch.randn(3, 1, 1, 9, 8, generator=torch.Generator().manual_seed(0))
    q = q * layout.asks()[:, None]
    out = perturbed(torch.zeros_like(v), Call(q, k, v), (0,), layout, kind="query-mean", strength=1.0, text=True)
    mean = q[:, :, 3:].mean(2, keepdim=True)
    torch.testing.assert_close(out, (mean @ k.mT * 8**-0.5).softmax(-1) @ v.expand(1, 1, 9, 8) + torch.zeros_like(out))
