"""Compensation of dropped blocks, against dense float64 constructions of its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import GNA, AdaSpa, Compensated, Dense, Layout, Random, Schedule
from diffsparse.errors import ConfigError
from diffsparse.site.compute import Blocks
from diffsparse.strategies import name_of, parse
from diffsparse_kernels import BlockLists, block_sparse_attention, summarise, summary_error
from support import exact
from support.sites import site
from support.tiny_pipelines import BUILDERS, run

LAYOUTS = {
    "absent": Layout(3, 4, 5),
    "before": Layout(3, 4, 5, text_before=7),
    "after": Layout(3, 4, 5, text_after=5),
}
BLOCK, SCALE = 8, 16**-0.5


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 2.0)


def qkv(layout: Layout, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, 2, layout.tokens, 16) for _ in range(3))
    return q, k, v


def kept(strategy: Random, layout: Layout, keys: Tensor | None) -> Tensor:
    """bool [B, H, N, N] of a random strategy: found by attending with values that say which key they are."""
    q, k, _ = qkv(layout)
    ones = torch.eye(layout.tokens).expand(2, 2, -1, -1)
    return strategy.attend(torch.zeros_like(q), torch.zeros_like(k), ones, site(layout, key_mask=keys)) > 0


def padded(layout: Layout) -> Tensor | None:
    if not layout.text_after:
        return None
    keys = torch.ones(2, layout.tokens, dtype=torch.bool)
    keys[0, -2:] = False
    return keys


@pytest.mark.parametrize("place", LAYOUTS)
def test_means_equal_the_formula(place: str) -> None:
    layout, keys = LAYOUTS[place], padded(LAYOUTS[place])
    q, k, v = qkv(layout)
    strategy = Random(0.6, block=BLOCK)
    seen = kept(strategy, layout, keys)
    out = Compensated(strategy).attend(q, k, v, site(layout, key_mask=keys))
    want, low = (_with_means(*(x.to(dtype) for x in (q, k, v)), seen, keys) for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(out.double(), want, atol=exact.tolerance(want, low), rtol=0)


def _with_means(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, keys: Tensor | None) -> Tensor:
    """Each token of a dropped block counts at the mean of its block."""
    real = torch.ones(2, k.shape[2], dtype=torch.bool) if keys is None else keys
    block = torch.arange(k.shape[2]) // BLOCK
    means_k, means_v = k.clone(), v.clone()
    for sample in range(2):
        for number in block.unique():
            inside = (block == number) & real[sample]
            means_k[sample][:, inside] = k[sample][:, inside].mean(1, keepdim=True)
            means_v[sample][:, inside] = v[sample][:, inside].mean(1, keepdim=True)
    scores = torch.where(seen, q @ k.mT, q @ means_k.mT) * SCALE
    weights = scores.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
    return (weights * seen) @ v + (weights * ~seen) @ means_v


@pytest.mark.parametrize("place", LAYOUTS)
def test_first_order_is_the_kernel_s(place: str) -> None:
    """Of the same blocks; its formula is tested there. A block more or less would show."""
    layout, keys = LAYOUTS[place], padded(LAYOUTS[place])
    q, k, v = qkv(layout)
    strategy = Random(0.6, block=BLOCK)
    mask = exact.tile_sums(kept(strategy, layout, None).double(), BLOCK, BLOCK) > 0
    lists = BlockLists.from_mask(mask, q_block=BLOCK, kv_block=BLOCK, q_len=layout.tokens, kv_len=layout.tokens)
    here = site(layout, key_mask=keys)
    out = Compensated(strategy, "first-order").attend(q, k, v, here)
    want = block_sparse_attention(q, k, v, lists, scale=here.scale, key_mask=keys, summary="first-order")[0]
    torch.testing.assert_close(out, want)
    computed = float(here.record.density)
    share = (computed - 16 * (1 / layout.tokens + 1 / (2 * BLOCK * BLOCK)) - 1 / BLOCK) / (1 - 1 / BLOCK)
    assert share == pytest.approx(float(here.density(Blocks(lists), q)), abs=1e-6)


def test_a_strategy_may_choose_by_the_error_of_summaries_and_hand_them_on() -> None:
    """They stand as if made by the product, are masked and scaled as the call is, and all of it is counted."""
    layout = LAYOUTS["after"]
    keys = padded(layout)
    (q, k, v), here = qkv(layout), site(layout, key_mask=keys, scale=0.7)
    made = here.summarise(k, v, BLOCK)
    error = here.summary_error(q, made, (2 * BLOCK, BLOCK))
    want = summary_error(q, summarise(k, v, BLOCK, scale=0.7, key_mask=keys), q_block=2 * BLOCK, scale=0.7)
    torch.testing.assert_close(error, want)
    assert here.record.beside == 0.5 / BLOCK
    edges = {"q_block": 2 * BLOCK, "kv_block": BLOCK, "q_len": layout.tokens, "kv_len": layout.tokens}
    lists = BlockLists.from_mask(error > error.median(), **edges)
    by_name, handed = (here.sparse(q, k, v, Blocks(lists, summary=s)) for s in ("first-order", made))
    torch.testing.assert_close(handed, by_name)
    first = 16 * (1 / layout.tokens + 1 / (2 * 2 * BLOCK * BLOCK))
    share = lists.density().item()
    assert float(here.record.density) == pytest.approx(share + (1 - share) / BLOCK + first)


@pytest.mark.parametrize("place", LAYOUTS)
def test_tails_equal_the_formula(place: str) -> None:
    """The search step is dense; later the tail joins with the weight and the output that it had then."""
    layout, keys = LAYOUTS[place], padded(LAYOUTS[place])
    first, later = qkv(layout), qkv(layout)
    strategy, memory = Random(0.6, block=BLOCK), {}
    seen = kept(strategy, layout, keys)
    real = torch.ones(2, layout.tokens, dtype=torch.bool) if keys is None else keys
    tailed = Compensated(strategy, "tail")
    here: dict[str, Any] = {"key_mask": keys, "memory": memory}
    at = site(layout, 2, **here)
    dense = tailed.attend(*first, at)
    assert (at.record.kind, at.record.density) == ("search", 1.0), "it ran dense, and says so"
    want, _ = exact.softmax_attention(*first, real[:, None, None], SCALE)
    torch.testing.assert_close(dense.double(), want, atol=1e-5, rtol=0)
    out = tailed.attend(*later, site(layout, 3, **here))
    rest, rest_lse = exact.softmax_attention(*first, ~seen & real[:, None, None], SCALE)
    now, lse = exact.softmax_attention(*later, seen & real[:, None, None], SCALE)
    share = torch.sigmoid(lse - rest_lse)[..., None]
    want, low = (share * now + (1 - share) * x.double() for x in (rest, rest.bfloat16()))  # tails are kept in bfloat16
    torch.testing.assert_close(out.double(), want, atol=exact.tolerance(want, low.float()), rtol=0)
    assert memory["tail"].nbytes == 2 * 2 * layout.tokens * (16 * 2 + 4)


@pytest.mark.parametrize("by", ["means", "first-order", "tail"])
def test_nothing_dropped_is_dense(by: Any) -> None:
    layout, memory = Layout(3, 4, 5), {}
    q, k, v = qkv(layout)
    strategy = Compensated(Random(0.0, block=BLOCK), by)
    want, _ = exact.softmax_attention(q, k, v, torch.ones(1, dtype=torch.bool), SCALE)
    for step in range(3):
        out = strategy.attend(q, k, v, site(layout, step, memory=memory))
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("by", ["means", "first-order", "tail"])
@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "ltx", "flux", "sd3"])
def test_on_pipelines(name: str, by: Any) -> None:
    """With all but one block dropped it stays finite; dense in the end, it is undone exactly."""
    pipe, call = BUILDERS[name]()
    before = run(pipe, call)
    strategy = Compensated(AdaSpa(0.9, block=8, searches=()), by)
    with diffsparse.apply(pipe, strategy, schedule=Schedule(dense_first=1)) as handle:
        out = run(pipe, call)
    assert torch.isfinite(out).all()
    least = 2 if by == "first-order" else 1  # in blocks of 8 it costs more than it saves
    assert handle.report().sparse_density < least
    assert torch.equal(run(pipe, call), before)


def test_a_tail_over_budget_is_refused_before_it_is_made() -> None:
    layout = Layout(3, 4, 5)
    with pytest.raises(ConfigError, match=r"want .* GiB .* budget is 1e-09 GiB"):
        Compensated(Random(0.5, block=BLOCK), "tail", budget=1e-9).attend(*qkv(layout), site(layout))


def test_names_and_knobs() -> None:
    one, two = parse("adaspa+means, random+tail", sparsity=0.7)
    assert (one, two) == (Compensated(AdaSpa(0.7)), Compensated(Random(0.7), "tail"))
    assert (name_of(one), one.sparsity, one.order) == ("adaspa+means", 0.7, "FHW")
    assert parse("adaspa+first-order", sparsity=0.7) == [Compensated(AdaSpa(0.7), "first-order")]
    assert Compensated(GNA((2, 2, 2))).sparsity is Compensated(Dense()).sparsity is None
    for wrong in ("adaspa+mean", "adaspa+means+tail", "digest+means", "tangent+first-order"):
        with pytest.raises(ConfigError):
            parse(wrong)
    with pytest.raises(ConfigError, match=r"not compensated yet; got Compensated\(.*\. Leave Compensated out"):
        Compensated(one)
    with pytest.raises(ConfigError, match=r"\+tail wants .*; got adaspa\+means, which does\. Leave out \+tail"):
        parse("adaspa+means+tail")
    with pytest.raises(ConfigError, match="budget"):
        Compensated(Dense(), budget=0)
