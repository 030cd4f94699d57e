"""Digest: what it keeps of a dense step, for how long, and what it makes of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import AdaSpa, Digest, Layout, Schedule, Tangent
from diffsparse.errors import ConfigError
from diffsparse.strategies.blocks import with_text
from diffsparse.strategies.residual import LowRank, strongest
from diffsparse.strategies.work import Outline
from diffsparse_eval import metrics
from diffsparse_pipelines import tiny
from diffsparse_pipelines.generation import generation
from support import exact
from support.sites import site
from support.tiny_pipelines import BUILDERS, run

LAYOUT = Layout(3, 8, 9)
LONG = Layout(8, 16, 16)  # long enough for probes
BLOCK = 16


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 9.0)


def inputs(layout: Layout, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batch, 2, layout.tokens, 8) for _ in range(3))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    every = torch.ones(1, dtype=torch.bool)
    parts = (exact.softmax_attention(rows, k, v, every, q.shape[-1] ** -0.5)[0] for rows in q.split(1024, 2))
    return torch.cat([*parts], 2)


def tangent(digest: Digest, qkv: tuple[Tensor, ...], probes: bool = False) -> Tensor:
    """The same without a residual."""
    return Tangent(digest.sparsity, digest.block, probes=probes).attend(*qkv, site(LAYOUT))


def nearest(residual: Tensor, rank: int) -> Tensor:
    """Of that rank, by singular values; float64."""
    u, s, v = torch.linalg.svd(residual.double(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_nearest_of_a_rank_in_eight_bits(rank: int) -> None:
    residual = torch.randn(2, 3, 50, 8) * torch.linspace(3, 0.1, 8)
    kept = LowRank.of(residual, rank)
    want = nearest(residual, rank)
    rounding = want.norm(dim=-1).amax() / 127
    got = kept.correction.added_to(torch.zeros_like(residual))
    assert (got.double() - want).abs().max() <= rounding
    assert kept.codes.dtype == torch.int8
    torch.testing.assert_close(kept.basis @ kept.basis.mT, torch.eye(rank).expand(2, 3, -1, -1), atol=1e-5, rtol=0)


STRENGTHS = {  # of the directions of some rows
    "falling": torch.arange(1, 49) ** -1.0,
    "steep": 0.1 ** torch.arange(48),
    "equal": torch.ones(48),
    "nearly equal": 0.999 ** torch.arange(48),
    "four a little stronger": 1 + 0.02 * (torch.arange(48) < 4),
    "one": (torch.arange(48) < 1).float(),
    "two": torch.cat([torch.tensor([1, 1e-5]), torch.zeros(46)]),
    "none": torch.zeros(48),
}


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("name", STRENGTHS)
def test_the_strongest_directions_hold_what_eigenvectors_hold(name: str, size: float) -> None:
    into, out = (torch.linalg.qr(torch.randn(2, 3, n, 48))[0] for n in (60, 48))
    rows = size * (into * STRENGTHS[name].sqrt()) @ out.mT
    found = strongest(rows.mT @ rows, 4)
    assert torch.equal(found, strongest(rows.mT @ rows, 4))
    if name == "none":
        assert not found.any()
        return
    torch.testing.assert_close(found @ found.mT, torch.eye(4).expand(2, 3, -1, -1), atol=1e-5, rtol=0)
    held = (rows.double() @ found.double().mT).square().sum((2, 3))
    most = torch.linalg.svdvals(rows.double())[..., :4].square().sum(-1)
    assert (held >= 0.995 * most).all()
    assert (held <= 1.0001 * most).all()


def test_what_is_not_finite_has_no_direction() -> None:
    gram = torch.eye(8).expand(1, 2, -1, -1).clone()
    gram[0, 0, 2, 3], gram[0, 1, 1, 1] = torch.nan, torch.inf
    assert strongest(gram, 4).isfinite().all()


def test_rows_that_are_lost_are_not_kept() -> None:
    residual = torch.randn(1, 2, 50, 8)
    lost = residual.clone()
    lost[0, 0, 3], lost[0, 1, 4, 0] = torch.nan, torch.inf
    here = residual.clone()
    here[0, 0, 3], here[0, 1, 4, 0] = 0, 0
    nothing = torch.zeros_like(residual)
    assert torch.equal(
        LowRank.of(lost, 2).correction.added_to(nothing), LowRank.of(here, 2).correction.added_to(nothing)
    )


def test_nothing_missing_keeps_nothing() -> None:
    kept = LowRank.of(torch.zeros(1, 2, 30, 8), 4)
    assert (kept.correction.added_to(torch.ones(1, 2, 30, 8)) == 1).all()


@pytest.mark.parametrize("layout", [LAYOUT, Layout(3, 8, 9, text_after=7)], ids=str)
def test_the_dense_step_is_dense_and_its_residual_mends_the_same_call(layout: Layout) -> None:
    memory: dict[str, Any] = {}
    q, k, v = inputs(layout)
    strategy, here = Digest(0.6, BLOCK, probes=False), site(layout, 2, 15, memory)
    torch.testing.assert_close(strategy.observe(q, k, v, here).double(), dense(q, k, v), atol=1e-5, rtol=1e-4)
    assert (here.record.kind, here.record.planned) == ("dense", True)
    share = with_text(0.4, BLOCK, layout)
    assert float(here.record.beside) == pytest.approx(share, abs=0.05), "what is only compared counts"
    plain = Tangent(0.6, BLOCK, probes=False).attend(q, k, v, site(layout))
    want = plain + nearest(dense(q, k, v) - plain, 4)
    got = strategy.attend(q, k, v, site(layout, 3, 15, memory))
    # with a residual to apply, a few blocks fewer may be affordable
    assert (got - want).norm() < 0.3 * (plain - want).norm()
    assert (got - dense(q, k, v)).norm() < 0.9 * (plain - dense(q, k, v)).norm()


def test_without_probes_it_is_added_for_half_of_the_run() -> None:
    memory: dict[str, Any] = {}
    qkv = inputs(LAYOUT)
    strategy = Digest(0.6, BLOCK, probes=False)
    strategy.observe(*qkv, site(LAYOUT, 2, 15, memory))
    alone = tangent(strategy, qkv)
    same = [torch.equal(strategy.attend(*qkv, site(LAYOUT, step, 15, memory)), alone) for step in range(3, 15)]
    assert same == [False] * 6 + [True] * 6


def test_without_probes_and_without_a_length_it_is_not_added() -> None:
    memory: dict[str, Any] = {}
    qkv = inputs(LAYOUT)
    strategy = Digest(0.6, BLOCK, probes=False)
    strategy.observe(*qkv, site(LAYOUT, 2, None, memory))
    assert torch.equal(strategy.attend(*qkv, site(LAYOUT, 3, None, memory)), tangent(strategy, qkv))


@pytest.mark.parametrize("steps", [15, None])
def test_probes_decide_what_of_it_is_used(steps: int | None) -> None:
    """The same call again is mended by it, another call is not harmed by it."""
    memory: dict[str, Any] = {}
    qkv, others = inputs(LONG), inputs(LONG)
    strategy = Digest(0.7, BLOCK)
    strategy.observe(*qkv, site(LONG, 2, steps, memory))

    def error(method: Tangent, of: tuple[Tensor, ...], kept: dict[str, Any]) -> float:
        return float((method.attend(*of, site(LONG, 9, steps, kept)) - dense(*of)).norm())

    plain = Tangent(0.7, BLOCK)
    assert error(strategy, qkv, memory) < 0.97 * error(plain, qkv, {})
    assert error(strategy, others, memory) < 1.03 * error(plain, others, {})


RENEWED = {50: [19, 30, 40], 100: [31, 42, 54, 65, 77, 88]}  # at 80 %, of which a fifth dense at the start


@pytest.mark.parametrize("steps", [4, 15, 30, 50, 100, None])
def test_long_runs_renew_what_was_kept(steps: int | None) -> None:
    first = 9 if steps is None else max(steps // 5 - 1, 0)
    want = RENEWED.get(steps or 0, [])
    assert Digest(0.8)._renewals(steps, first) == want
    assert all(b - a >= 10 for a, b in itertools.pairwise([first, *want]))


@pytest.mark.parametrize("dense_last", [0, 0.25, 0.45, 0.6, 1.0])
@pytest.mark.parametrize("steps", [40, 50, 100])
def test_a_dense_end_needs_no_renewal(dense_last: float, steps: int) -> None:
    schedule, strategy = Schedule(dense_last=dense_last), Digest(0.8, 32)
    first, end = schedule.bounds(steps)
    assert end is not None
    renewals = strategy._renewals(end, first - 1)
    assert all(step <= end - 10 for step in renewals)
    works = [step.work or 0 for step in strategy.expected(Outline.of(schedule, steps, LONG, 8))]
    assert sum(works[first:end]) == pytest.approx(0.2 * max(end - first, 0), rel=0.02)


def test_experts_that_take_turns_renew_nothing() -> None:
    """How many of the steps one of them has is unknown."""
    pipe, kwargs = BUILDERS["wan22"]()
    with diffsparse.apply(pipe, Digest(0.8, 8)) as handle:
        run(pipe, kwargs, num_inference_steps=40)
        calls = handle.report().calls
    assert {call.step for call in calls if call.kind == "dense"} == set(range(8))
    assert {call.reason for call in calls if call.kind == "dense"} == {"schedule"}
    assert max(call.step for call in calls) == 39


def test_probes_guard_what_was_kept_where_they_are_cheap() -> None:
    """Attention that moved on since the last dense step: what was kept is not added as it is."""
    layout, memory = Layout(16, 32, 32), dict[str, Any]()
    qkv, others = inputs(layout), inputs(layout)
    strategy = Digest(0.8, 64)
    strategy.observe(*qkv, site(layout, 9, 50, memory))
    between = memory["kept"].between
    assert between._probe_count(layout.tokens, 8) == 60  # a thirty-second of an eighth of 16384, less half a head
    assert between._probe_count(LONG.tokens, 8) == 0
    want = dense(*others)
    trusting = {"kept": memory["kept"]._replace(between=replace(between, probes=False))}
    errors = [
        float((strategy.attend(*others, site(layout, 10, 50, kept)) - want).norm()) for kept in (memory, trusting)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_the_same_dense_step_twice_is_no_renewal() -> None:
    memory, here = dict[str, Any](), []
    for _ in range(2):
        here.append(site(LONG, 9, 50, memory))
        Digest(0.8, 32).observe(*inputs(LONG), here[-1])
    assert [one.record.reason for one in here] == ["schedule", "schedule"]


def test_a_dense_step_of_the_schedule_is_not_charged_to_those_that_follow() -> None:
    """Where a step cache decides as it goes, the dense steps may turn out to be more than they seemed."""
    memory = dict[str, Any]()
    for step in (1, 2):
        Digest(0.8, 32).observe(*inputs(LONG), site(LONG, step, 15, memory))
        assert (memory["kept"].plan.spent, memory["kept"].plan.start) == (0, step)


def test_memory_without_room_for_the_blocks_keeps_what_short_runs_keep() -> None:
    q, k, v = inputs(LONG)
    kept = []
    for steps in (15, 50):
        memory: dict[str, Any] = {}
        strategy = Digest(0.8, 4, memory=2 * 14_000 / 2**30)
        here = site(LONG, 9, steps, memory)
        strategy.observe(q, k, v, here)
        kept.append(memory["kept"])
        assert here.record.note == ""
    assert kept[0].residual.rank == kept[1].residual.rank == 4
    assert kept[1].plan.ahead == []
    assert kept[1].between == strategy


def test_between_dense_steps_the_blocks_stay() -> None:
    """What is due is renewed also where a step cache left that step out; work is as expected, and as asked for."""
    memory: dict[str, Any] = {}
    qkv, strategy = inputs(LONG), Digest(0.8, 32)
    ran = {}
    for step in range(9, 50):
        if step in (20, 30):
            continue
        here = site(LONG, step, 50, memory)
        noisy = tuple(x + 0.02 * step * torch.randn_like(x) for x in qkv)
        before = memory.get("kept")
        (strategy.observe if step == 9 else strategy.attend)(*noisy, here)
        ran[step] = here.record
        renewed = step in (9, 19, 31, 40)
        assert (memory["kept"] is before) != renewed, step
        assert here.record.kind == ("dense" if renewed else "sparse"), step
    assert [ran[step].reason for step in (9, 19, 31, 40)] == ["schedule", *["renewal"] * 3]
    densities = [[float(ran[step].density) for step in leg] for leg in (range(10, 19), range(32, 40), range(41, 50))]
    assert all(len(set(leg)) == 1 for leg in densities), "new blocks would have other densities"
    steps = strategy.expected(Outline(50, 10, 50, LONG, 8))
    for step in (9, 15, 19, 25, 40, 49):
        assert float(ran[step].work) == pytest.approx(steps[step].work, abs=5e-3), step
    assert sum(step.work or 0 for step in steps[10:]) / 40 == pytest.approx(0.2, abs=0.01)


def test_the_blocks_that_stay_are_those_that_what_was_kept_is_of() -> None:
    """The same call after a dense step, whose blocks a step that chose anew would not take."""
    memory: dict[str, Any] = {}
    qkv, others = inputs(LONG), inputs(LONG)
    strategy = Digest(0.8, 32, probes=False)
    strategy.observe(*others, site(LONG, 9, 50, memory))
    bits = memory["kept"].blocks
    between = strategy._between(memory["kept"].plan)
    blocks = between._blocks(*others, site(LONG, 9, 50), None)
    assert torch.equal(bits, blocks.lists.packed())
    found = strategy.attend(*qkv, site(LONG, 10, 50, memory))
    want = site(LONG, 10, 50).sparse(*qkv, between._blocks(*qkv, site(LONG, 10, 50), memory["kept"].residual, bits))
    assert torch.equal(found, want)


def test_without_a_dense_step_it_is_tangent() -> None:
    qkv, strategy = inputs(LONG), Digest(0.7, BLOCK)
    found = strategy.attend(*qkv, site(LONG, 0, 4))
    assert torch.equal(found, Tangent(0.7, BLOCK).attend(*qkv, site(LONG, 0, 4)))


@pytest.mark.parametrize("share", [2.0, 1.0, 0.8, 0.4, 0.1, 0.0])
def test_little_memory_keeps_a_lower_rank(share: float) -> None:
    memory: dict[str, Any] = {}
    q, k, v = inputs(LAYOUT)
    whole = 2 * (LAYOUT.tokens * (4 + 2) + 4 * 4 * 8)  # bytes of two heads at rank 4
    strategy = Digest(0.6, BLOCK, memory=share * whole / 2**30)
    here = site(LAYOUT, 2, 15, memory)
    strategy.observe(q, k, v, here)
    rank = memory["kept"][0].rank if "kept" in memory else 0
    assert rank == max(r for r in range(5) if r == 0 or 2 * (LAYOUT.tokens * (r + 2) + 4 * r * 8) <= share * whole)
    assert (f"rank {rank}" in here.record.note) == (rank < 4)
    if rank:
        assert sum(x.nbytes for x in memory["kept"][0]) <= share * whole
    else:
        assert torch.equal(strategy.attend(q, k, v, site(LAYOUT, 3, 15, memory)), tangent(strategy, (q, k, v)))


@pytest.mark.parametrize("memory", [0, 1.2, 1e300])
def test_the_dense_step_counts_as_expected(memory: float) -> None:
    strategy, here = Digest(0.7, 32, memory=memory), site(LONG, 2, 15, {})
    strategy.observe(*inputs(LONG), here)
    want = strategy.expected(Outline(15, 3, 15, LONG, 8))[2].work
    assert float(here.record.work) == pytest.approx(want, abs=5e-3)


@pytest.mark.parametrize(
    ("tokens", "layers", "heads", "ranks"),
    [(75_600, 40, 40, (4, 4)), (119_056, 60, 24, (4, 3))],
    ids=["wan", "hunyuan"],
)
@pytest.mark.parametrize("steps", [15, 50])
def test_what_large_models_keep(tokens: int, layers: int, heads: int, ranks: tuple[int, int], steps: int) -> None:
    """Wan 14B and HunyuanVideo at 720p keep this rank, and in long runs their blocks, in 1.2 GiB a branch."""
    layout, strategy = Layout(tokens, 1, 1), Digest(0.8, (128, 64))
    here = replace(site(layout, 9, steps, {}), layers=layers)
    renewals = strategy._renewals(steps, steps // 5 - 1)
    rank = strategy._rank(torch.empty(1, heads, tokens, 128, device="meta"), here, renewals)
    assert rank == ranks[steps == 50]
    blocks = -(-tokens // 128) * -(-tokens // (64 * 8)) if steps == 50 else 0  # one bit each
    assert layers * heads * (tokens * (rank + 2) + 4 * rank * 128 + blocks) / 2**30 < 1.2


def test_a_call_that_falls_back_to_dense_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: dict[str, Any] = {}
    q, k, v = inputs(LONG)
    strategy = Digest(0.7, BLOCK)
    strategy.observe(q, k, v, site(LONG, 2, 15, memory))
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 0.0)
    out = strategy.attend(q, k, v, site(LONG, 3, 15, memory))
    torch.testing.assert_close(out.double(), dense(q, k, v), atol=1e-5, rtol=1e-4)


def test_nothing_dropped_keeps_nothing() -> None:
    memory: dict[str, Any] = {}
    q, k, v = inputs(LAYOUT)
    strategy = Digest(0.0, BLOCK)
    strategy.observe(q, k, v, site(LAYOUT, 2, 15, memory))
    assert not memory
    out = strategy.attend(q, k, v, site(LAYOUT, 3, 15, memory))
    torch.testing.assert_close(out.double(), dense(q, k, v), atol=1e-5, rtol=1e-4)


def test_on_the_twin_it_is_closer_to_dense_than_adaspa_at_equal_work() -> None:
    pipe, prompts = tiny.load("twin"), tiny.prompts(3)
    calls = [{**tiny.defaults("twin"), "num_inference_steps": 12, "prompt": prompt} for prompt in prompts]
    frames = [generation(pipe, call, 0).frames for call in calls]
    fidelity, work = {}, {}
    for strategy in (AdaSpa(0.5, block=16), Digest(0.5, block=32)):
        with diffsparse.apply(pipe, strategy) as handle:
            found = [generation(pipe, call, 0).frames for call in calls]
        fidelity[type(strategy)] = [metrics.psnr_db(a, b) for a, b in zip(frames, found, strict=True)]
        work[type(strategy)] = handle.report().work
    assert work[Digest] <= work[AdaSpa] + 0.01
    assert all(a > b + 1 for a, b in zip(fidelity[Digest], fidelity[AdaSpa], strict=True))


def test_it_is_quantised_as_little_as_bfloat16_rounds() -> None:
    """Eight bits a coefficient lose less than bfloat16 outputs do."""
    out, residual = torch.randn(1, 2, 60, 8), 0.05 * torch.randn(1, 2, 60, 8)
    error = LowRank.of(residual, 8).correction.added_to(out) - (out + residual)
    assert error.norm() < 2**-9 * math.sqrt(2) * out.norm()


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "ltx", "flux", "sd3"])
def test_on_pipelines(name: str) -> None:
    pipe, call = BUILDERS[name]()
    before = run(pipe, call)
    with diffsparse.apply(pipe, Digest(0.5, block=8), schedule=Schedule(dense_first=1)) as handle:
        out = run(pipe, call)
    assert out.isfinite().all()
    assert not torch.equal(out, before)
    report = handle.report()
    assert report.sparse_calls > 0
    assert report.memory_bytes > 0
    assert torch.equal(run(pipe, call), before)


def test_knobs_are_checked() -> None:
    for wrong in (
        {"sparsity": 1.0},
        {"block": 0},
        {"order": "spiral"},
        {"memory": -1},
        {"memory": "much"},
        {"memory": math.inf},
        {"memory": 10**400},
    ):
        with pytest.raises(ConfigError):
            Digest(**wrong)
