"""PAROAttention: orders for each head, the search for them, masks from offline sums; against plain formulas."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse import PARO, Layout
from diffsparse.errors import ConfigError
from diffsparse.orders.named import AXES, permutation
from diffsparse.orders.per_head import HeadOrders
from diffsparse.plans.plan import Plan
from diffsparse.plans.sums import Sums
from diffsparse.site.compute import DenseBackend
from diffsparse.strategies.paro import PAROSearch
from diffsparse.strategies.paro.strategy import pack, unpack
from diffsparse.strategies.planned import group_of
from support import exact
from support.sites import site

CPU = torch.device("cpu")
LAYOUT = Layout(3, 4, 5, text_before=3, text_after=2)


def qkv(layout: Layout, heads: int = 2, dim: int = 16, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, heads, layout.tokens, dim)
    return q, k, v


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_each_head_gets_its_order_and_back(f: int, h: int, w: int, text: int, token_major: bool) -> None:
    layout, names = Layout(f, h, w, text_after=text), (*AXES, "tile2x2x2")
    picked = torch.tensor([6, 0, 3])
    x = torch.randn(2, 3, layout.tokens, 4)
    if token_major:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    orders = HeadOrders.of(names, picked, layout, CPU)
    (moved,) = orders.apply(x)
    for head, order in enumerate(picked.tolist()):
        assert torch.equal(moved[:, head], x[:, head, permutation(names[order], layout)[0]])  # text is last already
    assert torch.equal(orders.undo(moved), x)


def test_views_that_are_neither_way_contiguous() -> None:
    layout = Layout(2, 3, 3)
    whole = torch.randn(1, 2, 18, 12)
    orders = HeadOrders.of(AXES, torch.tensor([2, 5]), layout, CPU)
    part = whole[..., 4:8]
    assert torch.equal(*orders.apply(part, part.contiguous()))


def place_of(order: str, layout: Layout, block: int) -> Tensor:
    """Block of each raster token when its video stands in `order` and all text behind it."""
    inside = slice(layout.text_before, layout.text_before + layout.video)
    place = torch.empty(layout.tokens, dtype=torch.long)
    place[inside] = permutation(order, layout.grid)[1]
    text = [t for t in range(layout.tokens) if not inside.start <= t < inside.stop]
    place[text] = torch.arange(layout.video, layout.tokens)
    return place // block


def make_plan(layout: Layout, masks: Tensor, picked: list[int], block: int, **over: Any) -> Plan:
    tensors = {
        "transformer.blocks.0.attn1.masks": pack(masks),
        "transformer.blocks.0.attn1.orders": torch.tensor(picked, dtype=torch.uint8),
    }
    settings = {"sparsity": 0.5, "block": block, "groups": len(masks), "orders": list(AXES)}
    return Plan(
        **{"strategy": "paro", "models": {}, "layout": layout, "settings": settings, "tensors": tensors, **over}
    )


def test_it_attends_as_masked_softmax_does_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 9.0)
    block, picked = 8, [4, 1]
    n = LAYOUT.grid.blocks(block)  # 60 tokens: the last block is half video, half text
    masks = torch.rand(2, 2, n, n) < 0.4
    wide = torch.nn.functional.pad(masks, (0, 1, 0, 1), value=True)
    wide[:, :, n - 1], wide[:, :, :, n - 1] = True, True
    strategy = PARO(make_plan(LAYOUT.grid, masks, picked, block))
    q, k, v = qkv(LAYOUT)
    memory: dict[str, Any] = {}
    for step, group in ((0, 0), (4, 0), (5, 1), (9, 1)):
        out = strategy.attend(q, k, v, site(LAYOUT, step, memory=memory))
        allowed = torch.zeros(2, 2, LAYOUT.tokens, LAYOUT.tokens, dtype=torch.bool)
        for head, order in enumerate(picked):
            place = place_of(AXES[order], LAYOUT, block)
            allowed[:, head] = wide[group, head][place][:, place]
        want, _ = exact.softmax_attention(q, k, v, allowed, 16**-0.5)
        low = exact.eager(q, k, v, allowed, 16**-0.5)
        torch.testing.assert_close(out.double(), want, atol=exact.tolerance(want, low), rtol=0)


def test_what_falls_back_keeps_the_mask_of_padded_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 0.1)
    n = LAYOUT.grid.blocks(8)
    strategy = PARO(make_plan(LAYOUT.grid, torch.ones(1, 2, n, n, dtype=torch.bool), [4, 1], 8))
    q, k, v = qkv(LAYOUT)
    keys = torch.ones(2, LAYOUT.tokens, dtype=torch.bool)
    keys[:, 1:3] = False  # before the video
    masked = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=keys[:, None, None])
    here = replace(site(LAYOUT, key_mask=keys), dense_backend=DenseBackend("native", masked))
    assert torch.equal(strategy.attend(q, k, v, here), masked(q, k, v))
    assert here.record.reason == "density above the break-even of 0.10"


def column_heads(layout: Layout, axis: str) -> tuple[Tensor, Tensor]:
    """Queries and keys of one head whose tokens see those of the same place on all axes but `axis`."""
    cells = torch.cartesian_prod(*(torch.arange(n) for n in (layout.frames, layout.height, layout.width)))
    others = ["FHW".index(a) for a in "FHW" if a != axis]
    place = cells[:, others[0]] * 100 + cells[:, others[1]]
    one_hot = (place[:, None] == place.unique()).float()
    return one_hot * 12, one_hot


@pytest.mark.parametrize("metric", ["recall", "paper"])
def test_the_search_gathers_what_belongs_together(metric: Any) -> None:
    layout = Layout(4, 4, 4)
    heads = [column_heads(layout, axis) for axis in "FHW"]
    q, k = (torch.stack([head[i] for head in heads])[None] for i in (0, 1))
    search, sums = PAROSearch(15 / 16, metric=metric, block=4), Sums()
    for number in (0, 1):
        for step in range(10):
            search.watcher(number, sums).attend(q, k, torch.randn_like(k), site(layout, step, scale=1.0))
    _, tensors = search.plan(sums)
    chosen = [AXES[i] for i in tensors["transformer.blocks.0.attn1.orders"]]
    assert [order[-1] for order in chosen] == ["F", "H", "W"]  # the axis of the column runs fastest
    masks = unpack(tensors["transformer.blocks.0.attn1.masks"], 16)
    assert masks.shape == (4, 3, 16, 16)
    assert torch.equal(masks.any(0).any(0), torch.eye(16, dtype=torch.bool))


def test_scores_and_sums_equal_plain_formulas() -> None:
    block, layout = 4, Layout(2, 3, 3, text_after=2)
    q, k, v = qkv(layout, batch=1)
    order = permutation("WHF", layout)[0]
    weights = (q.double() @ k.double().mT * 16**-0.5).softmax(-1)[:, :, order][..., order]
    n = layout.grid.blocks(block)
    weights = weights[..., : layout.video, : layout.video]
    tiles = [[list(row.split(block, -1)) for row in weights[0, h].split(block, -2)] for h in range(2)]
    flat = [[tile for row in head for tile in row] for head in tiles]
    mass = torch.tensor([[float(tile.sum()) for tile in head] for head in flat], dtype=torch.float64)
    small = torch.tensor([[float((t < 1e-3).double().mean() >= 0.9) for t in head] for head in flat])
    peaks = torch.tensor([[float(t.max() / t.mean()) for t in head] for head in flat])
    sums = Sums()
    PAROSearch(0.5, orders=("WHF",), block=block).watcher(0, sums).attend(q, k, v, site(layout, 1))
    kept = (n * n + 1) // 2
    got = sums.of("scores")["transformer.blocks.0.attn1"][:, 0]
    torch.testing.assert_close(got[0], mass.topk(kept).values.sum(-1).float())
    torch.testing.assert_close(got[1], mass.sum(-1).float())
    paper = Sums()
    PAROSearch(0.5, orders=("WHF",), block=block, metric="paper").watcher(0, paper).attend(q, k, v, site(layout, 1))
    got = paper.of("scores")["transformer.blocks.0.attn1"][:, 0]
    torch.testing.assert_close(got[0], 1 - small.mean(-1))
    torch.testing.assert_close(got[1], peaks.mean(-1), rtol=1e-4, atol=1e-4)
    watcher = PAROSearch(0.5, orders=("WHF",), block=block, groups=2).watcher(1, sums)
    for step in (0, 4, 9):
        watcher.attend(q, k, v, site(layout, step))
    summed = sums.of("mass")["transformer.blocks.0.attn1"]
    torch.testing.assert_close(summed, torch.stack((2 * mass, mass)).view(2, 2, n, n).float(), rtol=1e-4, atol=1e-5)


def test_density_is_the_one_asked_for_and_text_stays() -> None:
    layout, block = Layout(4, 6, 6, text_before=5), 8
    search, sums = PAROSearch(0.6, block=block, groups=1, orders=("FHW", "hilbert")), Sums()
    q, k, v = qkv(layout, heads=3)
    for number in (0, 1):
        for step in range(10):
            search.watcher(number, sums).attend(3 * q, k, v, site(layout, step))
    knobs, tensors = search.plan(sums)
    masks = unpack(tensors["transformer.blocks.0.attn1.masks"], layout.grid.blocks(block))
    assert masks.any(-1).all()  # no row is empty
    torch.testing.assert_close(masks.float().mean((-2, -1)), torch.full((1, 3), 0.4), atol=0.02, rtol=0)
    for text in (Layout(4, 6, 6), layout, Layout(4, 6, 6, 9, 4)):  # a plan serves prompts of any length
        memory: dict[str, Any] = {}
        PARO(Plan("paro", {}, layout.grid, knobs, tensors)).attend(*qkv(text, heads=3), site(text, 0, memory=memory))
        mask = memory["lists"].to_mask()[0]
        assert torch.equal(mask[:, :18, :18], masks[0])
        assert mask[:, 18:].all()
        assert mask[:, :, 18:].all()


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_are_rounded_within_the_blocks_of_each_heads_order(bits: int) -> None:
    block, picked = 8, [4, 1]
    n = LAYOUT.grid.blocks(block)
    plan = make_plan(LAYOUT.grid, torch.ones(1, 2, n, n, dtype=torch.bool), picked, block)
    plan.settings["bits"] = bits
    q, k, v = qkv(LAYOUT)
    here = site(LAYOUT)
    out = PARO(plan).attend(q, k, v, here)
    everything = torch.ones(1, 1, LAYOUT.blocks(block), LAYOUT.blocks(block), dtype=torch.bool)
    sizes = {"q_block": block, "kv_block": block, "q_len": LAYOUT.tokens, "kv_len": LAYOUT.tokens}
    lists = dk.BlockLists.from_mask(everything, **sizes)
    for head, order in enumerate(picked):
        place = torch.empty(LAYOUT.tokens, dtype=torch.long)
        inside = slice(LAYOUT.text_before, LAYOUT.text_before + LAYOUT.video)
        place[inside] = permutation(AXES[order], LAYOUT.grid)[1]
        place[[t for t in range(LAYOUT.tokens) if not inside.start <= t < inside.stop]] = torch.arange(60, 65)
        moved = (x[:, head : head + 1, place.argsort()] for x in (q, k, v))
        want, _ = dk.quantised_attention(*moved, lists, bits=bits)
        torch.testing.assert_close(out[:, head : head + 1], want[:, :, place])
    assert here.record.kind == "sparse"
    assert here.record.backend == ("int8-int8 emulated" if bits == 8 else f"int{bits} emulated")


def test_incoherence_is_recorded_before_and_after_reordering() -> None:
    block, layout = 4, Layout(4, 4, 4, text_before=3)
    heads = [column_heads(layout.grid, axis) for axis in "FHW"]
    q, k = (torch.stack([torch.nn.functional.pad(head[i], (0, 0, 3, 0)) for head in heads])[None] for i in (0, 1))
    search, sums = PAROSearch(15 / 16, block=block, bits=8), Sums()
    for number in (0, 1):
        for step in range(10):
            search.watcher(number, sums).attend(q, k, torch.randn_like(k), site(layout, step, scale=1.0))
    knobs, tensors = search.plan(sums)
    assert knobs["bits"] == 8
    figures = tensors["transformer.blocks.0.attn1.incoherence"]  # [raster and own order, what, H]
    weights = (q @ k.mT).softmax(-1)
    orders = [permutation(AXES[i], layout.grid)[0] + 3 for i in tensors["transformer.blocks.0.attn1.orders"]]
    for row, wanted in enumerate(([torch.arange(3, 67)] * 3, orders)):
        for head, order in enumerate(wanted):
            queries, keys = (x[0, head, order].abs().split(block) for x in (q, k))
            tiles = [
                tile for strip in weights[0, head][order][:, order].split(block) for tile in strip.split(block, -1)
            ]
            for what, parts in enumerate((queries, keys, tiles)):
                mean = torch.stack([part.max() / part.mean() for part in parts]).mean()
                torch.testing.assert_close(figures[row, what, head], mean, rtol=1e-3, atol=1e-3)
    assert (figures[1, 2] < figures[0, 2])[:2].all()  # the head of the last axis is in order from the start
    told = PARO(Plan("paro", {}, layout.grid, knobs, tensors)).facts()["incoherence"]
    assert told.startswith("queries ")
    assert f"map {figures[0, 2].mean():.1f} -> {figures[1, 2].mean():.1f}" in told


def test_groups_are_equal_parts() -> None:
    assert [group_of(step, 10, 4) for step in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert group_of(50, 10, 4) == 3
    assert group_of(7, None, 4) == 0


@pytest.mark.parametrize(
    "knobs",
    [
        {"sparsity": 1.0},
        {"block": 0},
        {"orders": ()},
        {"orders": ("FHX",)},
        {"metric": "best"},
        {"alpha": 2},
        {"groups": 0},
        {"looks": 0.5},
        {"bits": 7},
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wants"):
        PAROSearch(**knobs)
