from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffsparse
from diffsparse import GNA, AdaSpa, Schedule
from diffsparse.errors import DenseFallbackError
from diffsparse.orders.layout import Layout, Span
from diffsparse.orders.named import permutation, permutation_on
from diffsparse.seam import geometry
from diffsparse.seam.geometry import Beside, Geometry, Grid
from diffsparse.seam.models import (
    SPECS,
    ModelSpec,
    Patch,
    channels_last_grid,
    frames_first_grid,
    latent_grid,
    list_grid,
    packed_grid,
    patch_of,
    spec_of,
    unlisted_grid,
)
from support.tiny_transformers import Shape, build, inputs, tensors

KINDS = ("text", "audio", "condition", "reference")


def _parts(draw, least=0):
    """Runs of tokens beside the grid, as (kind, tokens, grid)."""
    sizes = st.tuples(*(st.integers(1, 3) for _ in range(3)))
    parts = draw(st.lists(st.tuples(st.sampled_from(KINDS), sizes, st.booleans()), max_size=3))
    return [(kind, math.prod(size), size if known else None) for kind, size, known in parts]


@st.composite
def layouts(draw, partial=True):
    size, before, after = [draw(st.integers(1, 5)) for _ in range(3)], _parts(draw), _parts(draw)
    first, start, spans = sum(n for _, n, _ in before), 0, []
    for kind, n, grid in (*before, ("grid", math.prod(size), None), *after):
        if kind not in ("grid", "text"):
            spans.append(Span(start, n, kind, grid))
        start += n
    layout = Layout(*size, first, sum(n for _, n, _ in after), tuple(spans))
    runs = draw(st.lists(st.integers(0, layout.tokens), max_size=4, unique=True)) if partial else []
    runs = sorted(runs)[: len(runs) // 2 * 2]
    return replace(layout, asked=tuple(zip(runs[::2], runs[1::2], strict=True)))


def kinds_of(layout):
    """What each token is."""
    kinds = ["text"] * layout.tokens
    for start, stop, kind in (
        (layout.text_before, layout.text_before + layout.video, "grid"),
        *((span.start, span.stop, span.kind) for span in layout.spans),
    ):
        kinds[start:stop] = [kind] * (stop - start)
    return kinds


def asking(layout):
    runs = layout.asked or ((0, layout.tokens),)
    return [any(first <= token < last for first, last in runs) for token in range(layout.tokens)]


LAYOUTS = layouts()
WORDS, IMAGE = (Beside(7, "text"),), (Beside(12),)


@given(LAYOUTS, st.integers(1, 12), st.integers(1, 12))
def test_the_sink_covers_exactly_the_blocks_that_are_never_dropped(layout, rows, columns):
    kinds, asks = kinds_of(layout), asking(layout)

    def blocks(tokens, block):
        return [any(tokens[start : start + block]) for start in range(0, layout.tokens, block)]

    asked = blocks(asks, rows)
    by_row = [a and b for a, b in zip(blocks([kind in ("text", "audio") for kind in kinds], rows), asked, strict=True)]
    by_column = blocks([kind in ("text", "audio", "condition") for kind in kinds], columns)
    assert layout.asked_blocks(rows).tolist() == asked
    assert layout.exact_rows(rows).tolist() == by_row
    assert layout.exact_keys(columns).tolist() == by_column
    assert layout.asks().tolist() == asks
    assert layout.queries == sum(asks)
    sink = layout.sink((rows, columns))
    assert (sink is None) == (not any(by_column))
    assert sink is None or sink.tolist() == [[a or b for b in by_column] for a in by_row]


@given(LAYOUTS)
def test_rows_are_gathered_and_scattered(layout):
    x = torch.arange(1.0, layout.tokens + 1)[None, None, :, None]
    some = layout.gathered(x)
    asks = torch.tensor(asking(layout))
    assert torch.equal(some[0, 0, :, 0], x[0, 0, asks, 0])
    assert torch.equal(layout.scattered(some)[0, 0, :, 0], x[0, 0, :, 0] * asks)


@given(LAYOUTS)
def test_all_beside_the_grid_can_stand_behind_it(layout):
    behind = layout.text_last()
    order = [*range(*layout.span.indices(layout.tokens)), *(t for t, k in enumerate(kinds_of(layout)) if k != "grid")]
    assert (behind.tokens, behind.video, behind.text_before) == (layout.tokens, layout.video, 0)
    assert asking(behind) == [asking(layout)[token] for token in order]


@given(layouts(partial=False))
def test_a_part_of_the_tokens_asks(layout):
    kinds = kinds_of(layout)
    images = sum(kind in ("condition", "reference") for kind in kinds)
    assert layout.asked_by(layout.video).gathered(torch.ones(1, 1, layout.tokens, 1)).shape[2] == layout.video
    found = layout.asked_by(layout.tokens - images)
    assert found.queries == layout.tokens - images
    assert layout.asked_by(layout.tokens + 1) is None


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
        (ModelSpec("before"), Grid(3, 4, 5, after=WORDS), 77, Layout(3, 4, 5, 10, 7)),
        (ModelSpec("before"), Grid(3, 4, 5, after=WORDS), 62, None),
        (ModelSpec("before"), Grid(1, 4, 5, after=IMAGE), 39, Layout(1, 4, 5, 7, 12, (Span(27, 12, "reference"),))),
        (ModelSpec("before"), Grid(3, 4, 5, after=IMAGE), 79, Layout(3, 4, 5, 7, 12, (Span(67, 12, "condition"),))),
        (ModelSpec("after"), Grid(3, 4, 5, before=IMAGE), 79, Layout(3, 4, 5, 12, 7, (Span(0, 12, "condition"),))),
        (ModelSpec(), Grid(3, 4, 5, before=IMAGE), 72, Layout(3, 4, 5, 12, 0, (Span(0, 12, "condition"),))),
        (ModelSpec("before", ahead="condition"), Grid(3, 4, 5), 67, Layout(3, 4, 5, 7, 0, (Span(0, 7, "condition"),))),
        (ModelSpec("before"), Grid(1, 4, 5, after=IMAGE), 20, Layout(1, 4, 5)),  # the image alone attends to itself
        (ModelSpec("before"), Grid(1, 4, 5, after=(Beside(12, grid=(1, 3, 4)),)), 12, Layout(1, 3, 4)),  # another does
        (ModelSpec("after"), Grid(3, 4, 5), 20, None),  # as many words as a frame has tokens: no frame
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
        "references",
        "conditions",
        "conditions-text-after",
        "conditions-no-text",
        "history",
        "alone",
        "reference-alone",
        "refiner",
    ],
)
def test_layout_of_a_sequence(spec, grid, tokens, expected):
    assert spec.layout(grid, tokens) == expected


