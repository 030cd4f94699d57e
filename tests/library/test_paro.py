"""PAROAttention: orders for each head, the search for them, masks from offline sums; against plain formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse
from diffsparse import PARO, Layout, Schedule
from diffsparse.errors import ConfigError, PlanError
from diffsparse.order import AXES, HeadOrders, permutation
from diffsparse.plan import Plan
from diffsparse.search import PAROSearch, calibrate
from diffsparse.search.calibrate import Sums
from diffsparse.strategies.paro import group_of, pack, unpack
from support import exact
from support.sites import site
from support.tiny_pipelines import BUILDERS, run

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
    moved = orders.apply(x)
    for head, order in enumerate(picked.tolist()):
        assert torch.equal(moved[:, head], x[:, head, permutation(names[order], layout)[0]])  # text is last already
    assert torch.equal(orders.undo(moved), x)


def test_views_that_are_neither_way_contiguous() -> None:
    layout = Layout(2, 3, 3)
    whole = torch.randn(1, 2, 18, 12)
    orders = HeadOrders.of(AXES, torch.tensor([2, 5]), layout, CPU)
    part = whole[..., 4:8]
    assert torch.equal(orders.apply(part), orders.apply(part.contiguous()))


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
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 1.0)
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


def test_a_dense_answer_is_that_of_the_unmoved_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved tokens would meet the call's mask, which knows them where they stood."""
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 0.0)
    n = LAYOUT.grid.blocks(8)
    strategy = PARO(make_plan(LAYOUT.grid, torch.ones(2, 2, n, n).bool(), [4, 1], 8))
    q, k, v = qkv(LAYOUT)
    got = strategy.attend(q, k, v, site(LAYOUT, 0, memory={}))
    assert torch.equal(got, torch.nn.functional.scaled_dot_product_attention(q, k, v))


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
    kept = max(1, round(0.5 * n * n))
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


def test_groups_are_equal_parts() -> None:
    assert [group_of(step, 10, 4) for step in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert group_of(50, 10, 4) == 3
    assert group_of(7, None, 4) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", BUILDERS)
def test_every_family_from_search_to_removal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 1.0)
    pipe, kwargs = BUILDERS[name]()
    before = run(pipe, kwargs)
    search = PAROSearch(0.5, block=8, groups=2, looks=2)
    plan = calibrate(pipe, search, [lambda: run(pipe, kwargs)], ["one"], tmp_path / "plan.safetensors")
    strategy = PARO.load(tmp_path / "plan.safetensors")
    assert strategy == PARO(plan)
    assert hash(strategy) == hash(PARO(plan))
    with diffsparse.apply(pipe, strategy, schedule=Schedule(dense_first=1)) as handle:
        sparse = run(pipe, kwargs)
    report = handle.report()
    assert sparse.isfinite().all()
    assert report.sparse_calls > 0
    assert not report.fallbacks
    assert torch.equal(run(pipe, kwargs), before)


def test_a_search_that_was_killed_ends_with_the_same_plan(tmp_path: Path) -> None:
    pipe, kwargs = BUILDERS["wan"]()
    search, names = PAROSearch(0.5, block=8, groups=2), ["a", "b"]
    prompts = [lambda: run(pipe, kwargs), lambda: run(pipe, kwargs, prompt="another thing")]
    whole = calibrate(pipe, search, prompts, names, tmp_path / "whole.safetensors")
    seen: list[int] = []

    class KilledError(BaseException):
        pass

    def killed_after(limit: int) -> Any:
        left = [limit]

        def hook(*_: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KilledError

        return hook

    out = tmp_path / "parts.safetensors"
    for limit in (3, 12, 13):  # within the first run, the second, and the second pass
        handle = pipe.transformer.blocks[0].register_forward_pre_hook(killed_after(limit))
        with pytest.raises(KilledError):
            calibrate(pipe, search, prompts, names, out, seen.append)
        handle.remove()
        assert not out.exists()
    plan = calibrate(pipe, search, prompts, names, out, seen.append)
    assert plan == whole
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert list(tmp_path.glob("*.partial")) == []
    assert seen[0] == 0
    assert 0 < seen[-2] < seen[-1] == 4
    with pytest.raises(ConfigError, match="one or more calls"):
        calibrate(pipe, search, [], [], out)


def test_a_search_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    pipe, kwargs = BUILDERS["wan"]()
    out = tmp_path / "plan.safetensors"

    def fail() -> None:
        raise KeyboardInterrupt

    for search in (PAROSearch(block=8), PAROSearch(block=16)):
        calls = [lambda: run(pipe, kwargs), fail]
        with pytest.raises(ConfigError if search.block == 16 else KeyboardInterrupt):
            calibrate(pipe, search, calls, ["a", "b"], out)


def test_runs_of_different_size_are_refused(tmp_path: Path) -> None:
    pipe, kwargs = BUILDERS["wan"]()
    calls = [lambda: run(pipe, kwargs), lambda: run(pipe, kwargs, num_frames=5)]
    with pytest.raises(PlanError, match="want one size"):
        calibrate(pipe, PAROSearch(block=8), calls, ["a", "b"], tmp_path / "plan.safetensors")


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
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wants"):
        PAROSearch(**knobs)
