"""Digest against its own recipe, written out block by block in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse
import diffsparse_kernels as kernels
from diffsparse import Digest, Layout, Schedule
from diffsparse.errors import ConfigError
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
    strategy, here = Digest(0.7, block=BLOCK), site(layout)
    dense = strategy.observe(q, k, v, here)
    want, _ = exact.softmax_attention(q, k, v, torch.ones(1, dtype=torch.bool), 16**-0.5)
    torch.testing.assert_close(dense.double(), want, atol=1e-5, rtol=0)
    mask, lack = here.memory["lists"].to_mask(), torch.tensor(lacking(q, k))
    sink = layout.text_sink(BLOCK)
    free = torch.ones_like(mask) if sink is None else ~sink.expand_as(mask)
    best = lack == lack.amax(-1, keepdim=True)
    assert mask[~free].all()
    assert mask[best].all(), "every row keeps its best"
    for sample in range(2):  # one threshold for the layer, but for the width of a bin
        kept, dropped = lack[sample][mask[sample] & free[sample] & ~best[sample]], lack[sample][~mask[sample]]
        if len(kept):
            assert kept.min() >= dropped.max() * (1 - 2 ** (40 / 4095) + 1)
    assert (mask & free).sum() >= 0.3 * free.sum() - 2 * mask.shape[2]


def test_nothing_dropped_is_dense_and_the_rest_is_compensated() -> None:
    layout = LAYOUTS[0]
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    errors = []
    for sparsity in (0.0, 0.5, 0.9):
        here = site(layout)
        strategy = Digest(sparsity, block=BLOCK)
        want = strategy.observe(q, k, v, here)
        errors.append((strategy.attend(q, k, v, here) - want).norm().item())
        lists = here.memory["lists"]
        plain, _ = kernels.block_sparse_attention(q, k, v, lists)
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
    for wrong in ({"sparsity": 1.0}, {"block": 0}, {"order": "spiral"}, {"searches": [0.6]}, {"searches": (1.5,)}):
        with pytest.raises(ConfigError):
            Digest(**wrong)
