"""AdaSpa against a brute-force float64 version of the algorithm, written from the paper, one head at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffsparse
from diffsparse import AdaSpa, Layout, Schedule
from diffsparse.errors import ConfigError
from diffsparse.site.compute import DenseBackend, Site
from diffsparse.site.record import CallRecord
from diffsparse_kernels import BlockLists
from support.tiny_pipelines import BUILDERS, run

# --- the paper, literally ---------------------------------------------------------------------------------------


def weights(q, k, scale, key_mask):
    """Scores [N, N] of one head; masked keys get -inf."""
    scores = (q.double() @ k.double().T) * (scale or q.shape[-1] ** -0.5)
    return scores if key_mask is None else scores.masked_fill(~key_mask[None, :], -math.inf)


def sides(block):
    """Queries and keys of a block."""
    return block if isinstance(block, tuple) else (block, block)


def block_sums(weight, block):
    """W_sum[p, q]: sum over each tile (the last ones may be ragged)."""
    rows, columns = sides(block)
    out = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns), dtype=torch.float64)
    for p in range(out.shape[0]):
        for q in range(out.shape[1]):
            out[p, q] = weight[p * rows : (p + 1) * rows, q * columns : (q + 1) * columns].sum()
    return out


def best_rows(mass, keep, sink):
    """Row-wise: the blocks of each query row with the most mass, text blocks first."""
    mask = torch.zeros(mass.shape, dtype=torch.bool)
    for p in range(mass.shape[0]):
        order = sorted(range(mass.shape[1]), key=lambda j: (not sink[p][j], -float(mass[p, j]), j))
        forced = sum(sink[p])
        for j in order[: max(keep, forced)]:
            mask[p, j] = True
    return mask


def text_sink(layout, block):
    video = range(layout.text_before, layout.text_before + layout.video)

    def text(side):
        starts = range(0, layout.tokens, side)
        return [any(t not in video for t in range(a, min(a + side, layout.tokens))) for a in starts]

    return [[row or column for column in text(sides(block)[1])] for row in text(sides(block)[0])]


def keep_of(sparsity, n):
    """To the nearest, halves up, of the decimal that was written."""
    kept = (1 - Fraction(str(sparsity))) * n
    return max(1, int(kept + Fraction(1, 2)))


def head_masks(masses, knobs, layout):
    """Section 4.3: recall at uniform sparsity decides each head's own."""
    s, heads, sink = knobs.sparsity, len(masses), text_sink(layout, knobs.block)
    always = min(sum(row) for row in sink)  # columns of text: sparsity is of the others
    n = max(masses[0].shape[1] - always, 1)
    masks = [best_rows(mass, always + keep_of(s, n), sink) for mass in masses]
    if not knobs.head_adaptive:
        return masks
    recall = [float((m * mask).sum() / m.sum()) for m, mask in zip(masses, masks, strict=True)]
    high = min(sum(r > knobs.recall_threshold for r in recall), heads // 2)
    order = sorted(range(heads), key=lambda h: -recall[h])
    s = Fraction(str(s))
    sparsities = [s] * heads
    up = (1 + s) / 2 if s >= Fraction(1, 3) else 2 * s
    up = max(s, min(up, 1 - Fraction(1, n)))  # a block is left
    for h, other in zip(order[:high], order[heads - high :], strict=True):
        sparsities[h], sparsities[other] = up, 2 * s - up
    return [best_rows(m, always + keep_of(x, n), sink) for m, x in zip(masses, sparsities, strict=True)]


def by_token(mask, block, n):
    """[nQ, nK] -> [n, n]."""
    rows, columns = sides(block)
    return mask.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :n]


def masked_attention(q, k, v, scale, key_mask, mask, block):
    scores = weights(q, k, scale, key_mask)
    return scores.masked_fill(~by_token(mask, block, len(q)), -math.inf).softmax(-1).nan_to_num(0.0) @ v.double()