def rows(height: int, width: int, image: int = 0, top: int = 0, left: int = 0, axes: int = 3) -> torch.Tensor:
    """Ids [height x width, axes] of the tokens of one image."""
    ids = torch.zeros(height, width, axes)
    ids[..., 0] = image
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None] + top, torch.arange(width) + left
    return ids.flatten(0, 1)


def grid(reader, patch: Patch, **inputs) -> Grid | None:
    return reader(patch, inputs).grid()


def packed(ids: torch.Tensor, **inputs) -> Grid | None:
    return grid(packed_grid, Patch(1, 1), hidden_states=torch.empty(1, len(ids), 8), img_ids=ids, **inputs)


def test_grids():
    patch = Patch(1, 2)
    assert grid(latent_grid, patch, hidden_states=torch.empty(2, 16, 5, 8, 6)) == Grid(5, 4, 3)
    assert grid(latent_grid, patch, hidden_states=torch.empty(2, 4, 8, 6)) == Grid(1, 4, 3)
    tokens = torch.empty(2, 60, 8)
    assert grid(latent_grid, Patch(1, 1), hidden_states=tokens, num_frames=3, height=4, width=5) == Grid(3, 4, 5)
    assert grid(latent_grid, Patch(1, 1), hidden_states=tokens) is None
    assert grid(list_grid, patch, x=[torch.empty(16, 1, 8, 6)] * 2) == Grid(1, 4, 3)
    assert grid(list_grid, patch, x=[torch.empty(16, 1, 8, 6), torch.empty(16, 1, 8, 8)]) is None


