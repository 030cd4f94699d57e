"""What is said of methods on recorded attention, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsparse import AdaSpa, Compensated, Dense, Digest, Layout, Random
from diffsparse.errors import ConfigError
from diffsparse.insight.recording import RecordedCall, Recording
from diffsparse.insight.replay import RANKS, Pair, attempt, check_blocks, exact, pairs, spectrum
from diffsparse.site.place import Place
from diffsparse.strategies import as_strategy
from diffsparse.strategies.base import in_order
from support import exact as oracle
from support.sites import site

LAYOUTS = [Layout(3, 4, 6), Layout(2, 5, 7, text_before=5), Layout(2, 5, 7, text_after=9)]
BLOCK = 8
HEADS = (0, 2, 3)


def call(
    layout: Layout = LAYOUTS[0],
    step: int = 0,
    layer: int = 0,
    branch: str = "cond",
    scale: float | None = None,
    masked: bool = False,
) -> RecordedCall:
    q, k, v = torch.randn(3, 1, len(HEADS), layout.tokens, 16).mul(2).bfloat16()
    mask = torch.rand(1, layout.tokens) > 0.3 if masked else None
    place = Place("transformer", f"blocks.{layer}", layer, step, 10, branch, layout, layers=4)
    return RecordedCall(place, layer, HEADS, 6, scale, q, k, v, mask)


def pair(layout: Layout = LAYOUTS[0], **more: Any) -> Pair:
    return Pair(call(layout, 3, **more), call(layout, 4, **more))


def truth(one: RecordedCall) -> Tensor:
    tokens = one.place.layout.tokens
    allowed = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    if one.key_mask is not None:
        allowed &= one.key_mask[:, None, None]
    return oracle.softmax_attention(one.q, one.k, one.v, allowed, one.scale or 16**-0.5)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("more", [{}, {"masked": True}, {"scale": 0.4}], ids=str)
def test_the_dense_output_is_exact(layout: Layout, more: dict[str, Any]) -> None:
    one = call(layout, **more)
    found = exact(one, "cpu")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_work_and_spectrum_of_an_output(layout: Layout, masked: bool, dtype: torch.dtype) -> None:
    both, strategy = pair(layout, masked=masked), Random(0.6, block=BLOCK, order="WHF")
    found = attempt(strategy, both, exact(both.second, "cpu"), dtype)
    place = replace(site(layout, 4, key_mask=both.second.key_mask), model="transformer", layer="blocks.0")
    q, k, v = (x.to(dtype) for x in (both.second.q, both.second.k, both.second.v))
    out = in_order(strategy, strategy.attend, (q, k, v), place)
    want = truth(both.second)
    residual = want - out.double()
    assert found.error == pytest.approx((residual.square().sum() / want.square().sum()).item(), rel=1e-4)
    energies = torch.linalg.svdvals(residual[0]).square()
    shares = energies.cumsum(-1) / energies.sum(-1, keepdim=True)
    torch.testing.assert_close(found.spectrum, shares[:, [rank - 1 for rank in RANKS]], rtol=1e-3, atol=1e-6)
    assert found.work == pytest.approx(place.record.work)
    assert 0.2 < found.work < 0.9
    assert found.fallback == ""


class Learner:
    """Tells what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, bool, int]] = []
        self.given: list[Tensor] = []

    def _ask(self, what: str, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        self.asked.append((what, site.step, "been" in site.memory, site.layers))
        site.memory["been"] = q
        self.given.append(torch.cat((q, k, v)))
        return site.dense(q, k, v)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        return self._ask("observe", q, k, v, site)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        return self._ask("attend", q, k, v, site)


def test_who_learns_from_a_dense_step_does_so_at_the_step_before() -> None:
    learner, both = Learner(), pair()
    for _ in range(2):
        attempt(as_strategy(learner), both, exact(both.second, "cpu"), torch.float32)
    # three of six heads are recorded, and what may be kept is for all of them
    assert learner.asked == 2 * [("observe", 3, False, 8), ("attend", 4, True, 8)]
    for one, given in zip(2 * both, learner.given, strict=True):
        assert torch.equal(given, torch.cat((one.q, one.k, one.v)).float())


def test_a_method_that_learned_counts_what_it_does_in_a_run() -> None:
    both, memory = pair(), dict[str, Any]()
    strategy = AdaSpa(0.6, searches=(4,), block=BLOCK, head_adaptive=False)
    found = attempt(strategy, both, exact(both.second, "cpu"), torch.float32)
    for one, method in zip(both, (strategy.observe, strategy.attend), strict=True):
        place = site(LAYOUTS[0], one.place.step, 10, memory)
        method(one.q.float(), one.k.float(), one.v.float(), place)
    assert found.work == pytest.approx(place.record.work)
    assert found.work > place.record.density, "it searched again"


@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_has_no_error(masked: bool) -> None:
    both = pair(masked=masked)
    found = attempt(Dense(), both, exact(both.second, "cpu"), torch.float32)
    assert (found.error, found.work) == (0.0, 1.0)
    assert bool(found.spectrum.isnan().all())
    low = attempt(Dense(), both, exact(both.second, "cpu"), torch.bfloat16)
    assert 0 < low.error < 1e-3


@pytest.mark.parametrize("strategy", [AdaSpa(0.0, block=BLOCK), Digest(0.0, block=BLOCK), Random(0.0, block=BLOCK)])
def test_nothing_dropped_is_no_error(strategy: Any) -> None:
    both = pair(LAYOUTS[1], masked=True)
    assert attempt(strategy, both, exact(both.second, "cpu"), torch.float32).error < 1e-9


def test_means_help(seeded: None) -> None:
    both = pair()
    errors = [
        attempt(strategy, both, exact(both.second, "cpu"), torch.float32).error
        for strategy in (Random(0.8, block=BLOCK), Compensated(Random(0.8, block=BLOCK)))
    ]
    assert errors[1] < errors[0]


def test_a_call_that_runs_dense_after_all_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 0.1)
    both = pair()
    found = attempt(Random(0.6, block=BLOCK), both, exact(both.second, "cpu"), torch.float32)
    assert "break-even" in found.fallback


