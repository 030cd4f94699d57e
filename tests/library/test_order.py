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
from diffsparse.orders.choice import candidates, most_alike
from diffsparse.orders.named import AXES, check_order, permutation
from diffsparse.strategies.base import in_order
from support.sites import site
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


@pytest.mark.parametrize("order", ["raster", "auto", "tile0x1x1", "tile4x4", "FHF", "", 3, None])
def test_unknown_orders(order: Any) -> None:
    with pytest.raises(ConfigError, match="order wants one of FHW"):
        check_order(order)
    if order != "auto":
        with pytest.raises(ConfigError, match="hilbert, or auto; got"):
            AdaSpa(order=order)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "FluxTransformer2DModel"])
@pytest.mark.parametrize("order", ["WHF", "tile2x2x2", "hilbert", "auto"])
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


@pytest.mark.parametrize(
    ("grid", "block", "box"),
    [
        ((17, 16, 16), 64, "tile4x4x4"),
        ((17, 16, 16), 128, "tile4x4x8"),
        ((1, 64, 64), 64, "tile1x8x8"),
        ((2, 3, 50), 64, "tile2x4x8"),
        ((2, 2, 2), 64, "tile2x2x2"),
        ((8, 8, 8), 1, "tile1x1x1"),
        ((8, 8, 8), 50, "tile2x4x4"),
    ],
)
def test_a_box_fills_a_block(grid: tuple[int, int, int], block: int, box: str) -> None:
    assert candidates(Layout(*grid), block) == (box, *AXES)


def test_each_head_gets_the_order_in_which_its_tokens_are_most_alike() -> None:
    """Heads that see only columns, only rows and columns, and blobs; text in front is left out."""
    layout = Layout(8, 8, 8, text_before=5)
    frame, row, column = torch.cartesian_prod(*(torch.arange(8.0),) * 3).T
    blob = (frame // 2) * 16 + (row // 2) * 4 + column // 2
    facts = torch.stack([column, 8 * row + column, blob])  # [H, video]
    torch.manual_seed(0)
    table = torch.randn(64, 16)
    video = table[facts.long()] + 0.1 * torch.randn(3, 512, 16)
    x = torch.cat([100 * torch.randn(3, 5, 16), video], 1)[None]
    names = candidates(layout, 8)
    found = [names[i] for i in most_alike((x, x, x), names, layout, 8)[0]]
    assert found[0][-1] in "FH", "a block never spans columns"
    assert found[1][-1] == "F"
    assert found[2] == "tile2x2x2"


@pytest.mark.parametrize("layout", [Layout(3, 4, 5), Layout(3, 4, 5, 7, 2), Layout(1, 2, 3)], ids=str)
def test_alike_by_a_loop(layout: Layout) -> None:
    names, block = candidates(layout, 8), min(8, layout.video)
    qkv = tuple(size * torch.randn(2, 4, layout.tokens, 6) for size in (100, 1, 0.01))
    want = torch.ones(len(names), 2, 4, dtype=torch.float64)  # [orders, B, H]
    for i, name in enumerate(names):
        tokens = permutation(name, layout)[0][layout.span]
        for x in qkv:
            parts = [x.double()[:, :, part] for part in tokens.split(block) if len(part) == block]
            away = [(part - part.mean(2, keepdim=True)).square().sum(-1).mean(2) for part in parts]
            want[i] *= torch.stack(away).mean(0)
    found = most_alike(qkv, names, layout, 8)
    torch.testing.assert_close(want.gather(0, found[None])[0], want.amin(0), rtol=1e-6, atol=0)


def test_hidden_tokens_have_no_say_in_the_order() -> None:
    layout = Layout(4, 4, 4, text_before=3)
    qkv, keys = torch.randn(3, 2, 3, layout.tokens, 8), torch.rand(2, layout.tokens) < 0.6
    names = candidates(layout, 8)
    found = most_alike(tuple(qkv), names, layout, 8, keys)
    other = torch.where(keys[:, None, :, None], qkv, 100 * torch.randn_like(qkv))
    assert torch.equal(most_alike(tuple(other), names, layout, 8, keys), found)
    assert not torch.equal(most_alike(tuple(other), names, layout, 8), found)


def test_orders_are_found_once_in_a_run() -> None:
    layout, memory, seen = Layout(3, 4, 5, 2), {}, []
    strategy = Random(0.5, block=8, order="auto")

    def method(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Any) -> torch.Tensor:
        seen.append(q)
        return v

    first, second = (torch.randn(2, 3, layout.tokens, 4) for _ in range(2))
    for x in (first, second):
        assert torch.equal(in_order(strategy, method, (x, x, x), site(layout, memory=memory)), x)
    names = candidates(layout, 8)
    picked = most_alike((first,) * 3, names, layout, 8)
    assert not torch.equal(picked[0], picked[1]), "each sample has its own"
    for x, moved in zip((first, second), seen, strict=True):
        for (sample, head), i in zip(itertools.product(range(2), range(3)), picked.flatten(), strict=True):
            assert torch.equal(moved[sample, head], x[sample, head, permutation(names[i], layout)[0]])
