"""GNA: its masks against NATTEN's rule by brute force, its outputs against dense masked attention, its tiles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsparse import GNA, Layout, Schedule
from diffsparse.windows import Axis, Tiling
from support import exact
from support.sites import site

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


def brute(grid: tuple[int, ...], gna: GNA, tiling: Tiling) -> Tensor:
    """bool [video, video] in raster order, cell by cell."""
    assert gna.window is None or all(size in (0, seen) or size > seen for size, seen in zip(gna.window, tiling.window))
    along = []
    for length, axis in zip(grid, tiling.axes, strict=True):
        pairs = itertools.product(range(length), repeat=2)
        rule = (axis.window, axis.stride, axis.dilation, axis.causal)
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
    layout = Layout(grid.frames, grid.height, grid.width, *TEXT[text])
    allowed = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    inside = slice(layout.text_before, layout.text_before + layout.video)
    allowed[inside, inside] = brute((grid.frames, grid.height, grid.width), gna, gna.tiling(layout))
    assert not allowed.all()
    q, k, v = torch.randn(3, 2, 3, layout.tokens, 16).to(dtype)
    keys = None
    if layout.has_text:  # padded, differently in each sample
        keys = torch.ones(2, layout.tokens, dtype=torch.bool)
        keys[
            0, -layout.text_after or layout.text_before - 2 : layout.tokens if layout.text_after else layout.text_before
        ] = False
        allowed = allowed & keys[:, None, None]
    got = gna.attend(q, k, v, site(layout, key_mask=keys))
    want, _ = exact.softmax_attention(q, k, v, allowed, 0.25)
    low = exact.eager(q, k, v, allowed, 0.25)
    assert (got.double() - want).abs().max().item() <= exact.tolerance(want, low)