@pytest.mark.parametrize("channels", [3, 16, 40])
def test_the_spectrum_of_low_ranks(channels: int) -> None:
    one = torch.randn(2, 50, 1) @ torch.randn(2, 1, channels)
    torch.testing.assert_close(spectrum(one), torch.ones(2, len(RANKS), dtype=torch.float64))
    assert spectrum(torch.randn(2, 50, channels)).shape == (2, len(RANKS))


def test_pairs_are_of_one_layer_and_branch_in_consecutive_steps() -> None:
    steps = [call(step=step, layer=layer) for layer in (0, 1) for step in (1, 2, 5, 7, 8)]
    others = [call(step=3, branch="uncond"), call(step=6, layer=2)]
    found = pairs(Recording((*steps, *others)))
    told = [(one.place.index, one.place.step, two.place.index, two.place.step) for one, two in found]
    assert told == [(0, 1, 0, 2), (0, 7, 0, 8), (1, 1, 1, 2), (1, 7, 1, 8)]


def test_no_pair() -> None:
    with pytest.raises(ConfigError, match="two consecutive steps; got steps 1, 3"):
        pairs(Recording((call(step=3), call(step=1))))


def test_too_few_tokens() -> None:
    check_blocks([pair()], [Random(block=9)])
    with pytest.raises(ConfigError, match=r"72 tokens are too few for blocks of 10.*blocks of 9 or less"):
        check_blocks([pair(), pair(LAYOUTS[1])], [Random(block=4), Random(block=10)])
    check_blocks([pair()], [Dense()])


def test_a_call_of_another_shape_is_none() -> None:
    one = call()
    with pytest.raises(ValueError, match="wanted q, k, v"):
        replace(one, k=one.k[:, :, 1:])
