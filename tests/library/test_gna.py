"""GNA: its masks against NATTEN's rule by brute force, its outputs against dense masked attention, its tiles."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse
from diffsparse import GNA, Layout, Schedule
from diffsparse.errors import ConfigError
from diffsparse.insight.cost import end_to_end
from diffsparse.orders.layout import Span
from diffsparse.strategies import parse
from diffsparse.strategies.gna.bounds import bounds_of
from diffsparse.strategies.gna.strategy import _tiled
from diffsparse.strategies.gna.windows import Axis
from support import exact
from support.sites import site
from support.tiny_pipelines import BUILDERS, run

CPU = torch.device("cpu")
ALWAYS = Schedule(dense_first=0)
pytestmark = pytest.mark.usefixtures("sparse_everywhere")


@pytest.fixture
def sparse_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 9.0)


def sees(query: int, key: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """NATTEN's rule for two cells of one axis, by looking at the cells that the query can reach at all."""
    if query % dilation != key % dilation:
        return False
    line = [cell for cell in range(length) if cell % dilation == query % dilation]
    size = min(window or len(line), len(line))
    jump = min(stride, size)
    mine = line.index(query)
    group = [i for i in range(len(line)) if i // jump == mine // jump]
    if causal:
        leader = min(mine // jump * jump + jump - 1, len(line) - 1)
        return key <= query and leader - line.index(key) < size
    leader = group[jump // 2] if jump // 2 < len(group) else line.index(line[-1])
    starts = range(len(line) - size + 1)  # of all windows that lie on the line: the one that is centred best
    start = min(starts, key=lambda first: abs(first + size // 2 - leader))
    return start <= line.index(key) < start + size


def brute(grid: Layout, gna: GNA) -> Tensor:
    """bool [video, video] in raster order, cell by cell; windows and strides that were left open are the tiling's."""
    cells = grid.frames, grid.height, grid.width
    tiling = gna.tiling(cells)
    windows, strides = gna.window or tiling.window, gna.stride or tiling.tile
    along = []
    for length, *rule in zip(cells, windows, strides, gna.dilation, gna.causal, strict=True):
        pairs = itertools.product(range(length), repeat=2)
        along.append(torch.tensor([sees(q, k, length, *rule) for q, k in pairs]).view(length, length))
    return torch.kron(torch.kron(along[0], along[1]), along[2])


def axes() -> Any:
    def strides(args: tuple[int, int, int, bool]) -> Any:
        length, window, dilation, causal = args
        return st.builds(
            Axis, st.just(length), st.just(window), st.integers(1, window), st.just(dilation), st.just(causal)
        )

    sizes = st.tuples(st.integers(1, 13), st.integers(1, 14), st.integers(1, 4), st.booleans())
    return sizes.flatmap(strides)


@settings(deadline=None, max_examples=300)
@given(axes(), st.integers(1, 6), st.integers(1, 6))
def test_an_axis_follows_the_rule(axis: Axis, edge: int, key_edge: int) -> None:
    rule = (axis.length, axis.window, axis.stride, axis.dilation, axis.causal)
    cells = axis.cells
    assert sorted(cells) == list(range(axis.length))
    seen = [{cells[place] for place in range(first, last + 1)} for first, last in axis.spans]
    for query, found in zip(cells, seen, strict=True):
        assert found == {key for key in range(axis.length) if sees(query, key, *rule)}
    touched = [{tile for keys in ranges for tile in keys} for ranges in axis.touched(edge, key_edge)]
    place = {cell: i for i, cell in enumerate(cells)}
    for tile, found in enumerate(touched):
        inside = seen[tile * edge : (tile + 1) * edge]
        assert found == {place[cell] // key_edge for cell in set().union(*inside)}
    tiles = [set(cells[start : start + edge]) for start in range(0, axis.length, edge)]
    own = [{tile for keys in ranges for tile in keys} for ranges in axis.touched(edge, edge)]
    whole = all(tiles[key] <= seen[i] for i in range(axis.length) for key in own[i // edge])
    assert axis.cuts(edge) is not whole


@pytest.mark.parametrize("length", [7, 8])
def test_every_query_sees_its_whole_window(length: int) -> None:
    for window in range(1, length + 1):
        for stride in range(1, window + 1):
            spans = Axis(length, window, stride).spans
            assert {last - first + 1 for first, last in spans} == {window}
            assert all(first <= query <= last for query, (first, last) in enumerate(spans))
    assert Axis(8, 4, 4).spans == ((0, 3),) * 4 + ((4, 7),) * 4
    assert Axis(6, 4).spans == ((0, 3), (0, 3), (0, 3), (1, 4), (2, 5), (2, 5))  # even windows reach back


CASES = {
    "slides": (Layout(5, 6, 7), GNA((3, 3, 3), (1, 1, 1), block=16)),
    "even": (Layout(4, 6, 6), GNA((2, 4, 2), (1, 2, 1), block=8)),
    "jumps": (Layout(4, 8, 8), GNA((2, 4, 4), (2, 4, 4), block=32)),
    "own stride": (Layout(5, 9, 7), GNA((3, 5, 4), block=16)),
    "dilated": (Layout(3, 11, 8), GNA((2, 3, 2), (1, 1, 1), (1, 3, 2), block=16)),
    "causal": (Layout(6, 5, 5), GNA((3, 3, 0), (2, 1, 1), causal=(True, False, False), block=8)),
    "causal and dilated": (Layout(7, 5, 6), GNA((2, 0, 3), dilation=(2, 1, 2), causal=(True, False, True), block=8)),
    "image": (Layout(1, 13, 11), GNA((8, 5, 5), (1, 2, 2), block=16)),
    "by sparsity": (Layout(5, 7, 9), GNA(sparsity=0.7, block=8)),
    "odd block": (Layout(3, 5, 6), GNA((2, 3, 3), block=12)),
}
TEXT = {"no text": (0, 0), "text before": (7, 0), "text after": (0, 9), "text around": (3, 5)}


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_that_of_the_masked_tokens(name: str, text: str, dtype: torch.dtype) -> None:
    grid, gna = CASES[name]
    before, after = TEXT[text]
    layout = Layout(grid.frames, grid.height, grid.width, before, after)
    allowed = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    inside = slice(before, before + layout.video)
    allowed[inside, inside] = brute(grid, gna)
    assert not allowed.all()
    q, k, v = torch.randn(3, 2, 3, layout.tokens, 16).to(dtype)
    keys = None
    if layout.has_text:  # padded in one sample of the two, with holes in the other
        keys = torch.ones(2, layout.tokens, dtype=torch.bool)
        keys[0, max(before - 2, 0) : before] = keys[0, layout.tokens - after // 2 :] = False
        keys[1, ::3] = False
        allowed = allowed & keys[:, None, None]
    got = gna.attend(q, k, v, site(layout, key_mask=keys))
    want, _ = exact.softmax_attention(q, k, v, allowed, 0.25)
    low = exact.eager(q, k, v, allowed, 0.25)
    assert (got.double() - want).abs().max().item() <= exact.tolerance(want, low)


REFERENCES = {
    "smaller": ((1, 7, 8),),
    "larger": ((1, 15, 16),),
    "as large": ((1, 12, 14),),
    "two": ((1, 7, 8), (2, 5, 15)),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("window", [(0, 3, 3), (1, 4, 4)], ids=["all images", "own image"])
def test_references_are_further_frames(name: str, window: tuple[int, int, int]) -> None:
    """The windows of a grid that holds all images, without the cells that none of them has."""
    sizes, gna = REFERENCES[name], GNA(window, (1, 1, 1), block=8)
    count = sum(f * h * w for f, h, w in sizes)
    starts = itertools.accumulate((f * h * w for f, h, w in sizes), initial=5 + 12 * 14)
    spans = (Span(start, math.prod(size), "reference", size) for start, size in zip(starts, sizes, strict=False))
    layout = Layout(1, 12, 14, 5, count + 3, tuple(spans))
    cells = layout.cells()
    there = cells.flatten() >= 0
    allowed = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    inside = slice(5, layout.tokens - 3)
    allowed[inside, inside] = brute(Layout(*cells.shape), gna)[there][:, there]
    q, k, v = torch.randn(3, 2, 3, layout.tokens, 16)
    here = site(layout)
    got = gna.attend(q, k, v, here)
    assert here.record.kind == "sparse"
    want, _ = exact.softmax_attention(q, k, v, allowed, 0.25)
    assert (got.double() - want).abs().max().item() <= exact.tolerance(want, exact.eager(q, k, v, allowed, 0.25))


ALIGNED = {
    "blocked": ((4, 8, 8), (2, 4, 4), (2, 4, 4)),
    "overlapping": ((8, 12, 16), (2, 12, 12), (2, 4, 4)),
    "whole axis": ((7, 8, 8), (0, 8, 4), (1, 8, 4)),
    "image": ((1, 32, 32), (1, 8, 24), (1, 8, 8)),
}


@pytest.mark.parametrize("name", ALIGNED)
@pytest.mark.parametrize("heads", [1, 3])
def test_aligned_windows_are_block_sparse(name: str, heads: int) -> None:
    """No boxes, no gaps, and the computed blocks are just what windows show: the FLOP bound is reached."""
    grid, window, stride = ALIGNED[name]
    gna = GNA(window, stride, block=32)
    tiled, bounds = _tiled(gna, Layout(*grid), heads, CPU), bounds_of(gna.tiling(grid))
    assert tiled.boxes is None
    assert tiled.orders.filled is None
    assert float(tiled.lists.density()) == pytest.approx(bounds.density, abs=1e-6)
    assert bounds.density == pytest.approx(1 - bounds.sparsity)
    assert bounds.tile_bound == pytest.approx(bounds.flop_bound)


@pytest.mark.parametrize("grid", [(5, 7, 9), (1, 13, 10), (4, 8, 8)])
@pytest.mark.parametrize("stride", [None, (1, 2, 2)])
def test_the_report_says_what_the_simulator_says(grid: tuple[int, int, int], stride: Any) -> None:
    gna, at = GNA((2, 4, 4), stride, block=8), site(Layout(*grid))
    gna.attend(*torch.randn(3, 1, 2, at.layout.tokens, 8), at)
    assert float(at.record.density) == pytest.approx(bounds_of(gna.tiling(grid)).density, abs=1e-6)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("grid", [(21, 30, 52), (33, 45, 80), (17, 16, 16), (1, 64, 64), (13, 17, 19)])
def test_windows_for_a_sparsity(grid: tuple[int, int, int], sparsity: float) -> None:
    """Within the budget, not far below it, with something of each axis."""
    tiling = GNA(sparsity=sparsity).tiling(grid)
    density = bounds_of(tiling).density
    assert 0.75 * (1 - sparsity) <= density <= 1.05 * (1 - sparsity) or grid == (13, 17, 19)
    shares = [size / length for size, length in zip(tiling.window, grid, strict=True)]
    assert min(shares) >= 0.3 * (1 - sparsity) ** (1 / 3)
    if all(length % edge == 0 for length, edge in zip(grid, tiling.tile, strict=True)):
        assert not tiling.cuts


def test_windows_as_large_as_the_grid_are_dense() -> None:
    for gna in (GNA((0, 0, 0)), GNA((9, 9, 9), block=8), GNA(sparsity=0.0)):
        at = site(Layout(3, 4, 5, text_after=2))
        q, k, v = torch.randn(3, 1, 2, 62, 8)
        assert torch.equal(gna.attend(q, k, v, at), torch.nn.functional.scaled_dot_product_attention(q, k, v))
        assert at.record.planned
        assert at.record.reason == "windows that touch every block"


def test_a_dense_answer_is_that_of_the_unmoved_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 0.0)
    at = site(Layout(4, 8, 8, text_before=3))
    q, k, v = torch.randn(3, 1, 2, 259, 8)
    assert torch.equal(GNA().attend(q, k, v, at), torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert "break-even" in at.record.reason


def test_calls_share_what_was_made_for_the_first() -> None:
    layout, gna = Layout(4, 4, 8), GNA(block=8)
    q, k, v = torch.randn(3, 1, 2, 128, 8)
    memories: list[dict[str, Any]] = [{}, {}]
    for memory in memories:
        gna.attend(q, k, v, site(layout, memory=memory))
    assert memories[0]["tiled"] is memories[1]["tiled"]
    shared = weakref.ref(memories[0]["tiled"])
    memories.clear()
    del memory
    assert shared() is None  # nothing outlives the run


# Figures of the paper's tables: grid, window, query and key tile, share of attention; stride -> bound end to end.
# The tiles of the second, third and fourth are inferred.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "HunyuanVideo, 91 %": ((30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8), 0.607),
    "HunyuanVideo, 58 %": ((30, 48, 80), (30, 40, 40), (2, 16, 8), (2, 8, 8), 0.607),
    "FLUX at 4K": ((1, 256, 256), (1, 80, 80), (1, 16, 16), (1, 16, 8), 0.518),
    "Cosmos, 56 %": ((16, 44, 80), (16, 32, 48), (8, 4, 8), (4, 4, 8), 0.587),
    "Cosmos, 89 %": ((16, 44, 80), (16, 24, 16), (8, 4, 8), (4, 4, 8), 0.587),
}
TILE_BOUNDS = {
    "HunyuanVideo, 91 %": {
        (1, 1, 1): 1.73,
        (4, 4, 4): 1.78,
        (1, 1, 8): 1.99,
        (4, 4, 8): 2.02,
        (1, 8, 8): 2.17,
        (8, 8, 8): 2.20,
        (16, 8, 8): 2.23,
        (18, 24, 24): 2.06,  # jumps by its size: blocked attention
    },
    "HunyuanVideo, 58 %": {(1, 1, 1): 1.21, (1, 1, 8): 1.44, (1, 32, 8): 1.55, (30, 40, 40): 1.44},
    "FLUX at 4K": {(1, 1, 1): 1.76, (1, 16, 8): 1.84, (1, 16, 16): 1.88},
    "Cosmos, 56 %": {(1, 1, 1): 1.35, (1, 8, 16): 1.50},
    "Cosmos, 89 %": {(1, 8, 16): 2.10},
}
FLOP_BOUNDS = {  # end to end, sparsity
    "HunyuanVideo, 91 %": (2.23, 0.91),
    "HunyuanVideo, 58 %": (1.55, 0.58),
    "FLUX at 4K": (1.88, 0.90),
    "Cosmos, 56 %": (1.50, 0.56),
    "Cosmos, 89 %": (2.10, 0.89),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_simulator_gives_the_published_bounds(name: str) -> None:
    grid, window, q_tile, kv_tile, share = PUBLISHED[name]
    for stride, bound in TILE_BOUNDS[name].items():
        bounds = bounds_of(GNA(window, stride).tiling(grid, q_tile), kv_tile)
        assert end_to_end(share, bounds.tile_bound) == pytest.approx(bound, abs=0.02), stride
        flops, sparsity = FLOP_BOUNDS[name]
        assert end_to_end(share, bounds.flop_bound) == pytest.approx(flops, abs=0.02)
        assert bounds.sparsity == pytest.approx(sparsity, abs=0.01)


@pytest.mark.parametrize(
    ("name", "dense", "bound"),
    [("Cosmos, 56 %", 12 / 35, 1.28), ("HunyuanVideo, 91 %", 15 / 50, 1.63), ("FLUX at 4K", 9 / 28, 1.46)],
)
def test_the_bounds_with_dense_steps(name: str, dense: float, bound: float) -> None:
    grid, window, q_tile, _, share = PUBLISHED[name]
    flops = bounds_of(GNA(window).tiling(grid, q_tile)).flop_bound
    assert end_to_end(share, flops, dense) == pytest.approx(bound, abs=0.02)


class Masked:
    """Dense attention under GNA's mask, token by token, as NATTEN's rule has it."""

    def __init__(self, gna: GNA, dtype: torch.dtype) -> None:
        self.gna, self.dtype = gna, dtype

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        layout = site.layout
        allowed = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
        inside = slice(layout.text_before, layout.text_before + layout.video)
        allowed[inside, inside] = brute(layout.grid, self.gna)
        if site.key_mask is not None:
            allowed = allowed & site.key_mask[:, None, None]
        site.record.ran_sparse(allowed.float().mean(), "masked")  # so that rows of padded text are repaired alike
        scale = q.shape[-1] ** -0.5 if site.scale is None else site.scale
        return exact.eager(*(x.to(self.dtype) for x in (q, k, v)), allowed, scale).to(q.dtype)


FAMILIES = ["wan", "hunyuan_video", "cogvideox", "ltx", "flux", "sd3", "qwen_image"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("knobs", [{}, {"window": (2, 2, 3), "stride": (1, 1, 1)}], ids=["sparsity", "windows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_run_as_under_a_dense_mask(family: str, knobs: dict[str, Any]) -> None:
    pipe, call = BUILDERS[family]()
    gna, outs = GNA(block=4, sparsity=0.6, **knobs), []
    for strategy in (gna, Masked(gna, torch.float32), Masked(gna, torch.float64)):
        with diffsparse.apply(pipe, strategy, schedule=ALWAYS, strict=True) as handle:
            outs.append(run(pipe, call))
        assert handle.report().sparse_calls > 0
        assert handle.report().sparse_density < 0.95
    sparse, low, want = outs
    assert (sparse.double() - want).abs().max().item() <= exact.tolerance(want, low)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_windows_leave_pipelines_as_they_are(family: str) -> None:
    pipe, call = BUILDERS[family]()
    untouched = run(pipe, call)
    with diffsparse.apply(pipe, GNA((0, 0, 0)), schedule=ALWAYS):
        assert torch.equal(run(pipe, call), untouched)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"window": (8, 8)}, "window wants three whole numbers of at least 0"),
        ({"window": (-1, 8, 8)}, "window wants"),
        ({"window": [8, 8, 8]}, "window wants"),
        ({"stride": (0, 1, 1)}, "stride wants three whole numbers of at least 1"),
        ({"window": (4, 4, 4), "stride": (1, 5, 1)}, "stride wants at most the window's"),
        ({"dilation": None}, "dilation wants"),
        ({"causal": (1, 0, 0)}, "causal wants True or False"),
        ({"sparsity": 1.0}, "sparsity wants"),
        ({"sparsity": None}, "sparsity wants"),
        ({"block": 0}, "block wants"),
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GNA(**knobs)


def test_names_and_knobs() -> None:
    assert parse("gna", sparsity=0.7, block=32, order="FHW") == [GNA(sparsity=0.7, block=32)]
    given_window = parse("gna", sparsity=0.7, window=(4, 8, 8), stride=None, dilation=(1, 1, 1))
    assert given_window == [GNA((4, 8, 8))]
    assert given_window[0].sparsity is None
