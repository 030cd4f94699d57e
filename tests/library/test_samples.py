"""A sample alone and beside others gets the same: its orders, its blocks and what is kept for it are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import AdaSpa, Compensated, Digest, Layout, Schedule, Tangent
from diffsparse.strategies.base import in_order
from diffsparse_kernels import BlockLists
from support.sites import site
from support.strategies import BLOCK, HEADS, NAMES, every
from support.tiny_transformers import build, inputs, tensors

LAYOUT = Layout(4, 4, 6, text_before=5, text_after=3)


def unlike() -> tuple[Tensor, Tensor, Tensor]:
    """Three samples whose tokens are alike along different axes, weak and strong attention: [3, H, N, D] each."""
    lot = torch.Generator().manual_seed(0)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in (4, 4, 6)))
    smooth = torch.randn(3, HEADS, 8, 16, generator=lot)
    video = torch.stack([smooth[axis][:, cells[:, axis]] for axis in range(3)])  # [3, H, video, D]
    text = torch.randn(3, HEADS, LAYOUT.tokens - LAYOUT.video, 16, generator=lot)
    base = torch.cat([text[:, :, :5], video, text[:, :, 5:]], 2)
    strength = torch.tensor([0.5, 1.0, 2.0])[:, None, None, None]
    q, k, v = (strength * (base + 0.3 * torch.randn(base.shape, generator=lot)) for _ in range(3))
    return q, k, v


def run(strategy: Any, qkv: tuple[Tensor, ...], keys: Tensor | None) -> tuple[list[Tensor], dict[str, Any]]:
    """The outputs of a few steps with a search in the first and in the third, and what is remembered."""
    memory: dict[str, Any] = {}
    outs = []
    for step in range(5):
        here = site(LAYOUT, step, 12, memory, key_mask=keys)
        method = getattr(strategy, "observe", None) if step == 0 else None
        moved = tuple(x * (1 + 0.02 * step) for x in qkv)
        outs.append(in_order(strategy, method or strategy.attend, moved, here))
    return outs, memory


def assert_same(whole: list[Tensor], alone: list[Tensor], sample: int) -> None:
    for step, (out, mine) in enumerate(zip(whole, alone, strict=True)):
        torch.testing.assert_close(out[sample : sample + 1], mine, msg=lambda text, s=step: f"step {s}: {text}")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_in_any_order(name: str, masked: bool) -> None:
    strategy, qkv = every(LAYOUT, 0.6)[name], unlike()
    keys = torch.rand(3, LAYOUT.tokens) < 0.8 if masked else None
    outs, memory = run(strategy, qkv, keys)
    for sample in range(3):
        one = slice(sample, sample + 1)
        alone, own = run(strategy, tuple(x[one] for x in qkv), None if keys is None else keys[one])
        assert_same(outs, alone, sample)
        if "orders" in memory:
            assert torch.equal(memory["orders"][one], own["orders"])
        if isinstance(lists := memory.get("lists"), BlockLists) and len(lists.cnt) == 3:
            assert torch.equal(lists.to_mask()[one], own["lists"].to_mask())


def test_the_samples_are_unlike_enough() -> None:
    """They want other orders and other blocks, so that a choice made for all of them would be seen."""
    _, memory = run(AdaSpa(0.6, (2,), BLOCK, order="auto"), unlike(), None)
    orders, mask = memory["orders"], memory["lists"].to_mask()
    assert len({tuple(row.tolist()) for row in orders}) == 3
    assert not torch.equal(mask[0], mask[1])


def test_what_digest_may_keep_is_counted_by_sample() -> None:
    """In too little memory it keeps a lower rank, the same whether a sample is alone or not."""
    qkv = unlike()
    two = HEADS * (LAYOUT.tokens * (2 + 2) + 4 * 2 * 16) / 2**30  # GiB of rank 2
    strategy = Digest(0.6, BLOCK, memory=two, probes=False)
    outs, memory = run(strategy, qkv, None)
    alone, own = run(strategy, tuple(x[:1] for x in qkv), None)
    assert memory["kept"][0].rank == own["kept"][0].rank == 2
    assert_same(outs, alone, 0)


MODELS = (
    "CogVideoXTransformer3DModel",
    "FluxTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "WanTransformer3DModel",
)
SEARCHING = (
    AdaSpa(0.6, (2,), BLOCK, order="auto"),
    Tangent(0.6, BLOCK),
    Digest(0.6, BLOCK),
    Compensated(AdaSpa(0.6, (2,), BLOCK), "tail"),
)


def differing(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Two samples with latents and prompts of their own; what says where tokens are is shared."""
    found = {}
    for name, x in kwargs.items():
        shared = not torch.is_tensor(x) or not x.ndim or x.shape[0] != 1 or name.endswith("_ids")
        found[name] = x if shared else torch.cat([x, 2 * x.flip(-1) if x.is_floating_point() and x.ndim > 2 else x])
    return found


def doubled(x: Any) -> Any:
    """Floats in float64."""
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


@pytest.mark.parametrize("name", MODELS)
def test_in_models(name: str) -> None:
    """Mochi attends to its samples one after the other, in one call of a processor: each has a memory of its own.

    In float64: in float32 a batch is multiplied in another order, and two blocks of nearly equal errors change places.
    """
    model, both = build(name).double(), {key: doubled(x) for key, x in differing(inputs(name)).items()}

    def outs(strategy: Any, kwargs: dict[str, Any]) -> list[Tensor]:
        with diffsparse.apply(model, strategy, schedule=Schedule(dense_first=1)) as handle:
            found = [tensors(model, kwargs)[0] for _ in range(4)]
            assert handle.report().sparse_calls
        return found

    for strategy in SEARCHING:
        whole = outs(strategy, both)
        for sample in range(2):
            one = slice(sample, sample + 1)
            mine = {n: x[one] if torch.is_tensor(x) and x.ndim and len(x) == 2 else x for n, x in both.items()}
            assert_same(whole, outs(strategy, mine), sample)


def test_a_batch_of_many_lengths_is_remembered() -> None:
    """Mochi computes each sample by itself, without the padding of its prompt: as many shapes as samples."""
    samples = 12
    model, kwargs = build("MochiTransformer3DModel"), inputs("MochiTransformer3DModel")
    width = kwargs["encoder_hidden_states"].shape[-1]
    kwargs = {key: x.repeat(samples, *(1 for _ in x.shape[1:])) for key, x in kwargs.items()}
    kwargs["encoder_hidden_states"] = torch.randn(samples, samples, width)
    kwargs["encoder_attention_mask"] = torch.ones(samples, samples).tril().bool()
    steps = 5
    strategy = AdaSpa(sparsity=0.5, block=8, searches=(steps,))
    with diffsparse.apply(model, strategy, schedule=Schedule(dense_first=2), strict=True) as handle:
        for _ in range(steps):
            tensors(model, kwargs)
        report = handle.report()
    assert report.sparse_calls == (steps - 2) * report.dense_calls / 2 > 0