@dataclass
class Oracle:
    """One sample of one layer and branch, step by step."""

    knobs: AdaSpa
    layout: Layout
    lse: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)

    def step(self, q, k, v, scale, key_mask, search: str | None):
        """q, k, v [H, N, D] -> out [H, N, D]; search: None, "first" (dense) or "cached"."""
        heads = range(q.shape[0])
        scores = [weights(q[h], k[h], scale, key_mask) for h in heads]
        if search == "first":
            self.lse = [s.logsumexp(-1) for s in scores]
        if search:
            masses = [
                block_sums((s - lse[:, None]).exp(), self.knobs.block) for s, lse in zip(scores, self.lse, strict=True)
            ]
            self.masks = head_masks(masses, self.knobs, self.layout)
        block = self.knobs.block
        masks = [torch.ones_like(m) for m in self.masks] if search == "first" else self.masks
        return torch.stack([masked_attention(q[h], k[h], v[h], scale, key_mask, masks[h], block) for h in heads])


# --- our strategy under test ------------------------------------------------------------------------------------


def make_site(layout, memory, step, steps, key_mask=None, scale=None):
    def sdpa(q, k, v):
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    record = CallRecord("blocks.0.attn1", step, "cond")
    return Site(
        model="transformer", layer="blocks.0.attn1", index=0, step=step, steps=steps, branch="cond", layout=layout,
        memory=memory, dense_backend=DenseBackend("native", sdpa), record=record, scale=scale, key_mask=key_mask,
    )  # fmt: skip


def eager_error(q, k, v, scale, key_mask, masks, block):
    """Error of plain float32 masked attention against float64: what the hardware's precision costs."""
    worst = 0.0
    for h in range(q.shape[0]):
        tokens = by_token(masks[h], block, q.shape[-2])
        tokens = tokens if key_mask is None else tokens & key_mask[None, :]
        plain = torch.nn.functional.scaled_dot_product_attention(
            q[h][None].float(), k[h][None].float(), v[h][None].float(), attn_mask=tokens[None], scale=scale
        )[0].nan_to_num(0.0)
        exact = masked_attention(q[h], k[h], v[h], scale, key_mask, masks[h], block)
        worst = max(worst, float((plain - exact).abs().max()))
    return worst


def tolerance(q, k, v, scale, key_mask, masks, block):
    rounding = torch.finfo(torch.float32).eps * float(v.abs().max())
    return 2 * (eager_error(q, k, v, scale, key_mask, masks, block) + rounding)


@pytest.fixture(autouse=True)
def _always_sparse(monkeypatch):
    """These tests are about what is computed, not about when dense would be faster."""
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 9.0)


LAYOUTS = {
    "video": Layout(3, 4, 6),
    "prefix": Layout(3, 4, 5, text_before=7),
    "suffix": Layout(3, 4, 5, text_after=9),
    "both-ragged": Layout(2, 5, 7, text_before=3, text_after=5),
}
LARGE = Layout(5, 9, 11, text_before=13, text_after=7)


KNOBS = [
    AdaSpa(0.5, block=8),
    AdaSpa(0.75, (4, 7), 4),
    AdaSpa(0.6, block=8, head_adaptive=False),
    AdaSpa(0.2, block=4, recall_threshold=0.3),
    AdaSpa(0.6, block=(8, 4)),
    AdaSpa(0.6, block=(4, 12)),
]
CASES = [(layout, knobs) for layout in LAYOUTS.values() for knobs in KNOBS]
CASES += [(LARGE, AdaSpa(0.6, block=block)) for block in ((128, 64), (64, 128), (32, 64))]


def test_lists_shrink_when_a_device_has_told_their_longest():
    """As wide as the keys have blocks until then, for nothing waits for the number; the blocks stay the same."""
    layout, memory, knobs = LAYOUTS["video"], {}, AdaSpa(0.5, (), 8, head_adaptive=False)
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16)
    knobs.observe(q, k, v, make_site(layout, memory, 0, 9))
    found, tokens = memory["lists"], layout.tokens
    sizes = {"q_block": 8, "kv_block": 8, "q_len": tokens, "kv_len": tokens}
    memory["lists"] = BlockLists.from_mask(found.to_mask(), **sizes, width=9)
    told = iter([None, 5.0, 5.0])
    memory["longest"] = SimpleNamespace(value=lambda: next(told))
    widths = []
    for step in (1, 2, 3):
        knobs.attend(q, k, v, make_site(layout, memory, step, 9))
        widths.append(memory["lists"].idx.shape[-1])
        assert torch.equal(memory["lists"].to_mask(), found.to_mask())
    assert widths == [9, 5, 5]


