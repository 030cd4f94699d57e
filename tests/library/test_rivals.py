"""Rivals against the formulas of their papers, written out block by block in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import Compensated, Layout, Schedule, Site
from diffsparse.errors import ConfigError
from diffsparse.strategies import STRATEGIES, name_of, parse
from diffsparse.strategies.base import Strategy, in_order
from diffsparse.strategies.rivals import PISA, SVGEAR, DiTFastAttn, SolAttn
from diffsparse.strategies.rivals.svg_ear import clusters
from diffsparse.strategies.work import Outline
from support import exact
from support.sites import site
from support.tiny_pipelines import BUILDERS, run

LAYOUTS = [Layout(3, 4, 5), Layout(3, 4, 6, text_before=7), Layout(2, 4, 5, text_after=9)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BLOCK, DIM = 8, 8
SCALE = DIM**-0.5
RIVALS = [SolAttn, PISA, SVGEAR, DiTFastAttn]


def inputs(layout: Layout, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v [2, 2, N, D] whose keys and values have something in common, so that summaries have something to say."""
    common = torch.randn(2, 2, layout.tokens, DIM)
    return [(common + torch.randn_like(common)).to(dtype) for _ in range(3)]


def padding(layout: Layout, masked: bool) -> Tensor:
    """bool [2, N]: some tokens of the first sample, a whole block of the second."""
    keys = torch.ones(2, layout.tokens, dtype=torch.bool)
    if masked:
        keys[0] = torch.rand(layout.tokens) < 0.8
        keys[1, 2 * BLOCK : 3 * BLOCK] = False
    return keys


def blocks(length: int) -> list[Tensor]:
    return list(torch.arange(length).split(BLOCK))


def means(x: Tensor, real: Tensor) -> Tensor:
    """[N, D] -> [nK, D], 0 where nothing is real."""
    return torch.stack([x[b[real[b]]].mean(0) if real[b].any() else torch.zeros_like(x[0]) for b in blocks(len(x))])


def sink(layout: Layout) -> Tensor:
    """bool [nQ, nK]."""
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[layout.span] = False
    holds = torch.stack([text[b].any() for b in blocks(layout.tokens)])
    return holds[:, None] | holds


def best(scores: Tensor, keep: int, always: Tensor) -> Tensor:
    """The `keep` largest of each row, where those that are always kept come first."""
    place = scores.masked_fill(always, torch.inf).argsort(-1, descending=True).argsort(-1)
    return (place < keep) | always


def kept(sparsity: float, count: int, beside: float) -> int:
    """Of `count` blocks, so that these, a key for each of the others and what is beside are 1 - sparsity."""
    return max(1, int((1 - sparsity - beside - 1 / BLOCK) / (1 - 1 / BLOCK) * count + 0.5))


def summarised(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, real: Tensor, slope: Tensor | None = None) -> Tensor:
    """One head: the blocks of `mask`, the means of the others, and what the slope adds for these."""
    key, value = means(k, real), means(v, real)
    rows = []
    for number, part in enumerate(blocks(len(q))):
        seen = mask[number].repeat_interleave(BLOCK)[: len(k)] & real
        counts = torch.stack([real[b].sum() for b in blocks(len(k))]).masked_fill(mask[number], 0).to(q.dtype)
        scores = torch.cat([q[part] @ k[seen].T * SCALE, q[part] @ key.T * SCALE + counts.log()], 1)
        weights = scores.softmax(-1)
        theirs = weights[:, int(seen.sum()) :]
        row = weights[:, : int(seen.sum())] @ v[seen] + theirs @ value
        rows.append(row if slope is None else row + theirs.sum(-1, keepdim=True) * (q[part] @ slope))
    return torch.cat(rows)