def test_axes_are_not_guessed():
    patch = Patch(1, 2, frozenset({16}))
    for shape, expected in (
        ((16, 4, 8, 6), Grid(4, 4, 3)),
        ((4, 16, 8, 6), None),  # frames first
        ((32, 16, 24, 33), None),  # Kandinsky 6, image to video: 16 x 12 x 16 would make as many tokens
        ((16, 16, 8, 6), None),  # could be either
        ((16, 8, 6), Grid(1, 4, 3)),
    ):
        assert grid(unlisted_grid, patch, hidden_states=torch.empty(1, *shape)) == expected, shape
    assert grid(frames_first_grid, patch, hidden_states=torch.empty(1, 16, 16, 8, 6)) == Grid(16, 4, 3)
    assert SPECS["Kandinsky5Transformer3DModel"].grid is channels_last_grid
    assert grid(channels_last_grid, patch, hidden_states=torch.empty(1, 32, 16, 24, 33)) == Grid(32, 8, 12)


def test_a_class_without_a_row_is_read_by_its_channels():
    class Stranger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Conv3d(6, 8, (1, 2, 2), (1, 2, 2))

    assert spec_of(Stranger()).grid is unlisted_grid
    assert patch_of(Stranger()).channels == {6}


def test_packed_grid_reads_ids_and_shapes():
    tokens = torch.empty(1, 20, 8)
    assert packed(rows(4, 5)) == Grid(1, 4, 5)
    assert packed(rows(4, 5, axes=4)[None][0], img_shapes=None) == Grid(1, 4, 5)
    assert grid(packed_grid, Patch(1, 1), hidden_states=tokens, img_ids=rows(4, 5)[None]) == Grid(1, 4, 5)
    assert grid(packed_grid, Patch(1, 1), hidden_states=tokens, img_shapes=[[(1, 4, 5)]]) == Grid(1, 4, 5)
    words_ahead = torch.cat([torch.zeros(7, 3), rows(4, 5)])
    assert grid(packed_grid, Patch(1, 1), hidden_states=tokens, position_ids=words_ahead) == Grid(1, 4, 5)
    assert packed(rows(4, 5, image=1, top=512, left=512)) == Grid(1, 4, 5)
    assert packed(rows(1, 5)) == Grid(1, 1, 5)
    assert packed(rows(5, 1)) == Grid(1, 5, 1)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(4, 5, 1)], Grid(2, 4, 5)),  # as large: another frame
        ([(4, 5, 10), (4, 5, 20)], Grid(3, 4, 5)),
        ([(3, 5, 1)], Grid(1, 4, 5, after=(Beside(15, grid=(1, 3, 5)),))),
        ([(8, 9, 1)], Grid(1, 4, 5, after=(Beside(72, grid=(1, 8, 9)),))),
        ([(2, 10, 0)], Grid(1, 4, 5, after=(Beside(20, grid=(1, 2, 10)),))),  # as many tokens
        ([(4, 5, 1), (3, 5, 1)], Grid(2, 4, 5, after=(Beside(15, grid=(1, 3, 5)),))),
    ],
)
def test_references_follow_the_image(parts, expected):
    found = packed(torch.cat([rows(4, 5), *(rows(*part) for part in parts)]))
    assert found == expected
    assert bool(found.note) == bool(expected.after)
    shapes = [[(1, 4, 5), *((1, *part[:2]) for part in parts)]]
    tokens = torch.empty(1, sum(f * h * w for f, h, w in shapes[0]), 8)
    assert grid(packed_grid, Patch(1, 1), hidden_states=tokens, img_shapes=shapes) == expected


@given(LAYOUTS, st.lists(st.tuples(*(st.integers(1, 3) for _ in range(3))), max_size=2))
def test_cells_hold_each_token_of_an_image_once(layout, sizes):
    start, spans = layout.tokens, list(layout.spans)
    for size in sizes:
        spans.append(Span(start, math.prod(size), "reference", size))
        start += spans[-1].tokens
    layout = replace(layout, text_after=layout.text_after + start - layout.tokens, spans=tuple(spans))
    cells = layout.cells()
    ours = [*range(*layout.span.indices(layout.tokens))]
    for span in layout.spans:
        ours += range(span.start, span.stop) if span.kind == "reference" and span.grid else ()
    assert cells[cells >= 0].tolist() == ours
    assert torch.equal(
        cells[: layout.frames, : layout.height, : layout.width].flatten(), torch.arange(layout.tokens)[layout.span]
    )
    assert Layout.of(json.loads(json.dumps(asdict(layout)))) == layout


