"""Sparse products in eight bits: what is rounded, what is not, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import GNA, AdaSpa, Compensated, Digest, Layout, Random, Rounded, Schedule, Tangent
from diffsparse.errors import ConfigError, UnknownNameError
from diffsparse.strategies import name_of, parse
from diffsparse_kernels import PRECISIONS, BlockLists, block_sparse_attention
from support.sites import site
from support.strategies import every
from support.tiny_pipelines import BUILDERS, run

LAYOUT = Layout(4, 4, 4, text_after=8)
BLOCK = 8


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 2.0)


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, 3, LAYOUT.tokens, 16) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_products_are_the_kernels(precision: str) -> None:
    q, k, v = qkv()
    strategy, here = Rounded(Random(0.5, block=BLOCK), precision), site(LAYOUT)
    out = strategy.attend(q, k, v, here)
    lists = here.memory["lists"]
    assert isinstance(lists, BlockLists)
    assert torch.equal(out, block_sparse_attention(q, k, v, lists, precision=precision)[0])
    assert not torch.equal(out, block_sparse_attention(q, k, v, lists)[0])
    assert here.record.backend == f"{precision} emulated"


@pytest.mark.parametrize("by", ["means", "first-order", "tail"])
@pytest.mark.parametrize("outside", [False, True])
def test_it_goes_with_compensation(by: Any, outside: bool) -> None:
    """Whichever wraps the other; what summaries hold is not rounded."""
    q, k, v = qkv()
    inner = Random(0.5, block=BLOCK)
    strategy = Rounded(Compensated(inner, by)) if outside else Compensated(Rounded(inner), by)
    here = site(LAYOUT)
    outs = [strategy.attend(q, k, v, here) for _ in range(2)]
    lists = here.memory["lists"]
    if by == "tail":
        torch.testing.assert_close(outs[1], here.dense_backend.attend(q, k, v), atol=2e-2, rtol=0)
        assert not torch.equal(*outs)
        return
    assert torch.equal(outs[1], block_sparse_attention(q, k, v, lists, precision="int8", summary=by)[0])


@pytest.mark.parametrize("name", [name for name in every(LAYOUT, 0.5) if "tail" not in name])
def test_every_strategy_is_near_what_it_was(name: str) -> None:
    """And is not the same: all of them reach a product that is rounded."""
    q, k, v = qkv()
    outs = []
    for strategy in (every(LAYOUT, 0.5)[name], Rounded(every(LAYOUT, 0.5)[name])):
        here = site(LAYOUT, step=3)
        method = strategy.observe if strategy.observes else strategy.attend
        method(q, k, v, here)
        outs.append(strategy.attend(q, k, v, here))
    error = (outs[0] - outs[1]).norm() / outs[0].norm()
    assert 0 < error < 0.05


def test_what_a_digest_keeps_is_of_the_rounded_product() -> None:
    q, k, v = qkv()
    kept = []
    for strategy in (Digest(0.5, BLOCK), Rounded(Digest(0.5, BLOCK), "fp8")):
        here = site(LAYOUT, step=1)
        strategy.observe(q, k, v, here)
        kept.append(here.memory["kept"].residual.codes)
    assert not torch.equal(*kept)


def test_windows_that_cut_through_tiles_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ConfigError, match="'int8' can't hide single keys, as windows do that cut through tiles; give"):
        Rounded(GNA((3, 3, 3), (1, 1, 1), block=BLOCK)).attend(q, k, v, site(LAYOUT))


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "flux"])
def test_a_run_says_so_and_is_undone(name: str) -> None:
    """Guidance branches, padded text, images."""
    pipe, call = BUILDERS[name]()
    before, frames = run(pipe, call), {}
    for strategy in (Tangent(0.5, 8), Rounded(Tangent(0.5, 8))):
        with diffsparse.apply(pipe, strategy, schedule=Schedule(1)) as handle:
            frames[strategy] = run(pipe, call)
        report = handle.report()
    assert report.backends["int8 emulated"] == report.sparse_calls > 0
    assert "precision='int8'" in report.strategy
    plain, rounded = frames.values()
    assert 0 < (plain - rounded).abs().max() < 0.02
    assert torch.equal(run(pipe, call), before)


def test_its_name_is_read_and_written() -> None:
    (made,) = parse("tangent+int8", sparsity=0.6)
    assert made == Rounded(Tangent(0.6), "int8")
    assert name_of(made) == "tangent+int8"
    (made,) = parse("adaspa+means+int8-fp8")
    assert made == Rounded(Compensated(AdaSpa(), "means"), "int8-fp8")
    (made,) = parse("adaspa+fp8+tail")
    assert made == Compensated(Rounded(AdaSpa(), "fp8"), "tail")
    assert made.sparsity == AdaSpa().sparsity


def test_bad_ones_are_told() -> None:
    with pytest.raises(ConfigError, match="precision wants one of int8, int8-int8, int8-fp8, fp8; got 'int4'"):
        Rounded(AdaSpa(), "int4")
    for wrong in (AdaSpa, Rounded(AdaSpa())):
        with pytest.raises(ConfigError, match="wanted a strategy that is not rounded yet"):
            Rounded(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"after a plus wanted one of means, .*, int8, .*fp8; got 'int4'"):
        parse("adaspa+int4")
    with pytest.raises(UnknownNameError, match="no strategy is called"):
        parse("nothing+int8")
