"""Digest against its own recipe, written out block by block in float64."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse
import diffsparse_kernels as kernels
from diffsparse import AdaSpa, Digest, Layout, Schedule
from diffsparse.errors import ConfigError
from diffsparse.schedule import resolve
from diffsparse.strategies.blocks import keep_count
from diffsparse_eval import metrics
from diffsparse_pipelines import tiny
from diffsparse_pipelines.generation import generation
from support import exact
from support.sites import site
from support.tiny_pipelines import BUILDERS, run

LAYOUTS = [Layout(3, 4, 5), Layout(3, 4, 5, text_before=7), Layout(2, 4, 5, text_after=9)]
BLOCK = 8


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 1.0)


def lacking(q: Tensor, k: Tensor, keys: Tensor | None = None) -> list[list[list[list[float]]]]:
    """[B][H][nQ][nK]: for each tile, the sum of its weights less n times the weight of its mean key."""
    scale, real = q.shape[-1] ** -0.5, torch.ones(q.shape[0], k.shape[2], dtype=torch.bool) if keys is None else keys
    found = []
    for sample in range(q.shape[0]):
        heads = []
        for head in range(q.shape[1]):
            scores = q[sample, head].double() @ k[sample, head].double().T * scale
            lse = scores.masked_fill(~real[sample], -math.inf).logsumexp(-1)
            rows = []
            for part in torch.arange(len(scores)).split(BLOCK):
                row = []
                for block in torch.arange(scores.shape[1]).split(BLOCK):
                    inside = block[real[sample, block]]
                    own = (scores[part][:, inside] - lse[part, None]).exp().sum()
                    mean = (
                        k[sample, head, inside].double().mean(0) if len(inside) else torch.zeros(k.shape[-1]).double()
                    )
                    flat = len(inside) * (q[sample, head, part].double() @ mean * scale - lse[part]).exp().sum()
                    row.append(float(own - flat))
                rows.append(row)
            heads.append(rows)
        found.append(heads)
    return found


@pytest.mark.parametrize("tokens", [40, 45])
@pytest.mark.parametrize("masked", [False, True])
def test_means_never_have_more_mass(tokens: int, masked: bool) -> None:
    q, k = torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16)
    keys = torch.rand(2, tokens) < 0.7 if masked else None
    _, lse = kernels.attention(q, k, k, key_mask=keys)
    sizes: dict[str, Any] = {"q_block": BLOCK, "kv_block": BLOCK, "key_mask": keys}
    mass, means = kernels.block_mass(q, k, lse, **sizes), kernels.means_mass(q, k, lse, **sizes)
    want = torch.tensor(lacking(q, k, keys))
    torch.testing.assert_close(mass - means, want, atol=1e-5, rtol=0)
    assert (want > -1e-9).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_computes_the_blocks_whose_means_lack_most(layout: Layout) -> None:
    q, k, v = (torch.randn(2, 2, layout.tokens, 16) for _ in range(3))
    strategy, here = Digest(0.7, block=BLOCK), site(layout, steps=None)
    dense = strategy.observe(q, k, v, here)
    want, _ = exact.softmax_attention(q, k, v, torch.ones(1, dtype=torch.bool), 16**-0.5)
    torch.testing.assert_close(dense.double(), want, atol=1e-5, rtol=0)
    mask, lack = here.memory["lists"].to_mask(), torch.tensor(lacking(q, k)) * apart(v)
    sink = layout.text_sink(BLOCK)
    free = torch.ones_like(mask) if sink is None else ~sink.expand_as(mask)
    best = lack == lack.amax(-1, keepdim=True)
    assert mask[~free].all()
    assert mask[best].all(), "every row keeps its best"
    for sample in range(2):  # one threshold for the layer, but for the width of a bin
        kept, dropped = lack[sample][mask[sample] & free[sample] & ~best[sample]], lack[sample][~mask[sample]]
        if len(kept):
            assert kept.min() >= dropped.max() * (1 - 2 ** (40 / 4095) + 1)
    share = (0.3 - 1 / BLOCK) / (1 - 1 / BLOCK)  # with a key for each of the others it is 0.3
    assert (mask & free).sum() >= share * free.sum() - 2 * mask.shape[2]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
def test_means_count_as_work(sparsity: float) -> None:
    layout = Layout(4, 16, 16)
    q, k, v = (torch.randn(1, 2, layout.tokens, 8) for _ in range(3))
    here = site(layout, steps=None)
    strategy = Digest(sparsity, block=BLOCK)
    strategy.observe(q, k, v, here)
    strategy.attend(q, k, v, here)
    assert float(here.record.density) == pytest.approx(1 - sparsity, abs=0.01)


def apart(x: Tensor) -> Tensor:
    """[B, H, 1, nK]: root of the mean square distance of the rows of each block from their mean."""
    parts = [part - part.mean(2, keepdim=True) for part in x.double().split(BLOCK, 2)]
    return torch.stack([part.square().sum(-1).mean(-1).sqrt() for part in parts], -1)[:, :, None]


@pytest.mark.parametrize("tokens", [40, 45])
@pytest.mark.parametrize("masked", [False, True])
def test_spread(tokens: int, masked: bool) -> None:
    x = 3 + torch.randn(2, 2, tokens, 16)
    keys = torch.ones(2, tokens, dtype=torch.bool)
    keys[0, 8:16] = keys[1, 19:24] = not masked
    found = kernels.spread(x, BLOCK, keys if masked else None)
    for sample in range(2):
        for number, block in enumerate(torch.arange(tokens).split(BLOCK)):
            inside = x[sample, :, block[keys[sample, block]]].double()
            want = (inside - inside.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt().nan_to_num()
            torch.testing.assert_close(found[sample, :, number].double(), want, atol=1e-4, rtol=1e-5)


def test_drift_of_the_cached_lse_changes_nothing() -> None:
    """A later search on an LSE that is off by another amount in each row of blocks finds the same blocks."""
    layout = Layout(3, 4, 5)
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    memory: dict[str, Any] = {}
    strategy = Digest(0.7, block=BLOCK, searches=(6,))
    strategy.observe(q, k, v, site(layout, 2, steps=None, memory=memory))
    first = memory["lists"].to_mask()
    memory["lse"] = memory["lse"] + torch.randn(1, 2, -(-layout.tokens // BLOCK)).repeat_interleave(BLOCK, 2)[..., :60]
    strategy.attend(q, k, v, site(layout, 6, steps=None, memory=memory))
    assert memory["searched"] == 6
    assert (memory["lists"].to_mask() != first).sum() <= 1  # rounding may move one over the edge of a bin


@given(st.floats(0.05, 0.98), st.integers(4, 60), st.integers(0, 12))
def test_dense_steps_blocks_and_means_add_up(sparsity: float, steps: int, first: int) -> None:
    strategy, left = Digest(sparsity), steps - 1 - first
    again, density = strategy.search_steps(steps, first), strategy.density(steps, first)
    dense = sorted(step for step, is_dense in again.items() if is_dense)
    assert all(first < step < steps for step in dense)
    if left < 1:
        assert not dense
        return
    work = len(dense) + (left - len(dense)) * density + (1 + len(dense)) * density  # and what is computed to compare
    assert work == pytest.approx((1 - sparsity) * left)
    assert len(dense) <= (1 - Fraction(str(sparsity))) * left / 2 < len(dense) + 1
    legs = [b - a for a, b in itertools.pairwise([first, *dense, steps])]
    assert max(legs) - min(legs) <= 1, "evenly spread"


@pytest.mark.parametrize(
    ("sparsity", "steps", "first", "dense"),
    [(0.8, 50, 9, 4), (0.9, 50, 9, 2), (0.9, 25, 4, 1), (0.8, 12, 1, 1), (0.8, 25, 4, 2), (0.9, 100, 19, 4)],
)
def test_no_refresh_is_lost_to_rounding(sparsity: float, steps: int, first: int, dense: int) -> None:
    assert list(Digest(sparsity).search_steps(steps, first).values()) == [True] * dense


@pytest.mark.parametrize("percent", range(5, 100, 5))
def test_counts_are_those_of_exact_arithmetic(percent: int) -> None:
    """Every count that comes of a share times a number, at usual lengths: against whole numbers alone."""
    sparsity = percent / 100
    for steps in range(4, 101):
        warm = max(1, (20 * steps + 50) // 100)  # a fifth, halves up
        assert resolve(sparsity, steps) == max(1, (percent * steps + 50) // 100)
        assert Schedule().bounds(steps)[0] == warm
        left = steps - warm
        dense = (100 - percent) * left // 200
        later = Digest(sparsity).search_steps(steps, warm - 1)
        if dense:
            legs = [-(-(2 * i * (left + 1) - (dense + 1)) // (2 * (dense + 1))) for i in range(1, dense + 1)]
            assert later == {warm - 1 + leg: True for leg in legs}
        else:
            assert later == AdaSpa(searches=(0.4,)).search_steps(steps)
        search = max((percent * steps + 50) // 100 - 1, 0)
        assert AdaSpa(searches=(sparsity,)).search_steps(steps) == ({search: False} if steps > 10 else {})
        assert keep_count(sparsity, steps) == max(1, ((100 - percent) * steps + 50) // 100)


def test_the_residual_is_added_until_it_is_old() -> None:
    layout, memory = Layout(4, 4, 5), {}
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    strategy = Digest(0.8, block=BLOCK)
    dense = strategy.observe(q, k, v, site(layout, 2, steps=15, memory=memory))
    plain, _ = kernels.block_sparse_attention(q, k, v, memory["lists"], summary="means")
    assert (plain - dense).abs().max() > 0.1
    again = strategy.attend(q, k, v, site(layout, 3, steps=15, memory=memory))
    torch.testing.assert_close(again, plain + (dense - plain).bfloat16())
    later = strategy.attend(q + 1, k, v, site(layout, 7, steps=15, memory=memory))
    other, _ = kernels.block_sparse_attention(q + 1, k, v, memory["lists"], summary="means")
    torch.testing.assert_close(later, other + (dense - plain).bfloat16())
    last = site(layout, 8, steps=15, memory=memory)
    torch.testing.assert_close(strategy.attend(q + 1, k, v, last), exact_attention(q + 1, k, v))
    assert last.record.kind == "search", "dense again"


def test_the_residual_outlives_a_search_and_is_dropped_when_old() -> None:
    layout, memory = Layout(4, 4, 5), {}
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    strategy = Digest(0.9, block=4)
    assert strategy.search_steps(15, 2) == {5: False}
    dense = strategy.observe(q, k, v, site(layout, 2, steps=15, memory=memory))
    residual = (dense - kernels.block_sparse_attention(q, k, v, memory["lists"], summary="means")[0]).bfloat16()
    assert memory["residual"].nbytes == 2 * q.numel()
    for step in (5, 8, 9):
        out = strategy.attend(2 * q, k, v, site(layout, step, steps=15, memory=memory))
        plain, _ = kernels.block_sparse_attention(2 * q, k, v, memory["lists"], summary="means")
        torch.testing.assert_close(out, plain + residual if step < 9 else plain)
    assert memory["searched"] == 5
    assert "residual" not in memory


def test_a_dense_step_that_a_step_cache_skipped_comes_with_the_next_call() -> None:
    layout, memory = Layout(4, 4, 5), {}
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    strategy = Digest(0.8, block=BLOCK)
    assert strategy.search_steps(15, 2) == {8: True}
    strategy.observe(q, k, v, site(layout, 2, steps=15, memory=memory))
    for step, kind in ((7, "sparse"), (10, "search"), (11, "sparse")):
        here = site(layout, step, steps=15, memory=memory)
        strategy.attend(q, k, v, here)
        assert here.record.kind == kind


def test_on_the_twin_it_is_closer_to_dense_than_adaspa_at_equal_work() -> None:
    pipe, prompts = tiny.load("twin"), tiny.prompts(3)
    calls = [{**tiny.defaults("twin"), "num_inference_steps": 12, "prompt": prompt} for prompt in prompts]
    dense = [generation(pipe, call, 0).frames for call in calls]
    fidelity, work = {}, {}
    for strategy in (AdaSpa(0.75, block=16), Digest(0.75, block=16)):
        with diffsparse.apply(pipe, strategy) as handle:
            found = [generation(pipe, call, 0).frames for call in calls]
        fidelity[type(strategy)] = [metrics.psnr_db(a, b) for a, b in zip(dense, found, strict=True)]
        work[type(strategy)] = handle.report().density
    assert work[Digest] <= work[AdaSpa] + 0.01
    assert all(a > b + 1 for a, b in zip(fidelity[Digest], fidelity[AdaSpa], strict=True))


@pytest.mark.parametrize(("share", "group"), [(1.0, 1), (0.99, 2), (0.3, 4), (0.1, BLOCK), (0.0, BLOCK)])
def test_little_memory_keeps_means_over_neighbours(share: float, group: int) -> None:
    layout, memory = Layout(3, 4, 5), {}
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    strategy = Digest(0.8, block=BLOCK, memory=share * 2 * q.numel() / 2**30)
    here = site(layout, 2, steps=15, memory=memory)
    dense = strategy.observe(q, k, v, here)
    assert (f"means over {group} tokens" in here.record.note) == (group > 1)
    plain, _ = kernels.block_sparse_attention(q, k, v, memory["lists"], summary="means")
    got = strategy.attend(q, k, v, site(layout, 3, steps=15, memory=memory))
    want = torch.cat([part.mean(2, keepdim=True).expand_as(part) for part in (dense - plain).split(group, 2)], 2)
    torch.testing.assert_close(got, plain + want, atol=2**-8 * float(want.abs().max()), rtol=0)
    assert memory["residual"].nbytes == 2 * 2 * math.ceil(layout.tokens / group) * 16


def test_a_call_that_falls_back_to_dense_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, memory = Layout(3, 4, 5), {}
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    strategy = Digest(0.8, block=BLOCK)
    strategy.observe(q, k, v, site(layout, 2, steps=15, memory=memory))
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 0.0)
    out = strategy.attend(q, k, v, site(layout, 3, steps=15, memory=memory))
    torch.testing.assert_close(out, exact_attention(q, k, v))


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return exact.softmax_attention(q, k, v, torch.ones(1, dtype=torch.bool), 16**-0.5)[0].float()


def test_nothing_dropped_is_dense_and_the_rest_is_compensated() -> None:
    layout = LAYOUTS[0]
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    errors = []
    for sparsity in (0.0, 0.5, 0.9):
        here = site(layout, steps=None)
        strategy = Digest(sparsity, block=BLOCK)
        want, out = strategy.observe(q, k, v, here), strategy.attend(q, k, v, here)
        errors.append((out - want).norm().item())
        lists = here.memory["lists"]
        torch.testing.assert_close(out, kernels.block_sparse_attention(q, k, v, lists, summary="means")[0])
        plain, _ = kernels.block_sparse_attention(q, k, v, lists)
        assert torch.allclose(out, plain) == (sparsity == 0)
        assert errors[-1] <= (plain - want).norm().item() + 1e-4
    assert errors[0] < 1e-4
    assert errors == sorted(errors)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.5, 0.8, 0.95]))
def test_any_grid_stays_finite(frames: int, height: int, width: int, sparsity: float) -> None:
    layout = Layout(frames, height, width, text_after=3)
    q, k, v = (10 * torch.randn(1, 2, layout.tokens, 8) for _ in range(3))
    memory: dict[str, Any] = {}
    strategy = Digest(sparsity, block=4)
    for step in range(8):
        assert strategy.attend(q, k, v, site(layout, step, steps=20, memory=memory)).isfinite().all()


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "ltx", "flux", "sd3"])
def test_on_pipelines(name: str) -> None:
    pipe, call = BUILDERS[name]()
    before = run(pipe, call)
    with diffsparse.apply(pipe, Digest(0.5, block=8), schedule=Schedule(dense_first=1)) as handle:
        out = run(pipe, call)
    assert out.isfinite().all()
    assert not torch.equal(out, before)
    assert 0 < handle.report().sparse_density < 1
    assert torch.equal(run(pipe, call), before)


def test_knobs_are_checked() -> None:
    for wrong in (
        {"sparsity": 1.0},
        {"block": 0},
        {"order": "spiral"},
        {"searches": [0.6]},
        {"searches": (1.5,)},
        {"memory": -1},
    ):
        with pytest.raises(ConfigError):
            Digest(**wrong)
