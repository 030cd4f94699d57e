"""The matrix of support: every method in every surrounding, against dense or against itself undisturbed.

`docs/support.md` is made of this file by `python -m support.matrix`: a row for each test that is marked with `EVERY`,
with the first line of its docstring, and what `LIMITS` says of a cell.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers as d
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

from diffsparse import Layout
from diffsparse.errors import PlanError
from support import matrix, tiny_transformers, two_ranks
from support.methods import METHODS, Method
from support.tiny_pipelines import BUILDERS, run
from support.tiny_transformers import CASES, Shape

EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
LIMITS = {
    ("compile", "PARO"): "a plan is of one size: at another it raises `PlanError`, as without compile",
    ("compiled_blocks", "PARO"): "a plan is of one size: at another it raises `PlanError`, as without compile",
}
STEPS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [  # of the compiler
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def build(name: str) -> Any:
    """A model where the tests run."""
    return tiny_transformers.build(name).to(DEVICE)


def inputs(name: str, shape: Shape) -> dict[str, Any]:
    """Its inputs."""
    found = tiny_transformers.inputs(name, shape)
    return tree_map(lambda x: x.to(DEVICE) if torch.is_tensor(x) else x, found)


class Subject(NamedTuple):
    """A transformer, and the size of its input."""

    name: str
    shape: Shape

    @property
    def layout(self) -> Layout:
        """Of its joint attention."""
        of = CASES[self.name].layout
        assert of is not None
        return Layout(*of(self.shape))

    def inputs(self) -> dict[str, Any]:
        """The same ones each time."""
        return inputs(self.name, self.shape)


WAN = Subject("WanTransformer3DModel", Shape(3, 8, 12, 6))
FLUX = Subject("FluxTransformer2DModel", Shape(1, 16, 24, 6))
SD3 = Subject("SD3Transformer2DModel", Shape(1, 16, 24, 6))  # with norms of queries and keys


def loop(model: Any, kwargs: dict[str, Any], steps: int = STEPS) -> list[Tensor]:
    """A few denoising steps of a hand-written loop, on one input that moves a little."""
    outs = []
    for step in range(steps):
        moved = {**kwargs, "hidden_states": kwargs["hidden_states"] * (1 - 0.1 * step)}
        outs.append(model(**moved, return_dict=False)[0])
    return outs


def undisturbed(method: Method, subject: Subject) -> list[Tensor]:
    """What a method gives on one live, eager, float32 model."""
    model = build(subject.name)
    with method.put(model, subject.layout) as handle, torch.no_grad():
        outs = loop(model, subject.inputs())
        assert method.acts(handle)
    return outs


def assert_same(outs: list[Tensor], want: list[Tensor]) -> None:
    """Bit by bit."""
    assert [torch.equal(a, b) for a, b in zip(outs, want, strict=True)] == [True] * len(want)


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square."""
    return float((a.float() - b.float()).square().mean().sqrt())


@EVERY
@pytest.mark.parametrize("subject", [WAN, SD3, FLUX], ids=lambda subject: subject.name)
def test_autocast(subject: Subject, method: Method) -> None:
    """`torch.autocast`: queries and keys in float32 beside values in bfloat16."""
    want, model = undisturbed(method, subject), build(subject.name)
    with method.put(model, subject.layout) as handle, torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        outs = loop(model, subject.inputs())
        assert method.acts(handle)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert outs[0].dtype == loop(model, subject.inputs(), 1)[0].dtype
    low = build(subject.name).bfloat16()
    halved = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in subject.inputs().items()
    }
    with method.put(low, subject.layout), torch.no_grad():
        rounded = loop(low, halved)
    for out, rough, exact in zip(outs, rounded, want, strict=True):
        assert distance(out, exact) <= 2 * distance(rough, exact)


