"""Real attention for figures: calls of the embedded model, and what strategies choose of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import diffsparse
import diffsparse_kernels as kernels
from diffsparse import Dense, Recorder, Schedule, Strategy
from diffsparse.insight.recording import DTYPE, RecordedCall
from diffsparse.insight.replay import Pair, pairs, site_of, tensors_of
from diffsparse.orders.layout import Layout
from diffsparse.site.compute import Blocks, Site, multiply
from diffsparse.site.place import Place
from diffsparse.strategies.base import in_order
from diffsparse_pipelines import tiny

BLOCK = 64
_STEPS, _LOOKED = 6, 3  # a short run, and the step in its middle whose attention is drawn


@cache
def recorded() -> tuple[Pair, ...]:
    """Each layer of the embedded model in two consecutive steps of one dense run, all heads; about ten seconds."""
    pipe: Any = tiny.load()
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(Dense(), steps={_LOOKED - 1, _LOOKED}, layers=tuple(range(6)), heads=3)
    options = {**tiny.defaults(), "num_inference_steps": _STEPS, "output_type": "latent"}
    with diffsparse.apply(pipe, recorder, schedule=Schedule(0)):
        pipe(tiny.prompts(1)[0], generator=torch.Generator().manual_seed(0), **options)
    return tuple(pairs(recorder.recording()))


def imagined(layout: Layout, head_dim: int = 16) -> Pair:
    """Two calls of one head over tokens without content, for what depends on the layout alone."""
    nothing = torch.zeros(1, 1, layout.tokens, head_dim, dtype=DTYPE)
    first, second = (
        Place("transformer", "layer", 0, step, _STEPS, "", layout, end=_STEPS) for step in (_LOOKED - 1, _LOOKED)
    )
    return Pair(*(RecordedCall(place, 0, (0,), 1, None, nothing, nothing, nothing) for place in (first, second)))


class Choice(NamedTuple):
    """One sparse product of a strategy.

    q, k, v: [1, H, N, D], tokens in the order that the blocks count.
    blocks: what is computed, and what stands for the rest.
    mask: bool [H, nQ, nK], the computed blocks.
    out: [1, H, N, D], before anything is added to it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Blocks
    mask: Tensor
    out: Tensor

    @property
    def missed(self) -> Tensor:
        """Dense output less this one, [H, N, D]."""
        return (torch.nn.functional.scaled_dot_product_attention(self.q, self.k, self.v) - self.out)[0]


@torch.no_grad()
def choices(strategy: Strategy, pair: Pair) -> list[Choice]:
    """Each sparse product of a strategy in the second call, after it has learned from the first if it can."""
    memory: dict[str, Any] = {}
    found: list[Choice] = []

    def product(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, here: Site) -> tuple[Tensor, Tensor]:
        out, lse = multiply(q, k, v, blocks, here)
        found.append(Choice(q, k, v, blocks, blocks.lists.to_mask()[0], out))
        return out, lse

    if strategy.observes:
        in_order(strategy, strategy.observe, qkv(pair.first), replace(site(pair.first, memory), product=product))
    in_order(strategy, strategy.attend, qkv(pair.second), replace(site(pair.second, memory), product=product))
    return found


def site(call: RecordedCall, memory: dict[str, Any] | None = None) -> Site:
    """The place of a recorded call."""
    return site_of(call, {} if memory is None else memory, torch.device("cpu"))


def qkv(call: RecordedCall) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 [1, H, N, D]."""
    return tensors_of(call, "cpu", torch.float32)


def mass(q: Tensor, k: Tensor) -> Tensor:
    """Softmax mass of each block, 1 where attention would be uniform: [H, nQ, nK]."""
    _, lse = kernels.attention(q, k, k)
    found = kernels.block_mass(q, k, lse, q_block=BLOCK, kv_block=BLOCK)[0]
    return found / found.mean((-2, -1), keepdim=True)
