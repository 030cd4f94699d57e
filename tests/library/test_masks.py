"""Masks over any token, in any order of the tokens, sample by sample; and what a mask is taken for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsparse import Layout
from diffsparse.order import in_order
from support import exact
from support.sites import site
from support.strategies import HEADS, NAMES, every

DIM = 16
edges, texts = st.integers(1, 5), st.integers(0, 11)


def run(strategy: Any, qkv: tuple[Tensor, ...], layout: Layout, keys: Tensor, steps: int = 4) -> list[Tensor]:
    """Outputs of a few steps, as a run calls a strategy: the first dense, with a search if there is one."""
    memory: dict[str, Any] = {}
    outs = []
    for step in range(steps):
        masked = partial(F.scaled_dot_product_attention, attn_mask=keys[:, None, None])
        here = replace(site(layout, step, steps, memory, key_mask=keys), _dense=masked)
        method = getattr(strategy, "observe", None) if step == 0 else None
        outs.append(in_order(strategy, method or strategy.attend, qkv, here))
    return outs


@pytest.mark.parametrize("limit", [1.0, 0.0], ids=["sparse", "dense above the break-even"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_dropped_is_dense(name: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: whatever the order of the tokens and the mask over them, each sample's outputs are dense attention's."""
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: limit)

    @settings(deadline=None, max_examples=8, derandomize=True)
    @given(edges, edges, edges, texts, texts, st.integers(0, 2**16), st.sampled_from((0.3, 0.8, 1.1)))
    def holds(f: int, h: int, w: int, before: int, after: int, seed: int, share: float) -> None:
        layout, lot = Layout(f, h, w, before, after), torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, 2, HEADS, layout.tokens, DIM, generator=lot)
        keys = torch.rand(2, layout.tokens, generator=lot) < share
        keys[:, seed % layout.tokens] = True
        want, _ = exact.softmax_attention(q, k, v, keys[:, None, None], DIM**-0.5)
        bound = 2 * exact.tolerance(want, exact.eager(q, k, v, keys[:, None, None], DIM**-0.5))
        for step, out in enumerate(run(every(layout, 0.0)[name], (q, k, v), layout, keys)):
            error = (out.double() - want).abs().max().item()
            assert error <= bound, f"step {step}"

    holds()