@EVERY
@pytest.mark.parametrize("subject", [WAN, FLUX], ids=lambda subject: subject.name)
def test_inference_mode(subject: Subject, method: Method) -> None:
    """`torch.inference_mode()`, and the same model without it afterwards."""
    want, model = undisturbed(method, subject), build(subject.name)
    with torch.inference_mode(), method.put(model, subject.layout):
        assert_same(loop(model, subject.inputs()), want)
    with torch.no_grad(), method.put(model, subject.layout):
        assert_same(loop(model, subject.inputs()), want)


@EVERY
@pytest.mark.parametrize("subject", [WAN, FLUX], ids=lambda subject: subject.name)
def test_default_device(subject: Subject, method: Method) -> None:
    """`torch.set_default_device` to another device than the model's."""
    want, model, kwargs = undisturbed(method, subject), build(subject.name), subject.inputs()
    with method.put(model, subject.layout), torch.no_grad(), torch.device("meta"):
        assert_same(loop(model, kwargs), want)


# --- compiled -------------------------------------------------------------------------------------------------------

SIZES = [
    (8, 12),
    (12, 8),
    (16, 24),
    (10, 14),
    (14, 18),
    (18, 10),
    (20, 12),
    (12, 22),
    (22, 14),
    (16, 18),
    (18, 20),
    (24, 8),
]


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs(model: Any, compiled: Callable[..., Any], subjects: list[Subject]) -> tuple[int, list[Tensor]]:
    """How many graphs a model makes of several sizes, and its outputs."""
    counter, outs = CompileCounterWithBackend("eager"), list[Tensor]()
    forward = compiled(model, counter)
    with torch.no_grad():
        for subject in subjects:
            outs += loop(forward, subject.inputs(), 2)
    return counter.frame_count, outs


def whole(model: Any, counter: Any) -> Any:
    return torch.compile(model, backend=counter, fullgraph=True)


def blocks(model: Any, counter: Any) -> Any:
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    return model


@cache
def graphs_of_an_untouched_model(compiled: Callable[..., Any], *subjects: Subject) -> int:
    count, _ = graphs(build(subjects[0].name), compiled, list(subjects))
    torch._dynamo.reset()
    return count


def assert_compiles(method: Method, subjects: list[Subject], compiled: Callable[..., Any]) -> None:
    """As many graphs as an untouched model makes, and what the method gives eagerly."""
    count = graphs_of_an_untouched_model(compiled, *subjects)
    model = build(subjects[0].name)
    with method.put(model, subjects[0].layout):
        mine, outs = graphs(model, compiled, subjects)
    assert mine == count
    model = build(subjects[0].name)
    with method.put(model, subjects[0].layout), torch.no_grad():
        want = [out for subject in subjects for out in loop(model, subject.inputs(), 2)]
    for a, b in zip(outs, want, strict=True):
        torch.testing.assert_close(a, b)


@EVERY
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("subject", [WAN, FLUX], ids=lambda subject: subject.name)
def test_compile(subject: Subject, method: Method) -> None:
    """`torch.compile(fullgraph=True)` of the whole transformer, twelve sizes after each other."""
    sizes = [subject._replace(shape=subject.shape._replace(height=h, width=w)) for h, w in SIZES]
    if method.sized:
        assert_compiles(method, sizes[:1], whole)
        assert_other_sizes_raise(method, sizes, whole)
    else:
        assert_compiles(method, sizes, whole)


@EVERY
@pytest.mark.usefixtures("compiler")
def test_compiled_blocks(method: Method) -> None:
    """`compile_repeated_blocks(fullgraph=True)`, twelve sizes after each other."""
    sizes = [WAN._replace(shape=WAN.shape._replace(height=h, width=w)) for h, w in SIZES]
    if method.sized:
        assert_compiles(method, sizes[:1], blocks)
        assert_other_sizes_raise(method, sizes, blocks)
    else:
        assert_compiles(method, sizes, blocks)


