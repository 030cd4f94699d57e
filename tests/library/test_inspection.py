"""What the inspector finds, against full softmax maps in float64; and that it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import AdaSpa, Dense, Digest, Layout, Random, Schedule
from diffsparse.errors import ConfigError, PlanError
from diffsparse.insight import inspection
from diffsparse.insight.calibration import calibrate
from diffsparse.insight.inspection import Inspector, best_recall, sampled_steps
from diffsparse.orders.choice import candidates, most_alike
from diffsparse.orders.named import AXES, permutation
from diffsparse.orders.per_head import HeadOrders
from diffsparse.site.compute import Site
from diffsparse.strategies.blocks import keep_count
from diffsparse.strategies.paro import PAROSearch
from diffsparse_kernels import BlockLists
from support import exact, tiny_transformers
from support.sites import site
from support.tiny_pipelines import BUILDERS, run

LAYOUTS = [Layout(3, 4, 6), Layout(2, 5, 7, text_before=5), Layout(2, 5, 7, text_after=9), Layout(1, 6, 6)]
BLOCK = 8


def tensors(layout: Layout, batch: int = 2, heads: int = 3) -> list[Tensor]:
    return [3 * torch.randn(batch, heads, layout.tokens, 16) for _ in range(3)]


def weights(q: Tensor, k: Tensor, allowed: Tensor | None = None) -> Tensor:
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    return (scores if allowed is None else scores.masked_fill(~allowed[:, None, None], -torch.inf)).softmax(-1)


def masses(probabilities: Tensor, order: Tensor) -> Tensor:
    moved = probabilities[:, :, order][:, :, :, order]
    return exact.tile_sums(moved, BLOCK, BLOCK)


def only(inspector: Inspector) -> inspection.LayerView:
    (view,) = inspector.views()
    return view


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_recall_and_maps_of_each_order_are_those_of_the_full_map(layout: Layout) -> None:
    q, k, v = tensors(layout)
    orders = (*AXES, "tile2x2x2", "hilbert")
    inspector = Inspector(Dense(), {0}, orders=orders, sparsity=0.7, block=BLOCK)
    inspector.attend(q, k, v, site(layout))
    view, full = only(inspector), weights(q, k)
    assert view.orders == orders
    for i, order in enumerate(orders):
        mass = masses(full, permutation(order, layout)[0])
        best = mass.sort(-1, descending=True).values[..., : keep_count(0.7, mass.shape[-1])]
        torch.testing.assert_close(
            view.recall[i].double(), best.sum((0, 2, 3)) / mass.sum((0, 2, 3)), rtol=1e-4, atol=0
        )
        mean = mass.mean(0)
        torch.testing.assert_close(view.mass[i].double(), mean / mean.mean((1, 2), keepdim=True), rtol=1e-4, atol=1e-5)
    assert view.chosen is not None
    assert torch.equal(view.chosen, torch.ones(3))  # dense attention computes all
    assert view.best == tuple(orders[int(i)] for i in view.recall.argmax(0))


def test_masked_keys_have_no_mass_in_any_order() -> None:
    layout = Layout(2, 4, 4, text_after=8)
    q, k, v = tensors(layout, batch=1)
    keys = torch.rand(1, layout.tokens) > 0.3
    inspector = Inspector(Dense(), {0}, orders=("WHF",), block=BLOCK)
    inspector.attend(q, k, v, site(layout, key_mask=keys))
    mass = masses(weights(q, k, keys), permutation("WHF", layout)[0])
    best = mass.sort(-1, descending=True).values[..., :1].sum((0, 2, 3)) / mass.sum((0, 2, 3))
    torch.testing.assert_close(only(inspector).recall[1].double(), best, rtol=1e-4, atol=0)


def test_the_orders_that_heads_picked_are_told() -> None:
    layout = Layout(3, 4, 6)
    q, k, v = tensors(layout)
    inspector = Inspector(Random(0.6, block=BLOCK, order="auto"), {0}, block=BLOCK)
    place = site(layout)
    inspector.attend(q, k, v, place)
    names = candidates(layout, BLOCK)
    assert only(inspector).own_orders == tuple(names[i] for i in most_alike((q, k, v), names, layout, BLOCK)[0])


@pytest.mark.parametrize("order", ["FHW", "WHF", "hilbert"])
def test_chosen_is_the_mass_inside_the_strategys_blocks(order: str) -> None:
    layout = Layout(3, 4, 6)
    q, k, v = tensors(layout)
    strategy = Random(0.6, block=BLOCK, order=order)
    inspector = Inspector(strategy, {0}, block=BLOCK)
    place = site(layout)
    inspector.attend(q, k, v, place)
    view, mask = only(inspector), place.memory["lists"].to_mask()
    mass = masses(weights(q, k), permutation(order, layout)[0])
    held = (mass * mask).sum((0, 2, 3)) / mass.sum((0, 2, 3))
    assert view.chosen is not None
    assert view.density is not None
    assert view.kept is not None
    torch.testing.assert_close(view.chosen.double(), held, rtol=1e-4, atol=0)
    torch.testing.assert_close(view.density, mask.float().mean((0, 2, 3)))
    assert torch.equal(view.kept, mask.float().mean(0))
    assert view.own_orders == (order,) * 3
    assert place.record.beside == 0, "looking is no work of the strategy's"


def test_maps_of_unequal_blocks_have_a_row_for_each_block_of_queries() -> None:
    layout = Layout(3, 4, 6)
    q, k, v = tensors(layout)
    block = 2 * BLOCK, BLOCK
    inspector, place = Inspector(Random(0.6, block=block), {0}, block=block), site(layout)
    inspector.attend(q, k, v, place)
    view, mask = only(inspector), place.memory["lists"].to_mask()
    mass = exact.tile_sums(weights(q, k), *block)
    best = mass.sort(-1, descending=True).values[..., : keep_count(0.8, mass.shape[-1])]
    torch.testing.assert_close(view.raster.double(), best.sum((0, 2, 3)) / mass.sum((0, 2, 3)), rtol=1e-4, atol=0)
    assert view.chosen is not None
    assert view.kept is not None
    held = (mass * mask).sum((0, 2, 3)) / mass.sum((0, 2, 3))
    torch.testing.assert_close(view.chosen.double(), held, rtol=1e-4, atol=0)
    assert torch.equal(view.kept, mask.float().mean(0))
    assert view.mass.shape[2:] == mask.shape[2:]


@dataclass(frozen=True)
class Halves:
    """Odd heads dense; even heads turned around, and only the first key block."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        out = site.dense(q, k, v)
        n = site.layout.tokens
        orders = HeadOrders.of(("WHF",), torch.zeros(2, dtype=torch.int64), site.layout, q.device)
        mask = torch.zeros(1, 2, -(-n // BLOCK), -(-n // BLOCK), dtype=torch.bool)
        mask[..., 0] = True
        lists = BlockLists.from_mask(mask, q_block=BLOCK, kv_block=BLOCK, q_len=n, kv_len=n)
        q, k, v = orders.apply(*(x[:, ::2] for x in (q, k, v)))
        out[:, ::2] = orders.undo(site.sparse(q, k, v, lists))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_are_computed_apart_are_told_apart(dtype: torch.dtype) -> None:
    layout = Layout(3, 4, 6)
    q, k, v = (x.to(dtype) for x in tensors(layout))
    inspector = Inspector(Halves(), {0}, block=BLOCK)
    inspector.attend(q, k, v, site(layout))
    view = only(inspector)
    mass = masses(weights(q, k), permutation("WHF", layout)[0])
    assert view.chosen is not None
    assert view.density is not None
    held = (mass[..., 0].sum((0, 2)) / mass.sum((0, 2, 3)))[::2]
    rtol = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(view.chosen[::2].double(), held, rtol=rtol, atol=0)
    assert view.chosen[1] == view.density[1] == 1
    assert view.density[0] == pytest.approx(1 / 9)


def test_maps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "CELLS", 4)
    layout = Layout(3, 8, 8)
    inspector = Inspector(Random(0.5, block=BLOCK), {0}, block=BLOCK)
    inspector.attend(*tensors(layout), site(layout))
    assert max(x.numel() for x in inspector.sums.tensors.values()) == len(AXES) * 3 * 4 * 4
    view = only(inspector)
    assert view.own is not None
    assert view.own.shape == (3, 4, 4)
    torch.testing.assert_close(view.mass.mean((-2, -1)), torch.ones(len(AXES), 3))


def test_the_best_blocks_of_uniform_attention_hold_their_share() -> None:
    held, every = best_recall(torch.ones(2, 3, 10, 10), 0.7)
    assert torch.equal(held / every, torch.full((3,), 0.3))


def test_looks_fall_where_the_strategy_has_a_say() -> None:
    assert sampled_steps(AdaSpa(), Schedule(5), 15, 3) == {5, 9, 13}
    assert sampled_steps(Random(), Schedule(5), 15, 20) == set(range(5, 15))
    assert sampled_steps(Dense(), Schedule(0), 9, 3) == {1, 4, 7}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "flux"])
