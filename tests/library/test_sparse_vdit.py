"""Sparse-vDiT: its five patterns, its choice, and its search along real runs; against plain formulas."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse
from diffsparse import Layout, Schedule, SparseVDiT
from diffsparse.errors import ConfigError
from diffsparse.insight.calibration import calibrate
from diffsparse.orders.named import permutation
from diffsparse.plans.plan import Plan
from diffsparse.plans.sums import Sums
from diffsparse.strategies.sparse_vdit import SparseVDiTSearch
from diffsparse.strategies.sparse_vdit.strategy import DIAGONAL, FULL, MODES, MULTI_DIAGONAL, SKIP, STRIPE, head_lists
from diffsparse_eval import metrics
from diffsparse_pipelines import tiny
from diffsparse_pipelines.generation import generation
from support import exact
from support.sites import site

CPU = torch.device("cpu")
LAYOUT = Layout(3, 4, 5, text_before=3, text_after=2)
NAME = "transformer.blocks.0.attn1"
ALWAYS = Schedule(dense_first=0)


def qkv(layout: Layout, heads: int, dim: int = 16, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, heads, layout.tokens, dim)
    return q, k, v


def kept(mode: int, columns: list[float], keep: int, blocks: int) -> Tensor:
    """The video's blocks of one head by the book: sets of keys for each row, bool [blocks, blocks]."""
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        if mode in (DIAGONAL, MULTI_DIAGONAL):
            keys = sorted(range(blocks), key=lambda key: (abs(key - row), key))[:keep]
        elif mode == STRIPE:
            keys = sorted(range(blocks), key=lambda key: (-columns[key], key))[:keep]
        else:
            keys = list(range(blocks)) if mode == FULL else []
        mask[row, keys] = True
    return mask


def with_text(video: Tensor, mode: int, layout: Layout, block: int) -> Tensor:
    """The video's blocks and those of the text behind it."""
    blocks = layout.blocks(block)
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    mask[: len(video), : len(video)] = video
    for number in range(blocks):
        if min((number + 1) * block, layout.tokens) > layout.video:  # it holds text
            mask[number] = True
            mask[:, number] |= mode != SKIP
    return mask


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 9),
    st.sampled_from([4, 7]),
    st.floats(0, 0.99),
)
def test_the_sparse_patterns(f: int, h: int, w: int, text: int, block: int, sparsity: float) -> None:
    layout = Layout(f, h, w, text_after=text)
    blocks = layout.grid.blocks(block)
    columns = torch.rand(4, blocks)
    mask = head_lists(torch.arange(1, 5), columns, layout, sparsity, block, CPU).to_mask()[0]
    for head, mode in enumerate((SKIP, DIAGONAL, MULTI_DIAGONAL, STRIPE)):
        keep = max(1, int((1 - Fraction(str(sparsity))) * blocks + Fraction(1, 2)))
        video = kept(mode, columns[head].tolist(), keep, blocks)
        assert torch.equal(mask[head], with_text(video, mode, layout, block)), MODES[mode]


def make_plan(modes: Tensor, columns: Tensor, layout: Layout = LAYOUT.grid, **over: Any) -> Plan:
    tensors = {f"{NAME}.modes": modes.to(torch.uint8), f"{NAME}.columns": columns}
    return Plan("sparse-vdit", {}, layout, {"sparsity": 0.6, "block": 8, **over}, tensors)


