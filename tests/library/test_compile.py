"""`torch.compile` sees one opaque op: no more graphs than on an untouched model, and the eager result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import diffsparse
from diffsparse import GNA, AdaSpa, Schedule
from diffsparse.errors import DenseFallbackError
from diffsparse.seam.hooks import run_of
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


SIZES = [Shape(2 + i % 3, 8 + 4 * (i % 4), 8 + 2 * i, 6 + i % 5) for i in range(12)]
MANY = {"QwenImageTransformer2DModel": "whole", "FluxTransformer2DModel": "in place"}
# Wan and Flux, whole and by blocks, and every strategy: in test_surroundings.
FAMILIES = [
    *("CogVideoXTransformer3DModel", "HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel"),
    *("MochiTransformer3DModel", "SD3Transformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel"),
]


def put_on(model: Any, how: str, counter: Any, **options: Any) -> Any:
    """`model` compiled: as a wrapper, in place (its hooks are then traced), or block by block."""
    if how == "whole":
        return torch.compile(model, fullgraph=True, backend=counter, **options)
    method = model.compile if how == "in place" else model.compile_repeated_blocks
    method(fullgraph=True, backend=counter, **options)
    return model


def counted(name: str, how: str, shapes: list[Shape], **options: Any) -> list[list[int]]:
    """Graphs after each size: of the untouched model, and with a strategy."""
    counts = []
    for applied in (False, True):
        torch._dynamo.reset()
        model, counter = build(name), CompileCounterWithBackend("eager")
        if applied:
            diffsparse.apply(model, AdaSpa(sparsity=0.5, block=8, order="tile1x2x2"), schedule=Schedule(dense_first=0))
        forward = put_on(model, how, counter, **options)
        counts.append([])
        for shape in shapes:
            with torch.no_grad():
                forward(**inputs(name, shape), return_dict=False)
            counts[-1].append(counter.frame_count)
    return counts


@pytest.mark.parametrize(("name", "how"), MANY.items())
def test_new_sizes_need_no_new_graphs(name: str, how: str) -> None:
    untouched, applied = counted(name, how, SIZES, dynamic=True)
    assert applied == untouched


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_needs_more_graphs(name: str) -> None:
    untouched, applied = counted(name, "whole", SIZES[:3])
    assert applied == untouched


@pytest.mark.parametrize("how", ["whole", "in place", "blocks"])
@pytest.mark.parametrize(
    "strategy",
    [GNA(block=16, window=(0, 4, 4)), AdaSpa(block=16, sparsity=0.7, order="tile1x4x4")],
    ids=["windows", "order"],
)
def test_the_grid_is_known(strategy: Any, how: str) -> None:
    name, shape = "FluxTransformer2DModel", Shape(1, 32, 48, 6)
    outs, reports = [], []
    for compiled in (False, True):
        model = build(name)
        with diffsparse.apply(model, strategy, schedule=Schedule(dense_first=1), strict=True) as handle:
            forward = put_on(model, how, "eager") if compiled else model
            with torch.no_grad():
                outs.append([forward(**inputs(name, shape), return_dict=False)[0] for _ in range(3)])
            reports.append(handle.report())
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)
    assert reports[0].sparse_density == reports[1].sparse_density < 1
    assert reports[0].notes == reports[1].notes


def gradients(compiled: str, strict: bool) -> tuple[list[torch.Tensor], Any]:
    model = build("WanTransformer3DModel")
    handle = diffsparse.apply(model, AdaSpa(block=8), schedule=Schedule(dense_first=0), strict=strict)
    forward = put_on(model, compiled, "eager" if strict else "aot_eager") if compiled else model
    forward(**inputs("WanTransformer3DModel"), return_dict=False)[0].square().sum().backward()
    return [x.grad for x in model.parameters() if x.grad is not None], handle.report()


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_gradients_are_those_of_eager_mode_and_reported(how: str) -> None:
    want, eager = gradients("", strict=False)
    got, report = gradients(how, strict=False)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert report.fallbacks == eager.fallbacks == {"gradients are wanted": 2}
    torch._dynamo.reset()
    with pytest.raises(DenseFallbackError, match="gradients"):
        gradients(how, strict=True)


@pytest.mark.parametrize("surrounding", [lambda: torch.device("meta"), torch.inference_mode])
def test_handles_are_plain_numbers_on_the_cpu(surrounding: Any) -> None:
    model = build("WanTransformer3DModel")
    with surrounding():
        diffsparse.apply(model, AdaSpa(block=8))
    run = run_of(model)
    assert run is not None
    for number in (run.begun, *(layer.handle for layer in run.layers)):
        assert number.device.type == "cpu"
        assert not number.is_inference()
    assert len({int(layer.handle) for layer in run.layers}) == len(run.layers)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="an earlier torch has no such tag")
@pytest.mark.parametrize("op", ["begin", "attend", "decline", "miss"])
def test_cuda_graphs_leave_the_ops_out(op: str) -> None:
    """They would replay what one step computed for ever."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.diffsparse, op).default.tags


class OnesOwn:
    """A processor with a kernel of its own."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states * 2, None


@pytest.mark.parametrize("how", ["", "whole", "in place", "blocks"])
def test_attention_that_goes_another_way_is_counted(how: str) -> None:
    name = "WanTransformer3DModel"
    for strict in (False, True):
        torch._dynamo.reset()
        model: Any = build(name)
        model.blocks[1].attn1.processor = OnesOwn()
        model.blocks[1].attn1.register_forward_hook(lambda _module, _args, out: out[0])
        handle = diffsparse.apply(model, AdaSpa(block=8), schedule=Schedule(dense_first=0), strict=strict)
        forward = put_on(model, how, "eager") if how else model
        with torch.no_grad():
            if strict:
                with pytest.raises(DenseFallbackError, match=r"blocks.1.attn1.*without scaled_dot_product_attention"):
                    forward(**inputs(name), return_dict=False)
            else:
                for _ in range(2):
                    forward(**inputs(name), return_dict=False)
        reason = "the processor computes attention without scaled_dot_product_attention"
        assert handle.report().fallbacks == {reason: 1 if strict else 2}


class Identity:
    """Each token sees itself alone: the values, as they are."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Any) -> torch.Tensor:
        return v


def test_a_strategy_may_give_back_its_arguments() -> None:
    name, outs = "WanTransformer3DModel", []
    for compiled in (False, True):
        model = build(name)
        diffsparse.apply(model, Identity(), schedule=Schedule(dense_first=0))
        forward = put_on(model, "whole", "aot_eager") if compiled else model
        with torch.no_grad():
            outs.append(forward(**inputs(name), return_dict=False)[0])
    torch.testing.assert_close(*outs)