def assert_other_sizes_raise(method: Method, subjects: list[Subject], compiled: Callable[..., Any]) -> None:
    model = build(subjects[0].name)
    with method.put(model, subjects[0].layout), pytest.raises(PlanError, match="Calibrate at this size"):
        graphs(model, compiled, subjects[:2])


# --- wrapped --------------------------------------------------------------------------------------------------------


@EVERY
def test_peft(method: Method) -> None:
    """PEFT: `get_peft_model` around the transformer."""
    peft = pytest.importorskip("peft")
    want, model = undisturbed(method, WAN), build(WAN.name)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))  # a new LoRA adds nothing
    with method.put(wrapped, WAN.layout) as handle, torch.no_grad():
        assert_same(loop(wrapped, WAN.inputs()), want)
        assert method.acts(handle)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@EVERY
@pytest.mark.usefixtures("process_group")
def test_ddp(method: Method) -> None:
    """`DistributedDataParallel` around the transformer."""
    want = undisturbed(method, WAN)
    wrapped = torch.nn.parallel.DistributedDataParallel(build(WAN.name))
    with method.put(wrapped, WAN.layout) as handle, torch.no_grad():
        assert_same(loop(wrapped, WAN.inputs()), want)
        assert method.acts(handle)


# --- somebody else's kernel -----------------------------------------------------------------------------------------

OWN = F.scaled_dot_product_attention


def calls_the_original(*args: Any, **kwargs: Any) -> Tensor:
    return OWN(*args, **kwargs)


def plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *rest: Any, **kwargs: Any) -> Tensor:
    """Without a mask; in float64."""
    assert attn_mask is None
    scores = q.double() @ k.double().mT * (kwargs.get("scale") or q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ v.double()).to(v.dtype)