@pytest.mark.parametrize(("layout", "knobs"), CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_equals_the_paper_on_random_inputs(layout, knobs):
    steps, first, batch, heads, dim = 12, 2, 2, 5, 16
    later = knobs.search_steps(steps)
    key_mask = torch.ones(batch, layout.tokens, dtype=torch.bool)
    if layout.text_after:
        key_mask[1, -4:] = False
    memory: dict[str, Any] = {}
    oracles = [Oracle(knobs, layout) for _ in range(batch)]
    base = [torch.randn(batch, heads, layout.tokens, dim) for _ in range(3)]
    for step in range(first, steps):
        q, k, v = (x + 0.3 * torch.randn_like(x) for x in base)
        q = q * torch.linspace(0.3, 5, heads)[:, None, None]  # flat heads and sharp ones
        search = "first" if step == first else "cached" if step in later else None
        site = make_site(layout, memory, step, steps, key_mask)
        out = (knobs.observe if step == first else knobs.attend)(q, k, v, site)
        blocks = memory["lists"].to_mask()
        for b, oracle in enumerate(oracles):
            expected = oracle.step(q[b], k[b], v[b], None, key_mask[b], search)
            for h in range(heads):
                assert torch.equal(blocks[b, h], oracle.masks[h]), f"step {step}, sample {b}, head {h}"
            shown = [torch.ones_like(m) for m in oracle.masks] if search == "first" else oracle.masks
            limit = tolerance(q[b], k[b], v[b], None, key_mask[b], shown, knobs.block)
            assert float((out[b] - expected).abs().max()) <= limit


class Recorder:
    """AdaSpa, with everything that it was given and gave."""

    def __init__(self, inner: AdaSpa) -> None:
        self.inner, self.calls = inner, defaultdict(list)

    def _log(self, q, k, v, site, search, out):
        mask = site.key_mask
        entry = (q.clone(), k.clone(), v.clone(), site.scale, mask, search, out.clone(), site.layout)
        self.calls[site.layer, site.branch].append(entry)
        return out

    def observe(self, q, k, v, site):
        return self._log(q, k, v, site, "first", self.inner.observe(q, k, v, site))

    def attend(self, q, k, v, site):
        first = "lists" not in site.memory
        due = site.step in self.inner.search_steps(site.steps)
        out = self.inner.attend(q, k, v, site)
        return self._log(q, k, v, site, "first" if first else "cached" if due else None, out)


@pytest.mark.parametrize("name", ["wan", "wan22", "cogvideox", "hunyuan_video", "flux", "sd3", "qwen_image"])
def test_equals_the_paper_inside_pipelines(name):
    """Sequential and batched CFG, text before, after and absent, two experts: recorded, then computed again."""
    pipe, kwargs = BUILDERS[name]()
    knobs = AdaSpa(0.5, searches=(4,), block=4)
    recorder = Recorder(knobs)
    with diffsparse.apply(pipe, recorder, schedule=Schedule(dense_first=2)) as handle:
        run(pipe, kwargs, num_inference_steps=6)
    report = handle.report()
    assert report.sparse_calls > 0
    assert not report.fallbacks
    assert recorder.calls
    for calls in recorder.calls.values():
        for b in range(calls[0][0].shape[0]):
            oracle = Oracle(knobs, calls[0][-1])
            for q, k, v, scale, mask, search, out, _ in calls:
                key_mask = None if mask is None else mask.expand(q.shape[0], -1)[b]
                expected = oracle.step(q[b], k[b], v[b], scale, key_mask, search)
                shown = [torch.ones_like(m) for m in oracle.masks] if search == "first" else oracle.masks
                limit = tolerance(q[b], k[b], v[b], scale, key_mask, shown, knobs.block)
                valid = slice(None) if key_mask is None else key_mask
                assert float((out[b] - expected)[:, valid].abs().max()) <= limit


def test_batch_rows_do_not_see_each_other():
    """A sample's blocks and output are the same whatever else is in the batch."""
    layout, knobs = Layout(2, 4, 4), AdaSpa(0.5, block=4)
    q, k, v = (torch.randn(3, 4, layout.tokens, 8) for _ in range(3))
    together: dict[str, Any] = {}
    knobs.observe(q, k, v, make_site(layout, together, 0, 20))
    for b in range(3):
        alone: dict[str, Any] = {}
        knobs.observe(q[b : b + 1], k[b : b + 1], v[b : b + 1], make_site(layout, alone, 0, 20))
        assert torch.equal(together["lists"].to_mask()[b], alone["lists"].to_mask()[0])


def test_search_steps():
    assert AdaSpa().search_steps(50) == {29: False}  # the paper's step 30, counted from 1
    assert AdaSpa(searches=(0.2, 0.6, 0.8)).search_steps(50) == {9: False, 29: False, 39: False}
    assert AdaSpa().search_steps(8) == {}
    assert AdaSpa(searches=(5,)).search_steps(8) == {5: False}
    assert AdaSpa().search_steps(None) == {}


SHARES = st.floats(0, 0.99) | st.integers(0, 99).map(lambda percent: percent / 100)


@settings(max_examples=200, deadline=None)
@given(s=SHARES, heads=st.integers(1, 9), n=st.integers(1, 80), seed=st.integers(0, 99))
def test_head_adaptive_keeps_the_mean_density(s, heads, n, seed):
    """At every sparsity: what raised heads drop more, others drop less. Rounding is all that the mean may be off by."""
    recall = torch.rand(2, heads, generator=torch.Generator().manual_seed(seed))
    keep = AdaSpa(s)._keep_by_head(recall, n).double()
    assert (keep.mean(-1) - max(1.0, (1 - s) * n)).abs().max() <= 0.5 + 1e-9
    assert keep.min() >= 1
    assert keep.max() <= n


@pytest.mark.parametrize(
    ("s", "keeps"), [(0.0, {10}), (0.2, {6, 8, 10}), (0.4, {3, 6, 9}), (0.8, {1, 2, 3}), (0.95, {1})]
)
def test_heads_are_raised_as_far_as_others_can_be_lowered(s, keeps):
    recall = torch.tensor([[0.95, 0.9, 0.5, 0.4, 0.3]])
    assert set(AdaSpa(s)._keep_by_head(recall, 10).flatten().tolist()) == keeps


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity wants a number in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity wants"),
        ({"sparsity": math.nan}, "sparsity wants"),
        ({"block": 0}, "block wants a number of tokens from 1"),
        ({"block": (64,)}, "block wants a number of tokens from 1"),
        ({"block": (64, 0)}, "block wants a number of tokens from 1"),
        ({"block": (True, 1)}, "block wants a number of tokens from 1"),
        ({"block": (64, 8192)}, r"from 1 to 4096, .* got \(64, 8192\)"),
        ({"block": [64, 32]}, "block wants a number of tokens from 1"),
        ({"block": (64, 48)}, r"of which one divides the other, such as \(128, 64\), .* got \(64, 48\)"),
        ({"recall_threshold": 1.5}, r"recall_threshold wants a number in \[0, 1\]"),
        ({"recall_threshold": math.nan}, r"recall_threshold wants a number in \[0, 1\]"),
        ({"searches": (1.5,)}, "searches wants a whole number of steps such as 3, or a fraction"),
        ({"searches": (-1,)}, "searches wants a whole number of steps such as 3, or a fraction"),
        ({"searches": (math.nan,)}, "searches wants a whole number of steps such as 3, or a fraction"),
        ({"searches": ("late",)}, "searches wants a number of steps"),
        ({"searches": 0.5}, "searches wants a tuple"),
    ],
)
def test_bad_knobs_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        AdaSpa(**knobs)
