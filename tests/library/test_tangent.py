"""Tangent against its own recipe, written out block by block in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse
from diffsparse import Digest, Layout, Schedule, Tangent
from diffsparse.errors import ConfigError
from diffsparse.site.compute import Blocks, Site, multiply
from diffsparse.strategies.probes import mended_rows, probe_count
from diffsparse.strategies.work import Outline
from diffsparse_kernels import edges, fit_rows
from support import exact
from support.sites import site
from support.tiny_pipelines import BUILDERS, run

LAYOUTS = [Layout(3, 8, 9), Layout(3, 8, 9, text_before=11), Layout(2, 8, 9, text_after=13)]
BLOCKS = [16, (32, 16), (16, 32)]


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 9.0)


def inputs(layout: Layout, batch: int = 1, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batch, 2, layout.tokens, dim) for _ in range(3))


def attended(strategy: Tangent, qkv: tuple[Tensor, ...], here: Site) -> tuple[Tensor, Tensor]:
    """The output, and the mask of its blocks."""
    seen: list[Blocks] = []

    def product(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, at: Site) -> tuple[Tensor, Tensor]:
        seen.append(blocks)
        return multiply(q, k, v, blocks, at)

    out = strategy.attend(*qkv, diffsparse.site.compute.replace(here, product=product))
    return out, seen[0].lists.to_mask()


def recipe(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: Any, real: Tensor, first: bool
) -> tuple[Tensor, Tensor]:
    """One head in float64, q, k, v [N, D], mask [nQ, nK], real [N]: the output, and the estimated errors [nQ, nK].

    first: whether to first order; else by means, and |H| is as large as it can be.
    """
    q, k, v, scale = q.double(), k.double(), v.double(), q.shape[-1] ** -0.5
    q_block, kv_block = edges(block)
    columns = [part[real[part]] for part in torch.arange(len(k)).split(kv_block)]
    count = torch.tensor([float(len(part)) for part in columns]).double()
    mean_k, mean_v, slope, variance, spread = [], [], [], [], []
    for part in columns:
        keys, values = (x[part] if len(part) else torch.zeros_like(x[:1]) for x in (k, v))
        mean_k.append(keys.mean(0))
        mean_v.append(values.mean(0))
        dk, dv = keys - keys.mean(0), values - values.mean(0)
        slope.append(scale * dk.T @ dv / len(keys))
        variance.append(scale**2 * dk.square().sum() / dk.numel())
        spread.append(dv.square().sum(-1).mean().sqrt())
    mean_k, mean_v, slope, variance, spread = (torch.stack(x) for x in (mean_k, mean_v, slope, variance, spread))
    squares = q.square().sum(-1)
    scores = scale * q @ mean_k.T + count.log()
    weights = scores.softmax(-1)
    steepness = (slope.square().sum((-1, -2)) / q.shape[-1]).sqrt() if first else variance.sqrt() * spread
    once, twice = squares[:, None] * steepness**2, (squares[:, None] * variance * spread / 2).square()
    errors = torch.stack([x.sum(0).sqrt() for x in (weights.square() * (once + twice)).split(q_block)])
    out = []
    for number, rows in enumerate(torch.arange(len(q)).split(q_block)):
        listed = torch.cat([part for part, kept in zip(columns, mask[number], strict=True) if kept] or [columns[0][:0]])
        near = scale * q[rows] @ k[listed].T
        far = scores[rows] + first * (squares[rows, None] * variance / 2).clamp(max=3)
        far = far.masked_fill(mask[number], -math.inf)
        both = torch.cat([near, far], 1).softmax(-1)
        near, far = both.split([len(listed), len(columns)], 1)
        mixed = (scale * q[rows].mean(0) @ mean_k.T + count.log()).masked_fill(mask[number], -math.inf)
        shares = mixed.softmax(-1).nan_to_num(0)
        step, reach = q[rows] @ (shares @ slope.flatten(1)).view(slope.shape[1:]), shares @ spread / 2
        step = step / (1 + step.square().sum(-1, keepdim=True) / (reach**2).clamp(min=1e-200)).sqrt()
        out.append(near @ v[listed] + far @ mean_v + first * far.sum(-1, keepdim=True) * step)
    return torch.cat(out), errors


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("sparsity", "first"), [(0.6, True), (0.9, False)])
def test_recipe(layout: Layout, masked: bool, block: Any, sparsity: float, first: bool) -> None:
    """To first order, and by means where the matrices would take over a third of the work."""
    q, k, v = inputs(layout, batch=2)
    real = torch.ones(2, layout.tokens, dtype=torch.bool)
    if masked:
        real[0, 40:75] = False
        real[1, -20:] = False
    here = site(layout, key_mask=real if masked else None)
    out, mask = attended(Tangent(sparsity, block, probes=False), (q, k, v), here)
    sink = layout.sink(block)
    free = torch.ones_like(mask[0, 0]) if sink is None else ~sink
    assert mask[..., ~free].all()
    for sample in range(2):
        errors = []
        for head in range(2):
            at = sample, head
            want, error = recipe(q[at], k[at], v[at], mask[at], block, real[sample], first)
            torch.testing.assert_close(out[at].double(), want, atol=2e-5, rtol=1e-4)
            errors.append(error)
        error = torch.stack(errors).masked_fill(~free, -1)
        best = error == error.amax(-1, keepdim=True)
        assert mask[sample][best].all(), "every row keeps its best beside text"
        kept, dropped = error[mask[sample] & free & ~best], error[~mask[sample]]
        if len(kept):  # one threshold for the layer, but for the width of a bin
            assert kept.min() >= dropped.max() * (1 - 2 ** (40 / 4095) + 1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("probes", [False, True])
def test_all_that_is_computed_is_the_work_that_was_asked_for(sparsity: float, block: Any, probes: bool) -> None:
    layout = Layout(8, 16, 16)
    here, strategy = site(layout), Tangent(sparsity, block, probes=probes)
    strategy.attend(*inputs(layout), here)
    assert here.record.work == pytest.approx(1 - sparsity, abs=1e-3)
    assert here.memory.keys() <= {"density"}, "it keeps nothing"


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_text_is_computed_beside_the_share(sparsity: float) -> None:
    layout = Layout(16, 16, 16, text_before=48)
    here, strategy = site(layout), Tangent(sparsity, 32)
    strategy.attend(*inputs(layout), here)
    text = 2 / layout.blocks(32)  # of the rows, and of the columns
    assert here.record.work == pytest.approx(1 - sparsity * (1 - text) ** 2, abs=2e-3)
    want = strategy.expected(Outline(1, 0, 1, layout, 8))[0].work
    assert here.record.work == pytest.approx(want, abs=1e-3)


def few(layout: Layout) -> Tensor:
    """Keys of which one in eight is real."""
    return torch.arange(layout.tokens)[None] < layout.tokens / 8


@pytest.mark.parametrize("kind", ["masked", "alike", "nothing"])
def test_what_is_exact_as_it_is_takes_no_work(kind: str) -> None:
    """Blocks without keys, of equal keys or values: there all errors are 0, and so equal."""
    layout = Layout(8, 16, 16)
    q, k, v = inputs(layout)
    real = few(layout) if kind == "masked" else None
    if kind == "alike":
        v = torch.ones_like(v)
    elif kind == "nothing":
        q = torch.zeros_like(q)
    here = site(layout, key_mask=real)
    out = Tangent(0.8, 32, probes=False).attend(q, k, v, here)
    every = torch.ones(1, dtype=torch.bool) if real is None else real[:, None, None]
    want, _ = exact.softmax_attention(q, k, v, every, 8**-0.5)
    assert here.record.work < 0.25
    assert (out.double() - want).abs().max() < 1e-5


def test_a_lost_row_takes_no_other_with_it() -> None:
    layout = Layout(8, 16, 16)
    q, k, v = inputs(layout)
    q[0, 0, 0] = torch.nan  # a probe
    out = Tangent(0.7, 32).attend(q, k, v, site(layout))
    assert out[0, 0, 0].isnan().all()
    assert out[0, 1].isfinite().all()
    assert out[0, 0, 32:].isfinite().all()


def test_text_is_exact() -> None:
    layout = Layout(8, 16, 16, text_before=5, text_after=20)
    q, k, v = inputs(layout)
    out = Tangent(0.8, 16).attend(q, k, v, site(layout))
    want, _ = exact.softmax_attention(q, k, v, torch.ones(1, dtype=torch.bool), 8**-0.5)
    text = torch.cat([torch.arange(5), torch.arange(layout.tokens - 20, layout.tokens)])
    torch.testing.assert_close(out[:, :, text].double(), want[:, :, text], atol=1e-5, rtol=1e-4)
    assert (out.double() - want).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_dropped_is_dense(dtype: torch.dtype) -> None:
    layout = LAYOUTS[1]
    q, k, v = (x.to(dtype) for x in inputs(layout))
    out = Tangent(0.0, (32, 16)).attend(q, k, v, site(layout))
    every = torch.ones(1, dtype=torch.bool)
    want, _ = exact.softmax_attention(q, k, v, every, 8**-0.5)
    assert (out.double() - want).abs().max() <= exact.tolerance(want, exact.eager(q, k, v, every, 8**-0.5))


def test_samples_of_a_batch_are_as_alone() -> None:
    layout = Layout(8, 16, 16, text_after=9)
    q, k, v = inputs(layout, batch=3)
    real = torch.rand(3, layout.tokens) < 0.8
    strategy = Tangent(0.7, 32)
    together = strategy.attend(q, k, v, site(layout, key_mask=real))
    for i in range(3):
        alone = strategy.attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], site(layout, key_mask=real[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_masked_keys_have_no_influence() -> None:
    layout = Layout(8, 16, 16)
    q, k, v = inputs(layout)
    real = torch.rand(1, layout.tokens) < 0.7
    strange = 100 * torch.randn_like(k)
    others = (torch.where(real[:, None, :, None], x, strange) for x in (k, v))
    strategy, here = Tangent(0.7, 32), site(layout, key_mask=real)
    torch.testing.assert_close(strategy.attend(q, k, v, here), strategy.attend(q, *others, here))


# --- probes -----------------------------------------------------------------------------------------------------------


def best_of_left_out(missing: Tensor, out: Tensor, kept: Tensor | None, basis: Tensor | None) -> Tensor:
    """What the best candidate adds to its own rows [n, D]; each is judged by fits to all rows but one. One head."""
    n, features = len(missing), []
    for x in (out, kept):
        if x is not None:
            centred = x - x.mean(0)
            features.append(centred / centred.square().mean().sqrt())
    x = torch.cat(features, 1)
    starts = [torch.zeros_like(missing)] if kept is None else [torch.zeros_like(missing), kept @ basis]

    def ridge(rows: Tensor, start: Tensor, penalty: float) -> Tensor:
        """Predictions for all n rows of a fit with a free intercept to some."""
        design = torch.cat([x[rows], torch.ones(len(rows), 1).to(x)], 1)
        cost = penalty * torch.eye(design.shape[1]).to(x)
        cost[-1, -1] = 0
        weights = torch.linalg.solve(design.T @ design + cost, design.T @ (missing - start)[rows])
        return start + torch.cat([x, torch.ones(n, 1).to(x)], 1) @ weights

    everyone = torch.arange(n)
    candidates = []
    for start in starts:
        candidates.append((lambda rows, start=start: start))
        candidates.append((lambda rows, start=start: start + (missing - start)[rows].mean(0)))
        candidates += [(lambda rows, start=start, p=p: ridge(rows, start, p * n)) for p in (0.03, 0.3, 3.0)]
    errors = []
    for candidate in candidates:
        left = torch.stack([candidate(everyone[everyone != i])[i] for i in range(n)])
        errors.append((left - missing).square().sum())
    return candidates[int(torch.stack(errors).argmin())](everyone)


@pytest.mark.parametrize("noise", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("with_kept", [False, True])
def test_the_fit_is_what_leaving_each_probe_out_says(noise: float, with_kept: bool) -> None:
    n, dim, rank = 40, 6, 2
    out = torch.randn(2, 3, n, dim).double()
    kept, basis = (torch.randn(2, 3, *shape).double() for shape in ((n, rank), (rank, dim)))
    missing = 0.2 * out @ torch.randn(dim, dim).double() + noise * torch.randn(2, 3, n, dim).double()
    missing = missing + kept @ basis if with_kept else missing
    given = {"codes": kept, "scale": torch.ones(2, 3, n, 1).double(), "basis": basis} if with_kept else {}
    found = fit_rows(out + missing, out, torch.arange(n), **given).added_to(out) - out
    for at in ((b, h) for b in range(2) for h in range(3)):
        want = best_of_left_out(missing[at], out[at], *((kept[at], basis[at]) if with_kept else (None, None)))
        torch.testing.assert_close(found[at], want, atol=1e-9, rtol=1e-6)


def test_an_affine_error_is_mended() -> None:
    dim = 8
    exact_rows = torch.randn(1, 2, 500, dim).double()
    bent = exact_rows @ (torch.eye(dim).double() + 0.1 * torch.randn(dim, dim).double()) + 0.3
    rows = torch.linspace(0, 499, 64).long()
    mended = fit_rows(exact_rows[:, :, rows], bent, rows).added_to(bent)
    assert (mended - exact_rows).norm() < 0.1 * (bent - exact_rows).norm()


@pytest.mark.parametrize("strategy", [Tangent(0.0), Tangent(0.8, (64, 1)), Digest(0.8, 1)], ids=repr)
def test_where_nothing_is_dropped_there_is_nothing_else(strategy: Tangent) -> None:
    """Blocks of one key are as dear as their means."""
    here = site(LAYOUTS[1])
    qkv = inputs(LAYOUTS[1])
    torch.testing.assert_close(strategy.attend(*qkv, here), here.dense_backend.attend(*qkv))
    assert (here.record.kind, here.record.work) == ("sparse", 1)
    assert [step.work for step in strategy.expected(Outline(2, 1, 2, LAYOUTS[1], 8))] == [1, 1]


def test_noise_is_left_alone() -> None:
    out, noise = torch.randn(1, 8, 64, 16).double(), torch.randn(1, 8, 64, 16).double()
    added = fit_rows(out + noise, out, torch.arange(64)).added_to(out) - out
    assert (added.square().sum((-1, -2)) < 0.05 * noise.square().sum((-1, -2))).all()


@settings(max_examples=50)
@given(st.floats(0.002, 0.13), st.integers(1, 200_000), st.sampled_from([16, 64, 128]))
def test_probes_take_no_more_than_they_may(work: float, tokens: int, dim: int) -> None:
    count = probe_count(work, tokens, dim)
    assert count == 0 or 32 <= count <= max(64, dim)
    assert (count + dim / 2) / tokens <= work + 1e-9 or not count


def test_rows_of_text_blocks_are_no_probes() -> None:
    layout = Layout(4, 8, 8, text_before=10, text_after=3)
    rows, mended = mended_rows(layout, 16, 64, torch.device("cpu"))
    assert mended is not None
    assert rows.min() >= 16
    assert rows.max() < layout.tokens // 16 * 16
    assert mended[rows].all()
    assert not mended[:16].any()


# --- runs -------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.5, 0.8, 0.95]))
def test_any_grid_stays_finite(frames: int, height: int, width: int, sparsity: float) -> None:
    layout = Layout(frames, height, width, text_after=3)
    q, k, v = (10 * torch.randn(1, 2, layout.tokens, 8) for _ in range(3))
    assert Tangent(sparsity, (8, 4)).attend(q, k, v, site(layout)).isfinite().all()


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "ltx", "flux", "sd3"])
def test_on_pipelines(name: str) -> None:
    pipe, call = BUILDERS[name]()
    before = run(pipe, call)
    with diffsparse.apply(pipe, Tangent(0.5, 16), schedule=Schedule(dense_first=0)) as handle:
        out = run(pipe, call)
    assert out.isfinite().all()
    assert not torch.equal(out, before)
    assert handle.report().sparse_calls > 0
    assert torch.equal(run(pipe, call), before)


def test_knobs_are_checked() -> None:
    for wrong in ({"sparsity": 1.0}, {"block": 0}, {"block": (48, 32)}, {"order": "spiral"}):
        with pytest.raises(ConfigError):
            Tangent(**wrong)