def test_a_layout_of_an_earlier_release():
    old = {"frames": 1, "height": 2, "width": 3, "text_before": 5, "text_after": 7}
    assert Layout.of({**old, "plain_before": 0, "plain_after": 0, "references": []}) == Layout(1, 2, 3, 5, 7)
    found = Layout.of({**old, "plain_before": 2, "plain_after": 6, "references": [[1, 2, 3]]})
    assert found == Layout(1, 2, 3, 5, 7, (Span(3, 2, "reference"), Span(11, 6, "reference")))


def test_no_geometry_is_told():
    for ids in (torch.zeros(20, 3), torch.arange(20.0)[:, None].expand(-1, 3)):
        found = packed(ids)
        assert found == Grid(1, 1, 20, known=False)
        assert "not known" in found.note
    assert not grid(packed_grid, Patch(1, 1), hidden_states=torch.empty(1, 20, 8)).known


@pytest.mark.parametrize(
    ("ahead", "behind", "expected"),
    [
        ([], [], Grid(3, 4, 5)),
        ([(2, 3)], [], Grid(3, 4, 5, before=(Beside(6, grid=(1, 2, 3)),))),  # LTX
        ([], [(2, 3)], Grid(3, 4, 5, after=(Beside(6, grid=(1, 2, 3)),))),  # LTX 2
        ([(4, 5)], [], Grid(3, 4, 5, before=(Beside(20, grid=(1, 4, 5)),))),  # a keyframe of the video's own size
        ([], [(4, 5)], Grid(4, 4, 5)),  # of a later time
    ],
)
def test_conditions_of_a_video(ahead, behind, expected):
    video = [rows(4, 5, image=frame) for frame in range(3)]
    places = torch.cat([*(rows(*size, image=7) for size in ahead), *video, *(rows(*size, image=9) for size in behind)])
    pixels = (places * torch.tensor([0.32, 32, 32])).T[None].repeat(2, 1, 1)  # [B, 3, N]
    tokens = torch.empty(2, len(places), 8)
    for coordinates in (pixels, torch.stack([pixels, pixels + 1], -1)):
        assert grid(latent_grid, Patch(1, 1), hidden_states=tokens, video_coords=coordinates) == expected
        sized = {"num_frames": 3, "height": 4, "width": 5, "video_coords": coordinates}
        assert grid(latent_grid, Patch(1, 1), hidden_states=tokens, **sized) == expected


def test_packed_grid_follows_a_new_tensor():
    for height, width in ((4, 5), (5, 4), (2, 10)):
        assert packed(rows(height, width)) == Grid(1, height, width)


def test_places_are_read_once_and_not_kept_alive():
    before = set(geometry._KEPT)
    ids = rows(4, 5)
    with torch.inference_mode():
        made = rows(4, 5)
        for places in (ids, ids.view(20, 3), made, made[:]):
            assert packed(places) == Grid(1, 4, 5)
    ours = set(geometry._KEPT) - before
    assert len(ours) == 2
    del ids, places, made
    assert all(storage.expired() for key in ours for storage, _ in key)
    packed(rows(2, 3))
    assert not ours & set(geometry._KEPT)


def test_geometry_of_nothing():
    assert Geometry().grid() is None


def test_tables_made_under_inference_mode_serve_everywhere():
    layout = Layout(2, 3, 7, 5)
    with torch.inference_mode():
        tables = [*permutation("hilbert", layout), *permutation_on("FWH", layout, torch.device("cpu"))]
        tables.append(layout.exact_keys(4))
    assert not any(table.is_inference() for table in tables)


def test_strategies_that_need_a_grid_run_dense_without_one():
    model, arguments = build("FluxTransformer2DModel"), inputs("FluxTransformer2DModel", Shape(1, 16, 16))
    arguments["img_ids"] = torch.zeros_like(arguments["img_ids"])
    for strategy in (GNA(window=(1, 3, 3), block=8), AdaSpa(block=8, order="tile1x2x4")):
        with diffsparse.apply(model, strategy, schedule=Schedule(0)) as handle:
            tensors(model, arguments)
        report = handle.report()
        assert report.fallbacks == {"no geometry": 2}
        assert "not known" in report.notes[0]
        with diffsparse.apply(model, strategy, schedule=Schedule(0), strict=True), pytest.raises(DenseFallbackError):
            tensors(model, arguments)
    with diffsparse.apply(model, AdaSpa(block=8), schedule=Schedule(0), strict=True) as handle:
        tensors(model, arguments)
    assert "not known" in handle.report().notes[0]
