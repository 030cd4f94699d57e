from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffsparse
from diffsparse import GNA, AdaSpa, Schedule
from diffsparse.errors import DenseFallbackError
from diffsparse.orders.layout import Layout
from diffsparse.orders.named import permutation, permutation_on
from diffsparse.seam import geometry
from diffsparse.seam.geometry import Geometry, Grid
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


@st.composite
def layouts(draw):
    edges = [draw(st.integers(1, 5)) for _ in range(3)]
    before, after = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return Layout(*edges, before, after, draw(st.integers(0, before)), draw(st.integers(0, after)))


LAYOUTS = layouts()


@given(LAYOUTS, st.integers(1, 12), st.integers(1, 12))
def test_text_sink_covers_exactly_the_blocks_with_text(layout, rows, columns):
    first, last = layout.text_before - layout.plain_before, layout.tokens - layout.text_after + layout.plain_after
    text = [not first <= t < last for t in range(layout.tokens)]
    by_row, by_column = (
        [any(text[start : start + block]) for start in range(0, layout.tokens, block)] for block in (rows, columns)
    )
    assert layout.text_blocks(rows).tolist() == by_row
    assert layout.blocks(rows) == len(by_row)
    sink, square = layout.text_sink((rows, columns)), layout.text_sink(rows)
    if not any(text):
        assert sink is square is None
    else:
        assert sink.tolist() == [[a or b for b in by_column] for a in by_row]
        assert square.tolist() == [[a or b for b in by_row] for a in by_row]


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
        (ModelSpec("before"), Grid(3, 4, 5, text_after=7), 77, Layout(3, 4, 5, 10, 7)),
        (ModelSpec("before"), Grid(3, 4, 5, text_after=7), 62, None),
        (ModelSpec("before"), Grid(1, 4, 5, after=12), 39, Layout(1, 4, 5, 7, 12, 0, 12)),
        (ModelSpec("after"), Grid(3, 4, 5, before=8), 75, Layout(3, 4, 5, 8, 7, 8, 0)),
        (ModelSpec(), Grid(3, 4, 5, before=8), 68, Layout(3, 4, 5, 8, 0, 8, 0)),
        (ModelSpec("before"), Grid(1, 4, 5, after=12), 20, Layout(1, 4, 5)),  # the image alone attends to itself
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
        "conditions-no-text",
        "alone",
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
    assert SPECS["Kandinsky6Transformer3DModel"].grid is channels_last_grid
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
        ([(3, 5, 1)], Grid(1, 4, 5, after=15, references=((1, 3, 5),))),
        ([(8, 9, 1)], Grid(1, 4, 5, after=72, references=((1, 8, 9),))),
        ([(2, 10, 0)], Grid(1, 4, 5, after=20, references=((1, 2, 10),))),  # as many tokens
        ([(4, 5, 1), (3, 5, 1)], Grid(2, 4, 5, after=15, references=((1, 3, 5),))),
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
    count = sum(f * h * w for f, h, w in sizes)
    layout = replace(layout, text_after=layout.text_after + count, plain_after=count, references=tuple(sizes))
    cells = layout.cells()
    start = layout.text_before
    assert cells[cells >= 0].tolist() == list(range(start, start + layout.video + count))
    assert torch.equal(
        cells[: layout.frames, : layout.height, : layout.width].flatten(), torch.arange(layout.tokens)[layout.span]
    )
    assert Layout(**json.loads(json.dumps(asdict(layout)))) == layout


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
        ([(2, 3)], [], Grid(3, 4, 5, before=6)),  # LTX
        ([], [(2, 3)], Grid(3, 4, 5, after=6, references=((1, 2, 3),))),  # LTX 2
        ([(4, 5)], [], Grid(4, 4, 5)),  # a keyframe of the video's own size
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
    before = set(geometry._RASTERS)
    ids = rows(4, 5)
    with torch.inference_mode():
        made = rows(4, 5)
        for places in (ids, ids.view(20, 3), made, made[:]):
            assert packed(places) == Grid(1, 4, 5)
    ours = set(geometry._RASTERS) - before
    assert len(ours) == 2
    del ids, places, made
    assert all(key[0].expired() for key in ours)
    packed(rows(2, 3))
    assert not ours & set(geometry._RASTERS)


def test_geometry_of_nothing():
    assert Geometry().grid() is None


def test_tables_made_under_inference_mode_serve_everywhere():
    layout = Layout(2, 3, 7, 5)
    with torch.inference_mode():
        tables = [*permutation("hilbert", layout), *permutation_on("FWH", layout, torch.device("cpu"))]
        tables.append(layout.text_blocks(4))
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
