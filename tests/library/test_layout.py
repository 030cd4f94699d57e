from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsparse.layout import Layout
from diffsparse.models import Grid, ModelSpec, Patch, latent_grid, list_grid, packed_grid

LAYOUTS = st.builds(
    Layout, *(st.integers(1, 5) for _ in range(3)), text_before=st.integers(0, 9), text_after=st.integers(0, 9)
)


@given(LAYOUTS, st.integers(1, 12))
def test_text_sink_covers_exactly_the_blocks_with_text(layout, block):
    text = [not layout.text_before <= t < layout.text_before + layout.video for t in range(layout.tokens)]
    by_block = [any(text[start : start + block]) for start in range(0, layout.tokens, block)]
    assert layout.text_blocks(block).tolist() == by_block
    assert layout.blocks(block) == len(by_block)
    sink = layout.text_sink(block)
    if not layout.has_text:
        assert sink is None
    else:
        assert sink.tolist() == [[a or b for b in by_block] for a in by_block]


@given(LAYOUTS)
def test_counts(layout):
    assert layout.tokens == layout.text_before + layout.video + layout.text_after
    assert str(layout.tokens) in str(layout)


@pytest.mark.parametrize(
    ("spec", "grid", "tokens", "expected"),
    [
        (ModelSpec(), Grid(3, 4, 5), 60, Layout(3, 4, 5)),
        (ModelSpec(), Grid(3, 4, 5), 61, None),  # text that this class can't have: cross- or text attention
        (ModelSpec(), Grid(3, 4, 5), 20, Layout(1, 4, 5)),  # frames are in the batch
        (ModelSpec(), Grid(3, 4, 5), 3, None),  # temporal attention
        (ModelSpec(), None, 60, None),
        (ModelSpec("before"), Grid(3, 4, 5), 67, Layout(3, 4, 5, 7)),
        (ModelSpec("after"), Grid(3, 4, 5), 67, Layout(3, 4, 5, 0, 7)),
        (ModelSpec("after"), Grid(3, 4, 5, after=7), 77, Layout(3, 4, 5, 10, 7)),
        (ModelSpec("after"), Grid(3, 4, 5, after=7), 62, None),
    ],
    ids=[
        "video",
        "unexpected-text",
        "spatial",
        "temporal",
        "no-grid",
        "text-before",
        "text-after",
        "text-both",
        "too-short",
    ],
)
def test_layout_of_a_sequence(spec, grid, tokens, expected):
    assert spec.layout(grid, tokens) == expected


def test_grids():
    assert latent_grid(Patch(1, 2), {"hidden_states": torch.empty(2, 16, 5, 8, 6)}) == Grid(5, 4, 3)
    assert latent_grid(Patch(1, 2), {"hidden_states": torch.empty(2, 4, 8, 6)}) == Grid(1, 4, 3)
    packed = {"hidden_states": torch.empty(2, 60, 8), "num_frames": 3, "height": 4, "width": 5}
    assert latent_grid(Patch(1, 1), packed) == Grid(3, 4, 5)
    assert latent_grid(Patch(1, 1), {"hidden_states": torch.empty(2, 60, 8)}) is None
    assert list_grid(Patch(1, 2), {"x": [torch.empty(16, 1, 8, 6)] * 2}) == Grid(1, 4, 3)
    assert list_grid(Patch(1, 2), {"x": [torch.empty(16, 1, 8, 6), torch.empty(16, 1, 8, 8)]}) is None


def test_packed_grid_reads_ids_and_shapes():
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(5.0))
    tokens = torch.empty(1, 20, 8)
    assert packed_grid(Patch(1, 1), {"hidden_states": tokens, "img_ids": ids}) == Grid(1, 4, 5)
    assert packed_grid(Patch(1, 1), {"hidden_states": tokens, "img_shapes": [[(1, 4, 5)]]}) == Grid(1, 4, 5)
    with_reference = torch.empty(1, 40, 8)
    assert packed_grid(Patch(1, 1), {"hidden_states": with_reference, "img_ids": ids}) == Grid(1, 1, 40)


def test_packed_grid_follows_a_new_tensor():
    for height, width in ((4, 5), (5, 4), (2, 10)):
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
        inputs = {"hidden_states": torch.empty(1, 20, 8), "img_ids": ids}
        assert packed_grid(Patch(1, 1), inputs) == Grid(1, height, width)
