"""Sequences of several parts: any order of text, audio, conditions, references, and queries of a part of the tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsparse import GNA, AdaSpa, Digest, Layout, Random, Tangent
from diffsparse.orders.layout import Span
from diffsparse.site.compute import DenseBackend
from diffsparse.strategies.base import in_order
from support.exact import eager, softmax_attention, tolerance
from support.sites import row_share, site
from support.strategies import HEADS, NAMES, every

KINDS = ("text", "audio", "condition", "reference")
BLOCK = 8
WHOLE = {
    "AdaSpa": AdaSpa(0.0, block=BLOCK),
    "tiles": AdaSpa(0.0, block=BLOCK, order="tile1x2x2"),
    "Tangent": Tangent(0.0, block=BLOCK),
    "Digest": Digest(0.0, block=BLOCK),
    "Random": Random(0.0, block=BLOCK),
    "GNA": GNA(window=(9, 9, 9), block=BLOCK),
}
SPARSE = {
    "AdaSpa": AdaSpa(0.6, block=BLOCK),
    "tiles": AdaSpa(0.6, block=BLOCK, order="tile1x2x2"),
    "Tangent": Tangent(0.4, block=BLOCK),
    "Digest": Digest(0.4, block=BLOCK),
    "Random": Random(0.6, block=BLOCK),
    "GNA": GNA(window=(1, 3, 3), block=BLOCK),
}


@st.composite
def sequences(draw: Any) -> tuple[Layout, int, int]:
    """A layout, the number of samples, and a seed."""
    edge = st.integers(1, 4)
    size = (draw(edge), draw(st.integers(2, 6)), draw(st.integers(2, 6)))
    part = st.tuples(st.sampled_from(KINDS), st.tuples(st.integers(1, 2), edge, edge), st.booleans())
    before, after = (draw(st.lists(part, max_size=3)) for _ in range(2))
    layout, start, spans = Layout(*size), 0, []
    for kind, grid, known in (*before, ("video", size, True), *after):
        tokens = math.prod(grid)
        if kind not in ("video", "text"):
            spans.append(Span(start, tokens, kind, grid if known else None))
        start += tokens
    first = sum(math.prod(grid) for _, grid, _ in before)
    layout = replace(layout, text_before=first, text_after=start - first - layout.video, spans=tuple(spans))
    part_asks = draw(st.sampled_from(("all", "grid", "no images")))
    images = sum(span.tokens for span in spans if span.kind in ("condition", "reference"))
    queries = {"all": start, "grid": layout.video, "no images": start - images}[part_asks]
    if queries < start:
        layout = layout.asked_by(queries) or layout
    return layout, draw(st.integers(1, 2)), draw(st.integers(0, 99))


def rows(layout: Layout, *kinds: str) -> Tensor:
    """bool [N]: the tokens of these kinds that ask."""
    found = torch.tensor(["text" in kinds] * layout.tokens)
    found[layout.span] = "video" in kinds
    for span in layout.spans:
        found[span.start : span.stop] = span.kind in kinds
    return found & layout.asks()


def attended(strategy: Any, case: tuple[Layout, int, int], masked: bool) -> tuple[Tensor, Tensor, Any, float]:
    """Output, the oracle's, the site after the call, and the tolerance."""
    layout, samples, seed = case
    seeded = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(samples, HEADS, layout.tokens, 16, generator=seeded) for _ in range(3))
    q = q * layout.asks()[:, None]
    keys = torch.rand(samples, layout.tokens, generator=seeded) < 0.8 if masked else None
    if keys is not None:
        keys[:, layout.span] = True
    allowed = torch.ones(samples, 1, 1, layout.tokens, dtype=torch.bool) if keys is None else keys[:, None, None]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    want, _ = softmax_attention(q, k, v, allowed, 0.25)
    here = replace(site(layout, step=1, key_mask=keys), dense_backend=DenseBackend("native", dense))
    out = in_order(strategy, strategy.attend, (q, k, v), here)
    if here.record.kind != "sparse":  # what searches first
        out = in_order(strategy, strategy.attend, (q, k, v), replace(here, step=2))
    return out, want, here, 2 * tolerance(want, eager(q, k, v, allowed, 0.25))  # the fuzz is of thousands of rows


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=40, deadline=None)
@given(case=sequences(), masked=st.booleans())
def test_nothing_dropped_is_dense(name: str, case: tuple[Layout, int, int], masked: bool) -> None:
    out, want, _, most = attended(WHOLE[name], case, masked)
    asks = case[0].asks()
    torch.testing.assert_close(out[:, :, asks].double(), want[:, :, asks], atol=most, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(case=sequences(), masked=st.booleans())
def test_nothing_dropped_is_dense_in_any_strategy(name: str, case: tuple[Layout, int, int], masked: bool) -> None:
    """Plans, compensated and rounded ones, rivals."""
    out, want, _, most = attended(every(case[0], 0.0)[name], case, masked)
    asks = case[0].asks()
    torch.testing.assert_close(out[:, :, asks].double(), want[:, :, asks], atol=most, rtol=0)


@pytest.mark.parametrize("name", SPARSE)
@settings(max_examples=40, deadline=None)
@given(case=sequences(), masked=st.booleans())
def test_rows_of_text_and_audio_are_exact(name: str, case: tuple[Layout, int, int], masked: bool) -> None:
    out, want, _, most = attended(SPARSE[name], case, masked)
    exact = rows(case[0], "text", "audio")
    assert out[:, :, case[0].asks()].isfinite().all()
    torch.testing.assert_close(out[:, :, exact].double(), want[:, :, exact], atol=most, rtol=0)


@pytest.mark.parametrize("name", ["AdaSpa", "Random"])
@settings(max_examples=40, deadline=None)
@given(case=sequences())
def test_density_is_of_what_may_be_dropped(name: str, case: tuple[Layout, int, int]) -> None:
    """Rows of blocks that may be dropped keep their share of them, and all that may not."""
    layout = case[0]
    strategy = AdaSpa(0.6, block=BLOCK, head_adaptive=False) if name == "AdaSpa" else SPARSE[name]
    here = attended(strategy, case, False)[2]
    if here.record.kind == "sparse":
        assert float(here.record.density) == pytest.approx(row_share(layout, 0.6, BLOCK), rel=1e-5)
