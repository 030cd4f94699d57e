"""The declared strategy: what may be asked of it, of wrappers, and of strangers' objects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import Compensated, Layout, Random, Schedule
from diffsparse.errors import ConfigError
from diffsparse.insight.inspection import sampled_steps
from diffsparse.orders.per_head import HeadOrders
from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies import STRATEGIES, name_of, parse
from diffsparse.strategies.base import Foreign, Strategy, Wrapper, as_given, as_strategy
from diffsparse.strategies.work import Outline, Step
from diffsparse_eval import compared
from diffsparse_kernels import BlockLists, Correction
from support import tiny_transformers
from support.sites import site

LAYOUT = Layout(1, 4, 8)
RUN = Outline.of(Schedule(2), 6)


@dataclass(frozen=True)
class Told(Strategy):
    """Answers everything in its own way."""

    order: str = "WHF"
    block: int = 8
    sparsity: float = 0.25
    needs_grid: bool = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return q + 1

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return q + 2

    def check(self, models: Any) -> None:
        raise ConfigError("checked")

    def expected(self, run: Outline) -> list[Step]:
        return run.constant(0.5)

    def facts(self) -> dict[str, str]:
        return {"a": "fact"}


class Stranger:
    """No `Strategy`, but it has the same methods and attributes."""

    order, block, sparsity, needs_grid = "WHF", 8, 0.25, True
    attend, observe, check, expected, facts = Told.attend, Told.observe, Told.check, Told.expected, Told.facts

    def __repr__(self) -> str:
        return "Stranger()"


class Bare:
    """The least that is a strategy."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return q + 1


@dataclass(frozen=True)
class Through(Wrapper):
    """Adds nothing."""

    strategy: Strategy


@pytest.mark.parametrize("strategy", [Told(), Through(Told()), Through(Through(Told())), as_strategy(Stranger())])
def test_wrappers_and_strangers_answer_what_the_strategy_answers(strategy: Strategy) -> None:
    told, x, here = Told(), torch.zeros(1, 1, 32, 4), site(LAYOUT)
    assert (strategy.order, strategy.block, strategy.sparsity) == (told.order, told.block, told.sparsity)
    assert strategy.needs_grid
    assert strategy.wants_grid
    assert strategy.observes
    assert torch.equal(strategy.attend(x, x, x, here), x + 1)
    assert torch.equal(strategy.observe(x, x, x, here), x + 2)
    assert strategy.steps(RUN) == told.expected(RUN)
    assert strategy.facts() == {"a": "fact"}
    with pytest.raises(ConfigError, match="checked"):
        strategy.check({})


@pytest.mark.parametrize("cls", [Wrapper, Foreign])
def test_nothing_that_may_be_asked_is_forgotten_by_a_wrapper(cls: type[Strategy]) -> None:
    asked = {name for name in vars(Strategy) if not name.startswith("_")}
    derived = {"steps", "kinds", "wants_grid"}  # from what is asked
    attributes = {"order", "block", "sparsity", "needs_grid", "is_compensated"}  # taken over when it is made
    assert {name for name in vars(cls) if not name.startswith("_")} >= asked - derived - attributes
    inner = Told()
    made = Through(inner) if cls is Wrapper else Foreign(inner)
    assert all(getattr(made, name) == getattr(inner, name) for name in attributes)


def test_the_least_that_is_a_strategy() -> None:
    strategy, x = as_strategy(Bare()), torch.zeros(1, 1, 32, 4)
    assert (strategy.order, strategy.block, strategy.sparsity, strategy.facts()) == ("FHW", None, None, {})
    assert not strategy.observes
    assert not strategy.wants_grid
    assert [step.density for step in strategy.steps(RUN)] == [1.0, 1.0, *[None] * 4]
    assert strategy.kinds(Schedule(2), 3) == ["dense", "dense", "sparse"]
    strategy.check({})
    assert torch.equal(strategy.attend(x, x, x, site(LAYOUT)), x + 1)
    assert name_of(strategy) == "bare"
    assert strategy == as_strategy(strategy)


class Forwarding:
    """Hands `attend` on without having it; `check` is there and None."""

    check = None

    def __getattr__(self, name: str) -> Any:
        if name == "attend":
            return Bare().attend
        raise AttributeError(name)


def test_strangers_may_forward_their_methods() -> None:
    strategy, x = as_strategy(Forwarding()), torch.zeros(1, 1, 32, 4)
    strategy.check({})
    assert torch.equal(strategy.attend(x, x, x, site(LAYOUT)), x + 1)
    Compensated(Forwarding())  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, "adaspa", Random, object(), SimpleNamespace(attend=5)])
def test_what_is_no_strategy(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"method attend.* such as Digest\(\); got"):
        as_strategy(wrong)