def test_it_attends_as_masked_softmax_does_token_by_token() -> None:
    block, blocks = 8, LAYOUT.grid.blocks(8)  # 60 tokens: the last block is half video, half text
    modes = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 2], [0, 0, 0, 0, 0]])
    columns = torch.rand(5, blocks)
    strategy = SparseVDiT(make_plan(modes, columns))
    q, k, v = qkv(LAYOUT, heads=5)
    inside = slice(LAYOUT.text_before, LAYOUT.text_before + LAYOUT.video)
    outside = [t for t in range(LAYOUT.tokens) if not inside.start <= t < inside.stop]
    behind = Layout(3, 4, 5, text_after=5)
    for step, steps, group in ((0, 3, 0), (1, 3, 1), (2, 3, 2), (3, 10, 0), (4, 10, 1), (9, 10, 2), (5, None, 0)):
        here = site(LAYOUT, step, steps)
        out = strategy.attend(q, k, v, here)
        allowed = torch.zeros(2, 5, LAYOUT.tokens, LAYOUT.tokens, dtype=torch.bool)
        for head, mode in enumerate(modes[group].tolist()):
            place = torch.empty(LAYOUT.tokens, dtype=torch.long)
            place[inside] = permutation("HWF" if mode == MULTI_DIAGONAL else "FHW", LAYOUT.grid)[1]
            place[outside] = torch.arange(LAYOUT.video, LAYOUT.tokens)
            mask = with_text(kept(mode, columns[head].tolist(), round(0.4 * blocks), blocks), mode, behind, block)
            allowed[:, head] = mask[place // block][:, place // block] | (mode == FULL)
        want, _ = exact.softmax_attention(q, k, v, allowed, 16**-0.5)
        low = exact.eager(q, k, v, allowed, 16**-0.5)
        torch.testing.assert_close(out.double(), want, atol=exact.tolerance(want, low), rtol=0)
        assert here.record.heads == tuple(MODES[mode] for mode in modes[group])
        assert here.record.kind == ("dense" if group == 2 else "sparse")


def test_density_counts_full_heads_and_skipped_ones() -> None:
    layout = Layout(4, 4, 4)
    here = site(layout)
    plan = make_plan(torch.tensor([[FULL, SKIP, DIAGONAL, STRIPE]]), torch.rand(4, 8), layout, sparsity=0.75)
    SparseVDiT(plan).attend(*qkv(layout, 4), here)
    assert float(here.record.density) == pytest.approx((1 + 0 + 0.25 + 0.25) / 4)
    lists = here.memory["lists"]
    SparseVDiT(plan).attend(*qkv(layout, 4), here)
    assert here.memory["lists"] is lists, "made once for equal modes"


def test_a_plan_serves_other_sizes() -> None:
    columns = torch.tensor([[0.0, 3.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    for layout, want in (
        (Layout(4, 2, 4), [[1], [0]]),
        (Layout(4, 4, 4), [[2, 3], [0, 1]]),
        (Layout(2, 2, 4), [[0], [0]]),
    ):
        mask = head_lists(torch.tensor([STRIPE, STRIPE]), columns, layout, 0.75, 8, CPU).to_mask()[0]
        assert [mask[head, 0].nonzero()[:, 0].tolist() for head in (0, 1)] == want
        strategy = SparseVDiT(make_plan(torch.tensor([[STRIPE, MULTI_DIAGONAL]]), columns, Layout(4, 2, 4)))
        assert strategy.attend(*qkv(layout, 2), site(layout)).isfinite().all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(0, 2), st.floats(0, 1), st.integers(1, 4))
def test_the_choice_is_the_papers_with_the_sign_mended(seed: int, epsilon: float, weight: float, few: int) -> None:
    lot = torch.Generator().manual_seed(seed)
    search = SparseVDiTSearch(epsilon=epsilon, weight=weight, modes=tuple(MODES[1:][:few]))
    errors = torch.rand(3, few, 2, generator=lot, dtype=torch.float64)
    seen, costs = torch.tensor([2.0, 1.0, 0.0]), torch.rand(few, generator=lot)
    got = search.choose(errors, seen, costs)
    for group, head in np.ndindex(3, 2):
        losses = [float(errors[group, i, head] / max(seen[group], 1) + weight * costs[i]) for i in range(few)]
        best = min(range(few), key=losses.__getitem__)
        wanted = FULL if seen[group] == 0 or losses[best] > epsilon else best + 1
        assert int(got[group, head]) == wanted


def test_no_mode_that_costs_as_much_as_full() -> None:
    search = SparseVDiTSearch(epsilon=5.0, modes=("diagonal", "stripe"))
    errors, seen = torch.zeros(1, 2, 1), torch.ones(1)
    assert int(search.choose(errors, seen, torch.tensor([1.2, 0.9]))) == STRIPE
    assert int(search.choose(errors, seen, torch.tensor([1.2, 1.0]))) == FULL
    assert int(search.choose(errors * torch.nan, seen, torch.tensor([0.1, 0.1]))) == FULL


def patterned_heads(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """One head for each mode: all keys alike, a small output, neighbours, the same place, a few keys."""
    cells = torch.cartesian_prod(*(torch.arange(n) for n in (layout.frames, layout.height, layout.width)))
    tokens, places = torch.eye(layout.tokens), cells[:, 1] * layout.width + cells[:, 2]
    near = tokens + tokens.roll(1, 0)
    same = (places[:, None] == torch.arange(layout.tokens)).float()
    few = torch.zeros(layout.tokens, layout.tokens)
    few[20:24] = 1.0
    q = torch.stack(
        [torch.zeros_like(tokens), torch.zeros_like(tokens), 40 * near, 40 * same, torch.full_like(few, 2.0)]
    )
    k = torch.stack([tokens, tokens, tokens, same, few])
    v = torch.randn(5, layout.tokens, layout.tokens)
    v[0] *= 8
    v[1] *= 0.01
    return q[None], k[None], v[None]


def test_the_search_finds_the_pattern_of_each_head() -> None:
    layout = Layout(4, 4, 4)
    q, k, v = patterned_heads(layout)
    search, sums = SparseVDiTSearch(0.75, epsilon=0.1, block=4, groups=2), Sums()
    for number in (0, 1):
        for step in range(4):
            out = search.watcher(number, sums).attend(q, k, v, site(layout, step, 4, scale=1.0))
    knobs, tensors = search.plan(sums)
    assert tensors[f"{NAME}.modes"].tolist() == [[FULL, SKIP, DIAGONAL, MULTI_DIAGONAL, STRIPE]] * 2
    assert knobs["costs"] == [0.0, 0.25, 0.25, 0.25]
    torch.testing.assert_close(tensors[f"{NAME}.columns"].sum(-1), torch.ones(5))
    plan = Plan("sparse-vdit", {}, layout, knobs, tensors)
    again = SparseVDiT(plan).attend(q, k, v, site(layout, 0, 4, scale=1.0))
    torch.testing.assert_close(again, out)  # the run went on with what was chosen
    assert SparseVDiT(plan).facts()["modes"].startswith("full 20.0%, skip 20.0%")


def test_errors_are_relative_to_the_layer_and_those_of_the_video() -> None:
    search, sums = SparseVDiTSearch(0.5, block=8, modes=("diagonal", "skip")), Sums()
    q, k, v = qkv(LAYOUT, heads=3)
    for number in (0, 1):
        search.watcher(number, sums).attend(q, k, v, site(LAYOUT, 1, 2))
    inside = slice(LAYOUT.text_before, LAYOUT.text_before + LAYOUT.video)
    plan = make_plan(torch.full((1, 3), DIAGONAL), torch.ones(3, 8), sparsity=0.5)
    window = SparseVDiT(plan).attend(q, k, v, site(LAYOUT))[:, :, inside].double()
    full = exact.softmax_attention(q, k, v, torch.ones(1, 1, 65, 65, dtype=torch.bool), 16**-0.5)[0][:, :, inside]
    skipped = full.clone()
    skipped[:, :, :56] = 0  # the ragged last block holds text too, and is computed
    want = torch.stack([((x - full) ** 2).mean((0, 2, 3)) for x in (window, skipped)]) / (full**2).mean()
    errors = sums.of("errors")[NAME]
    assert errors.shape == (2, 2, 3)
    assert sums.of("seen")[NAME].tolist() == [0, 1]
    torch.testing.assert_close(errors[1], want.float(), rtol=1e-4, atol=1e-6)


def test_cost_by_time_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.1, 0.4, 0.6, 0.5, 0.5])
    monkeypatch.setattr("diffsparse.strategies.sparse_vdit.search._seconds", lambda *_: next(seconds))
    search, sums = SparseVDiTSearch(0.5, block=8, cost="time"), Sums()
    for number in (0, 0, 1):
        search.watcher(number, sums).attend(*qkv(LAYOUT, 2), site(LAYOUT, 1, 2))
    assert search.plan(sums)[0]["costs"] == [0.2, 0.8, 1.2, 1.0]


def test_real_timings_are_positive() -> None:
    search, sums = SparseVDiTSearch(0.5, block=8, cost="time"), Sums()
    search.watcher(0, sums).attend(*qkv(LAYOUT, 2), site(LAYOUT, 1, 2))
    assert min(search.plan(sums)[0]["costs"]) > 0


class Twin:
    """The embedded twin in a few steps, and what a search on one prompt makes of another."""

    def __init__(self, folder: Path) -> None:
        self.pipe, self.folder = tiny.load("twin"), folder
        self.seen, self.new = tiny.prompts(2)
        self.dense = self.frames(self.new)

    def frames(self, prompt: str) -> Any:
        call = {**tiny.defaults("twin"), "num_inference_steps": 3, "prompt": prompt}
        return generation(self.pipe, call, 0).frames

    def measure(self, **knobs: Any) -> tuple[float, float]:
        """Density and PSNR."""
        search = SparseVDiTSearch(block=16, **knobs)
        call, out = lambda: self.frames(self.seen), self.folder / "plan.safetensors"
        plan = calibrate(self.pipe, search, [call], ["one"], out)
        with diffsparse.apply(self.pipe, SparseVDiT(plan), schedule=ALWAYS) as handle:
            sparse = self.frames(self.new)
        return handle.report().density, metrics.psnr_db(self.dense, sparse)


def test_epsilon_trades_fidelity_for_speed_and_mixed_heads_beat_any_one_window(tmp_path: Path) -> None:
    twin = Twin(tmp_path)
    density, psnr = zip(*(twin.measure(epsilon=epsilon) for epsilon in (0.03, 0.12, 10.0)), strict=True)
    assert density[0] > density[1] > density[2]
    assert psnr[0] > psnr[1] > psnr[2]
    assert density[2] == pytest.approx(7 / 36)  # nothing is full any more
    for window in ("diagonal", "multi-diagonal"):
        share, fidelity = twin.measure(modes=(window,), epsilon=10.0)
        assert share == pytest.approx(density[2])
        assert fidelity < psnr[2]


@pytest.mark.parametrize(
    "knobs",
    [
        {"sparsity": 1.0},
        {"block": 0},
        {"epsilon": -1},
        {"weight": "much"},
        {"modes": ()},
        {"modes": ("full",)},
        {"modes": ("round",)},
        {"cost": "money"},
        {"groups": 0},
        {"looks": 0.5},
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wants"):
        SparseVDiTSearch(**knobs)