@pytest.mark.parametrize("strategy", [AdaSpa(0.5, block=8, searches=(3,)), Random(0.5, block=8, order="WHF")])
def test_a_watched_run_is_the_same_run(name: str, strategy: Any) -> None:
    pipe, call = BUILDERS[name]()
    plain, watched = (run_with(pipe, call, x) for x in (strategy, Inspector(strategy, {1, 3}, block=8)))
    assert torch.equal(plain, watched)


def run_with(pipe: Any, call: dict[str, Any], strategy: Any) -> Tensor:
    with diffsparse.apply(pipe, strategy, schedule=Schedule(1)):
        return run(pipe, call)


def test_layers_are_chosen_by_number() -> None:
    model = tiny_transformers.build("WanTransformer3DModel")
    inspector = Inspector(Random(0.5, block=8), {0}, block=8, layers={1})
    with torch.no_grad(), diffsparse.apply(model, inspector, schedule=Schedule(0)):
        model(**tiny_transformers.inputs("WanTransformer3DModel"))
    view = only(inspector)
    assert (view.layer, view.number) == ("blocks.1.attn1", 1)
    assert len(inspector.seen) == 2


def test_orders_of_a_plan_are_shown_and_its_model_is_checked(tmp_path: Any) -> None:
    pipe, call = BUILDERS["wan"]()
    search = PAROSearch(0.5, orders=("FHW", "WHF"), block=8, looks=1, groups=1)
    plan = calibrate(pipe, search, [lambda: run(pipe, call)], ["one"], tmp_path / "plan.safetensors")
    inspector = Inspector(diffsparse.PARO(plan), {2}, block=8)
    run_with(pipe, call, inspector)
    for view in inspector.views():
        picked = plan.part("transformer", view.layer, "orders")
        assert view.own_orders == tuple(("FHW", "WHF")[int(i)] for i in picked)
        assert view.chosen is not None
        assert bool((view.chosen < 1).all())
    with pytest.raises(PlanError, match="the plan was made for"):
        diffsparse.apply(BUILDERS["flux"]()[0], Inspector(diffsparse.PARO(plan), {2}))


def test_an_unknown_order() -> None:
    with pytest.raises(ConfigError, match="order wants one of"):
        Inspector(Dense(), {0}, orders=("zigzag",))
    assert replace(Random(), order="WHF").order == "WHF"


def test_what_digest_only_compares_is_not_taken_for_what_it_computes() -> None:
    layout, memory = Layout(4, 8, 8), dict[str, Any]()
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16)
    inspector = Inspector(Digest(0.5, block=16, order="FHW"), {3, 4}, block=16, sparsity=0.5)
    inspector.observe(q, k, v, site(layout, 3, 20, memory))
    (view,) = inspector.views()
    assert bool((view.chosen == 1).all()), "a dense call computes everything"
    inspector.attend(q, k, v, site(layout, 4, 20, memory))
    (view,) = inspector.views()
    assert view.chosen is not None