def test_strangers_keep_their_name_in_reports_and_in_what_wraps_them() -> None:
    assert repr(as_strategy(Stranger())) == "Stranger()"
    assert repr(Compensated(Stranger())) == "Compensated(strategy=Stranger(), by='means', budget=4.0)"  # type: ignore[arg-type]
    assert name_of(Compensated(Stranger())) == "stranger+means"  # type: ignore[arg-type]
    model = tiny_transformers.build("WanTransformer3DModel")
    with diffsparse.apply(model, Bare()) as handle:
        assert "Bare" in handle.report().strategy


@dataclass(frozen=True)
class Duck:
    """A stranger with knobs."""

    block: int = 64

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return site.dense(q, k, v)


def test_strangers_in_the_table_are_named_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "duck", Duck)  # type: ignore[arg-type]
    plain, other = parse("duck", block=None), parse("duck", block=32)
    assert [repr(x) for x in (*plain, *other)] == ["Duck(block=64)", "Duck(block=32)"]
    assert [compared.label(x) for x in (*plain, *other)] == ["duck", "duck block=32"]
    assert compared.sparsity_of(plain[0]) is None
    assert plain == parse("duck")
    assert [type(as_given(x)) for x in (*plain, Random())] == [Duck, Random]
    assert sampled_steps(Duck(), Schedule(1), 4, 1) == {2}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_declared(name: str) -> None:
    cls = STRATEGIES[name]
    assert issubclass(cls, Strategy)
    assert cls.expected is not Strategy.expected, "what it computes is known beforehand"


def test_a_kernel_of_ones_own_is_reported() -> None:
    """By its name where the strategy calls it, and in place of ours where someone wraps the strategy."""
    here, x = site(LAYOUT), torch.randn(1, 2, 32, 4)
    here.record.ran_sparse(0.25, "my kernel")
    assert (here.record.kind, here.record.backend, here.record.work) == ("sparse", "my kernel", 0.25)
    seen: list[Blocks] = []

    def product(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, site: Site) -> tuple[Tensor, Tensor]:
        seen.append(blocks)
        return torch.full_like(q, 3.0), q[..., 0]

    mask = torch.eye(4, dtype=torch.bool).expand(1, 2, 4, 4)
    lists = BlockLists.from_mask(mask, q_block=8, kv_block=8, q_len=32, kv_len=32)
    out = replace(here, product=product).sparse(x, x, x, Blocks(lists, correct=torch.ones_like(x).add))
    assert torch.equal(out, torch.full_like(x, 4.0))
    assert [blocks.lists for blocks in seen] == [lists]


def test_a_correction_is_added_as_tokens_are_put_in_order_again() -> None:
    """To the same rows as where they stand; and what a strategy makes of an output without it is refused."""
    here, x = site(LAYOUT), torch.randn(1, 2, 32, 4)
    mask = torch.eye(4, dtype=torch.bool).expand(1, 2, 4, 4)
    lists = BlockLists.from_mask(mask, q_block=8, kv_block=8, q_len=32, kv_len=32)
    correction = Correction(torch.randn(1, 2, 4, 4), torch.randn(1, 2, 1, 4), rows=torch.rand(32, 1) < 0.5)
    orders = HeadOrders.of(("HWF", "WHF"), torch.tensor([0, 1]), LAYOUT, x.device)

    def corrected(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        return site.sparse(q, k, v, Blocks(lists, correct=lambda _: correction))

    (moved,) = orders.apply(x)
    want = corrected(moved, moved, moved, here)
    assert not torch.equal(want, here.sparse(moved, moved, moved, lists))
    assert torch.equal(here.in_order(orders, corrected, x, x, x), orders.undo(want))
    inner = Blocks(lists, orders, correct=lambda _: correction)
    assert torch.equal(here.sparse(x, x, x, inner), orders.undo(want))
    with pytest.raises(ConfigError, match="wanted an output that has a correction to go back as it is"):
        here.in_order(orders, lambda *call: 2 * corrected(*call), x, x, x)


def test_a_device_is_not_asked_for_a_density_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides there whether blocks are worth it; on the CPU the lists say it exactly."""
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 0.5)
    x = torch.randn(1, 2, 32, 4)
    mask = torch.eye(4, dtype=torch.bool).expand(1, 2, 4, 4)
    lists = BlockLists.from_mask(mask, q_block=8, kv_block=8, q_len=32, kv_len=32)
    for device, kind in {"cpu": "sparse", "meta": "dense"}.items():
        here = site(LAYOUT)
        here.sparse(*(x.to(device),) * 3, Blocks(lists.to(device), about=0.6))
        assert here.record.kind == kind