def assert_equal(got: Tensor, each_head: Any, qkv: list[Tensor]) -> None:
    """`each_head(sample, head, dtype)` in float64, and in q's dtype for the tolerance."""
    batch, heads = got.shape[:2]
    want, low = (
        torch.stack([torch.stack([each_head(b, h, dtype) for h in range(heads)]) for b in range(batch)])
        for dtype in (torch.float64, qkv[0].dtype)
    )
    torch.testing.assert_close(got.double(), want, atol=max(exact.tolerance(want, low), 1e-12), rtol=0)


def z_scores(q: Tensor, k: Tensor, real: Tensor) -> Tensor:
    """[nQ, nK] of one head, -inf for blocks without a key."""
    holds = torch.stack([real[b].any() for b in blocks(len(k))])
    scores = means(q, real) @ means(k, real).T * SCALE
    z = torch.full_like(scores, -torch.inf)
    for row, line in enumerate(scores):
        inside = line[holds]
        z[row, holds] = (inside - inside.mean()) / (inside.var(correction=0) + 1e-6).sqrt()
    return z


def near(layout: Layout) -> Tensor:
    place = torch.arange(layout.blocks(BLOCK))
    return ((place[:, None] - place).abs() <= 1) | sink(layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tau", [None, -0.3, 1.0])
def test_sol(layout: Layout, masked: bool, tau: float | None, dtype: torch.dtype) -> None:
    qkv, real = inputs(layout, dtype), padding(layout, masked)
    got = SolAttn(0.4, BLOCK, tau=tau).attend(*qkv, site(layout, key_mask=real if masked else None))
    q, k, _ = (x.double() for x in qkv)
    z = torch.stack([torch.stack([z_scores(q[b, h], k[b, h], real[b]) for h in range(2)]) for b in range(2)])
    if tau is None:
        keep, always = kept(0.4, z[0].numel(), 0.5 / BLOCK**2), near(layout).expand_as(z)
        chosen = best(z.flatten(1), keep, always.flatten(1)).view_as(z)
    else:
        chosen = (z > tau) | near(layout)
    if not layout.has_text:
        assert 0 < (chosen & ~near(layout)).sum() < (~near(layout)).sum() * 4, "some stand out"

    def head(b: int, h: int, to: torch.dtype) -> Tensor:
        return summarised(*(x[b, h].to(to) for x in qkv), chosen[b, h], real[b])

    assert_equal(got, head, qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pisa(layout: Layout, masked: bool, dtype: torch.dtype) -> None:
    layout_blocks, tokens = layout.blocks(BLOCK), layout.tokens
    qkv, real = inputs(layout, dtype), padding(layout, masked)
    got = PISA(0.2, BLOCK).attend(*qkv, site(layout, key_mask=real if masked else None))

    def matrices(k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        """H_b of each block, [nK, D, D_v]."""
        inside = [b[keys[b]] for b in blocks(tokens)]
        return torch.stack([(k[b] - means(k, keys)[i]).T @ v[b] for i, b in enumerate(inside)])

    def head(b: int, h: int, to: torch.dtype) -> Tensor:
        q, k, v = (x[b, h].double() for x in qkv)
        each = matrices(k, v, real[b])
        scores = means(q, real[b]) @ means(k, real[b]).T * SCALE + (each.norm(dim=(1, 2)) + 1e-5).log()
        scores[:, [not bool(real[b, block].any()) for block in blocks(tokens)]] = -torch.inf
        chosen = best(scores.softmax(-1), kept(0.2, layout_blocks, 0.5 / BLOCK**2 + DIM / tokens), sink(layout))
        slope = matrices(*(x[b, h].to(to) for x in qkv[1:]), real[b]).sum(0) * SCALE / real[b].sum()
        return summarised(*(x[b, h].to(to) for x in qkv), chosen, real[b], slope)

    assert_equal(got, head, qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_svg_ear(layout: Layout, masked: bool, dtype: torch.dtype) -> None:
    qkv, real = inputs(layout, dtype), padding(layout, masked)
    keys = real if masked else None
    got = SVGEAR(0.3, BLOCK).attend(*qkv, site(layout, key_mask=keys))
    of_q, of_k = (clusters(x, BLOCK, layout, keys).forward for x in qkv[:2])
    halvings = (layout.blocks(BLOCK) - 1).bit_length()
    keep = kept(0.3, layout.blocks(BLOCK), 0.5 / BLOCK + 2 * halvings / layout.tokens)

    def head(b: int, h: int, to: torch.dtype) -> Tensor:
        rows, columns = of_q[b, h], of_k[b, h]
        q, k, v = (x[b, h][order].double() for x, order in zip(qkv, (rows, columns, columns), strict=True))
        queries, there = means(q, real[b, rows]), real[b, columns]
        errors = torch.zeros(len(queries), len(queries), dtype=torch.float64)
        for i, query in enumerate(queries):
            for j, block in enumerate(blocks(len(k))):
                own = block[there[block]]
                centroid = (query @ means(k, there)[j] * SCALE).exp() * means(v, there)[j]
                exponentials = (k[own] @ query * SCALE).exp()
                errors[i, j] = (exponentials[:, None] * v[own] - centroid).square().sum() / max(len(own), 1)
        chosen = best(errors, keep, sink(layout))
        ordered = (x[b, h][order].to(to) for x, order in zip(qkv, (rows, columns, columns), strict=True))
        return summarised(*ordered, chosen, there)[rows.argsort()]

    assert_equal(got, head, qkv)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_clusters_leave_text_alone(layout: Layout) -> None:
    orders, tokens = clusters(torch.randn(2, 3, layout.tokens, 8), BLOCK, layout), torch.arange(layout.tokens)
    assert torch.equal(orders.forward.sort(-1).values, tokens.expand(2, 3, -1))
    assert torch.equal(orders.forward.gather(-1, orders.back), tokens.expand(2, 3, -1))
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[layout.span] = False
    assert torch.equal(orders.forward[..., text], tokens[text].expand(2, 3, -1))


@pytest.mark.parametrize("kinds", [1, 2, 5, 12])
def test_a_cluster_is_a_block(kinds: int) -> None:
    """Tokens of a few kinds, strewn over the video, as many of a kind as a block has room for."""
    layout = Layout(kinds, 2, 4, text_before=BLOCK, text_after=5)
    kind = torch.arange(layout.video).div(BLOCK, rounding_mode="floor")[torch.randperm(layout.video)]
    x = torch.randn(1, 1, layout.tokens, 8)
    x[0, 0, layout.span] = 10 * torch.randn(kinds, 8)[kind] + 0.01 * torch.randn(layout.video, 8)
    place = clusters(x, BLOCK, layout).forward[0, 0, layout.span] - layout.text_before
    assert all(len(block.unique()) == 1 for block in kind[place].split(BLOCK))


def window(layout: Layout, keep: int) -> Tensor:
    """bool [N, N]: the `keep` blocks nearest to each row of blocks, text first."""
    place = torch.arange(layout.blocks(BLOCK))
    seen = best(-(place[:, None] - place).abs() - place / 100, keep, sink(layout))
    return seen.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: layout.tokens, : layout.tokens]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dit_fast(layout: Layout, masked: bool) -> None:
    memory: dict[str, Any] = {}
    strategy, real = DiTFastAttn(0.5, window=0.3, period=3, block=BLOCK), padding(layout, masked)
    allowed, visible = window(layout, max(1, int(0.3 * layout.blocks(BLOCK) + 0.5))), real[:, None, None]
    residual: Any = None
    for step in range(2, 8):
        q, k, v = inputs(layout)
        here = site(layout, step, memory=memory, key_mask=real if masked else None)
        if masked:  # the user's own dense attention knows the mask
            dense = exact.softmax_attention(q, k, v, visible, SCALE)[0]
            here = replace_dense(here, dense)
        got = (strategy.observe if step == 2 else strategy.attend)(q, k, v, here)
        full, inside = (exact.softmax_attention(q, k, v, seen, SCALE)[0] for seen in (visible, visible & allowed))
        if step in (2, 5):
            residual = full - inside
        torch.testing.assert_close(got, full if step in (2, 5) else inside + residual, atol=1e-9, rtol=0)
        assert here.record.kind == ("dense" if step in (2, 5) else "sparse")
    assert memory["residual"].shape == q.shape


def replace_dense(here: Site, out: Tensor) -> Site:
    return replace(here, dense_backend=here.dense_backend._replace(attend=lambda q, k, v: out))


def test_dit_fast_meets_its_sparsity() -> None:
    """Over a period; half of the work goes to the full step."""
    for sparsity in (0.0, 0.3, 0.5, 0.8, 0.9):
        strategy = DiTFastAttn(sparsity, block=64)
        steps = strategy.expected(Outline(steps=4 * strategy.every, first=0, end=4 * strategy.every))
        work = sum(step.density + step.beside for step in steps)  # type: ignore[operator]
        if sparsity:
            assert work / len(steps) == pytest.approx(1 - sparsity)
            assert sum(step.kind == "tail" for step in steps) == 4


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("rival", [SolAttn, PISA, SVGEAR], ids=lambda rival: rival.__name__)
def test_all_work_is_within_the_sparsity(rival: type[Any], sparsity: float) -> None:
    """Blocks, summaries and routing; as expected before the run."""
    layout = Layout(4, 16, 32)
    qkv, strategy, here = inputs(layout), rival(sparsity, 16), site(layout)
    strategy.attend(*qkv, here)
    assert here.record.work == pytest.approx(1 - sparsity, abs=0.006)
    (step,) = strategy.expected(Outline(1, 0, 1, layout, head_dim=DIM))
    assert step.work == pytest.approx(here.record.work, abs=1e-3)
    assert step.density == pytest.approx(float(here.record.density), abs=1e-3)


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.__name__)
def test_nothing_dropped_is_dense(rival: type[Any]) -> None:
    layout, memory = LAYOUTS[2], {}
    strategy = rival(0.0, block=BLOCK)
    for step in range(4):
        q, k, v = inputs(layout)
        got = in_order(strategy, strategy.attend, (q, k, v), site(layout, step, memory=memory))
        want, _ = exact.softmax_attention(q, k, v, torch.ones(1, dtype=torch.bool), SCALE)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.__name__)
@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "flux", "sd3"])
def test_on_pipelines(name: str, rival: type[Any]) -> None:
    pipe, call = BUILDERS[name]()
    before = run(pipe, call)
    with diffsparse.apply(pipe, rival(0.5, block=4), schedule=Schedule(dense_first=1)) as handle:
        out = run(pipe, call)
    assert out.isfinite().all()
    sparse = handle.report().sparse_calls > 0
    assert sparse or rival is PISA, "its matrices may cost more than attention over a few tokens"
    assert torch.equal(out, before) == (not sparse)
    assert torch.equal(run(pipe, call), before)


def test_names_and_knobs() -> None:
    listed = parse("sol,pisa,svg-ear,dit-fast", sparsity=0.7, block=32, order="auto")
    assert listed == [rival(0.7, block=32, order="auto") for rival in RIVALS]
    assert [name_of(rival) for rival in listed] == ["sol", "pisa", "svg-ear", "dit-fast"]
    assert set(RIVALS) <= set(STRATEGIES.values())
    for rival in listed:
        with pytest.raises(ConfigError, match="not compensated yet"):
            Compensated(rival)
    assert not {rival.__name__ for rival in RIVALS} & set(dir(diffsparse)), "for comparison only"
    wrong: list[tuple[type[Strategy], dict[str, Any]]] = [
        *((rival, knobs) for rival in RIVALS for knobs in ({"sparsity": 1.0}, {"block": 0}, {"order": "spiral"})),
        (SolAttn, {"tau": "1"}),
        (SolAttn, {"tau": float("nan")}),
        (DiTFastAttn, {"window": 0}),
        (DiTFastAttn, {"period": 0}),
    ]
    for rival, knobs in wrong:
        with pytest.raises(ConfigError, match="wants"):
            rival(**knobs)
