"""Orders: permutations, each with the neighbours that its name promises, applied around any strategy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffsparse
from diffsparse import AdaSpa, Layout, Random, Schedule
from diffsparse.errors import ConfigError
from diffsparse.order import AXES, check_order, permutation
from support.tiny_transformers import build, inputs, tensors

ORDERS = (*AXES, "tile2x2x2", "tile1x3x4", "tile9x9x9", "hilbert")
sizes = st.integers(1, 7)


@settings(deadline=None, max_examples=80)
@given(sizes, sizes, sizes, st.integers(0, 5), st.integers(0, 5), st.sampled_from(ORDERS))
def test_pairs_of_inverses_that_leave_text_alone(f: int, h: int, w: int, before: int, after: int, order: str) -> None:
    layout = Layout(f, h, w, before, after)
    forward, back = permutation(order, layout)
    tokens = torch.arange(layout.tokens)
    assert torch.equal(forward.sort().values, tokens)
    assert torch.equal(forward[back], tokens)
    text = [*range(before), *range(before + layout.video, layout.tokens)]
    assert torch.equal(forward[text], tokens[text])


@pytest.mark.parametrize("order", AXES)
def test_axis_orders_are_permuted_grids(order: str) -> None:
    grid = torch.arange(60).view(3, 4, 5)
    want = grid.permute(["FHW".index(axis) for axis in order]).flatten()
    assert torch.equal(permutation(order, Layout(3, 4, 5))[0], want)


def test_tiles_by_a_loop() -> None:
    layout = Layout(3, 5, 4)
    want = []
    for f, h, w in itertools.product(range(0, 3, 2), range(0, 5, 2), range(0, 4, 3)):
        for a, b, c in itertools.product(range(f, min(f + 2, 3)), range(h, min(h + 2, 5)), range(w, min(w + 3, 4))):
            want.append((a * 5 + b) * 4 + c)
    assert permutation("tile2x2x3", layout)[0].tolist() == want


@pytest.mark.parametrize("edge", [2, 4, 8])
def test_the_hilbert_curve_never_jumps_in_a_cube(edge: int) -> None:
    layout = Layout(edge, edge, edge)
    forward = permutation("hilbert", layout)[0]
    cells = torch.stack([forward // edge**2, forward // edge % edge, forward % edge], 1)
    assert (cells.diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("order", ["raster", "tile0x1x1", "tile4x4", "FHF", "", 3, None])
def test_unknown_orders(order: Any) -> None:
    with pytest.raises(ConfigError, match="order wants one of FHW"):
        check_order(order)
    with pytest.raises(ConfigError, match="order wants"):
        AdaSpa(order=order)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "FluxTransformer2DModel"])
@pytest.mark.parametrize("order", ["WHF", "tile2x2x2", "hilbert"])
def test_an_order_changes_blocks_and_nothing_else(name: str, order: str) -> None:
    """With every block kept the output is the dense one; with fewer it differs from raster order."""
    model, kwargs = build(name), inputs(name)
    dense = tensors(model, kwargs)[0]

    def run(strategy: Any) -> tuple[torch.Tensor, Any]:
        with diffsparse.apply(model, strategy, schedule=Schedule(dense_first=0)) as handle:
            return tensors(model, kwargs)[0], handle.report()

    whole, _ = run(AdaSpa(0.0, block=8, order=order))
    torch.testing.assert_close(whole, dense)
    ordered, report = run(Random(0.5, block=8, order=order))
    raster, _ = run(Random(0.5, block=8))
    assert report.sparse_calls
    assert not torch.equal(ordered, raster)


def test_neighbours_share_blocks() -> None:
    """Of attention that is local in all axes, a few tiles or pieces of the curve hold more than as many raster rows."""
    layout = Layout(8, 16, 16)
    axes = [torch.arange(float(n)) for n in (8, 16, 16)]
    grid = torch.cartesian_prod(*axes)
    weights = (-0.25 * (grid[:, None] - grid[None]).square().sum(-1)).softmax(-1)

    def recall(order: str) -> float:
        forward, _ = permutation(order, layout)
        mass = weights[forward][:, forward].unflatten(0, (-1, 64)).unflatten(2, (-1, 64)).sum((1, 3))
        return float(mass.topk(4, -1).values.sum() / mass.sum())

    found = {order: round(recall(order), 3) for order in ("FHW", "tile4x4x4", "hilbert")}
    assert found["tile4x4x4"] > found["FHW"] + 0.05, found
    assert found["hilbert"] > found["FHW"] + 0.05, found
