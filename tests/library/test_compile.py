"""`torch.compile` sees one opaque op: no more graphs than on an untouched model, and the eager result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import diffsparse
from diffsparse import AdaSpa, Schedule
from support.tiny_transformers import Shape, build, inputs

MODELS = {
    "WanTransformer3DModel": Shape(3, 8, 12, 6),
    "FluxTransformer2DModel": Shape(1, 16, 24, 6),
    "HunyuanVideoTransformer3DModel": Shape(3, 8, 12, 6),
}
STEPS = 4
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loop(model: Any, forward: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """A few denoising steps on one input that moves a little."""
    outs = []
    for step in range(STEPS):
        with torch.no_grad(), model.cache_context("cond"):
            moved = {**kwargs, "hidden_states": kwargs["hidden_states"] * (1 - 0.1 * step)}
            outs.append(forward(**moved, return_dict=False)[0])
    return outs


def graphs(name: str, applied: bool, regional: bool) -> tuple[int, list[torch.Tensor], Any]:
    model, kwargs = build(name), inputs(name, MODELS[name])
    counter = CompileCounterWithBackend("eager")
    strategy = AdaSpa(sparsity=0.5, block=8, searches=(2,))
    handle = diffsparse.apply(model, strategy, schedule=Schedule(dense_first=1)) if applied else None
    if regional:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        forward: Any = model
    else:
        forward = torch.compile(model, fullgraph=True, backend=counter)
    outs = loop(model, forward, kwargs)
    return counter.frame_count, outs, handle


@pytest.mark.parametrize("regional", [False, True], ids=["fullgraph", "regional"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_equals_eager(name: str, regional: bool) -> None:
    untouched, *_ = graphs(name, applied=False, regional=regional)
    torch._dynamo.reset()
    count, outs, handle = graphs(name, applied=True, regional=regional)
    assert count == untouched
    report = handle.report()
    assert report.sparse_calls > 0
    assert report.steps == STEPS
    model = build(name)
    strategy = AdaSpa(sparsity=0.5, block=8, searches=(2,))
    with diffsparse.apply(model, strategy, schedule=Schedule(dense_first=1)):
        eager = loop(model, model, inputs(name, MODELS[name]))
    for a, b in zip(outs, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_removed_is_not_compiled() -> None:
    name = "WanTransformer3DModel"
    model, kwargs = build(name), inputs(name)
    want = loop(model, model, kwargs)
    diffsparse.apply(model, AdaSpa(block=8)).remove()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(loop(model, compiled, kwargs), want, strict=True))