@EVERY
@pytest.mark.parametrize("kernel", [calls_the_original, plain], ids=["wrapper", "kernel"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_replaced_sdpa(when: str, kernel: Any, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """`F.scaled_dot_product_attention` replaced by the user, before or after `apply`: it serves the dense calls."""
    want, model, served = undisturbed(method, WAN), build(WAN.name), list[int]()

    def theirs(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        served.append(query.shape[2])
        return kernel(query, key, value, *args, **kwargs)  # type: ignore[no-any-return]

    if when == "before":
        monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    with method.put(model, WAN.layout) as handle, torch.no_grad():
        monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
        outs = loop(model, WAN.inputs())
        assert method.acts(handle)
    assert F.scaled_dot_product_attention is theirs
    assert WAN.layout.tokens in served  # self-attention of a dense step
    for a, b in zip(outs, want, strict=True):
        torch.testing.assert_close(a, b)


# --- whose run it is ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes gave, each on half the heads."""
    return two_ranks.results(tmp_path_factory.mktemp("ranks"), WAN.name, WAN.shape, WAN.layout, STEPS)


@EVERY
def test_two_ranks(method: Method, ranks: dict[str, Any]) -> None:
    """Ulysses: two processes with half the heads each."""
    for a, b in zip(ranks[method.name], undisturbed(method, WAN), strict=True):
        torch.testing.assert_close(a, b.cpu())


PIXELS = Layout(1, 8, 12)  # of the pipeline below: its autoencoder keeps the size, and a token is a pixel


def sd3() -> tuple[Any, dict[str, Any]]:
    """A text-to-image pipeline with classifier-free guidance in one batch."""
    pipe, call = BUILDERS["sd3"]()
    return pipe.to(DEVICE), call


def sibling(pipe: Any) -> tuple[Any, dict[str, Any]]:
    """An image-to-image pipeline of the same parts, with a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = d.StableDiffusion3Img2ImgPipeline(**{**pipe.components, "scheduler": scheduler})
    _, call = sd3()
    image = torch.linspace(0, 1, 3 * 8 * 12).view(1, 3, 8, 12)
    return other, {**call, "image": image, "num_inference_steps": 8, "strength": 0.5}


def kinds(method: Method, handle: Any) -> Any:
    """What the report of the last run says of it."""
    report = handle.report()
    if method.strategy is None:
        return report.passes, report.perturbed
    return report.steps, report.dense_steps, [(call.step, call.kind, float(call.density)) for call in report.calls]


@EVERY
def test_shared_components(method: Method) -> None:
    """Two pipelines of the same parts in turns, the first of which `apply` was given; then without the first."""
    pipe, call = sd3()
    with method.put(pipe, PIXELS) as handle:
        want, told = run(pipe, call), kinds(method, handle)
    pipe, _ = sd3()
    other, other_call = sibling(pipe)
    with method.put(other, PIXELS) as handle:
        other_want, other_told = run(other, other_call), kinds(method, handle)
    pipe, _ = sd3()
    other, _ = sibling(pipe)
    with method.put(pipe, PIXELS) as handle:
        for _ in range(2):
            assert torch.equal(run(pipe, call), want)
            assert kinds(method, handle) == told
            assert torch.equal(run(other, other_call), other_want)
            assert kinds(method, handle) == other_told
        del pipe
        gc.collect()
        assert torch.equal(run(other, other_call), other_want)
        assert kinds(method, handle) == other_told


class Cancelled(BaseException):
    """As a user's interrupt is one."""


@EVERY
@pytest.mark.parametrize("last", [0, 1, 2])
def test_cancelled_run(last: int, method: Method) -> None:
    """A run that ends in the middle of a step, and the next one, of the same or of another length."""

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise Cancelled
        return kwargs

    wanted = {}
    for steps in (STEPS, 6):
        pipe, call = sd3()
        with method.put(pipe, PIXELS) as handle:
            wanted[steps] = run(pipe, call, num_inference_steps=steps), kinds(method, handle)
    pipe, call = sd3()
    with method.put(pipe, PIXELS) as handle:
        for steps in wanted:
            with pytest.raises(Cancelled):
                run(pipe, call, callback_on_step_end=stop)
            out = run(pipe, call, num_inference_steps=steps)
            assert torch.equal(out, wanted[steps][0])
            assert kinds(method, handle) == wanted[steps][1]


@EVERY
@pytest.mark.parametrize(("strength", "ran"), [(1.0, 8), (0.5, 4), (0.25, 2)])
def test_strength(strength: float, ran: int, method: Method) -> None:
    """Image-to-image that begins in the middle of the schedule: steps count from there."""
    pipe, call = sibling(sd3()[0])
    with method.put(pipe, PIXELS) as handle:
        run(pipe, {**call, "strength": strength})
        report = handle.report()
    if method.strategy is None:
        assert report.passes == ran
    else:
        assert report.steps == ran
        assert {call.step for call in report.calls} == set(range(ran))
        sparse = [call.step for call in report.calls if call.kind == "sparse"]
        assert not sparse if method.name == "Dense" else min(sparse) == 1


@EVERY
def test_bare_loop(method: Method) -> None:
    """A bare transformer called without end, with prompts and sizes of all kinds: what is kept stays bounded."""
    model, held = build(WAN.name), list[tuple[int, int]]()
    with method.put(model, WAN.layout) as handle, torch.no_grad():
        for _ in range(3):
            for request in range(20):
                width = 12 if method.sized else 8 + 2 * request
                shape = Shape(3, 8, width, 6 + request)
                loop(model, inputs(WAN.name, shape), 2)
            if method.strategy is not None:
                report = handle.report()
                held.append((len(report.calls), report.memory_bytes))
        if method.strategy is not None:
            assert held[1] == held[2]
            handle.reset()
            assert_same(loop(model, WAN.inputs()), undisturbed(method, WAN))


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_is_of_these_tests() -> None:
    here = sys.modules[__name__]
    assert matrix.PAGE.read_text() == matrix.page(here)
    rows = {name for name, _ in matrix.rows(here)}
    assert {row for row, _ in LIMITS} <= rows
    assert len(rows) >= 12
