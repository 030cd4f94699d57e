"""A transformer within a wrapper, and copies and pickles of a touched one."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import AdaSpa, Dense, Random, Schedule
from diffsparse.guidance.heads import resolve
from diffsparse.plans.plan import fingerprints
from diffsparse.seam.hooks import run_of
from diffsparse.seam.targets import models_of
from support.tiny_pipelines import BUILDERS, run
from support.tiny_transformers import build, inputs, tensors

NAME = "HunyuanVideoTransformer3DModel"  # its row of the table matters: text after the video
ALWAYS = Schedule(dense_first=0)
SPARSE = Random(0.5, block=8)
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = tmp_path_factory.mktemp("world") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: torch.nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)


def with_lora(model: torch.nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))  # which starts as nothing


def sharded(model: torch.nn.Module) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hooked(model: torch.nn.Module) -> Any:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, hooks.ModelHook())
    return model


def blocks_compiled(model: torch.nn.Module) -> Any:
    torch._dynamo.reset()
    for i, block in enumerate(model.transformer_blocks):  # type: ignore[union-attr, arg-type]
        model.transformer_blocks[i] = torch.compile(block, backend="eager")  # type: ignore[index, union-attr, operator]
    return model


WRAPPERS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "torch.compile": compiled,
    "compiled blocks": blocks_compiled,
    "peft": with_lora,
    "ddp": torch.nn.parallel.DistributedDataParallel,
    "compiled ddp": lambda model: torch.compile(torch.nn.parallel.DistributedDataParallel(model), backend="eager"),
    "fully_shard": sharded,
    "accelerate": hooked,
}


def three_passes(model: Any, name: str = NAME) -> list[Tensor]:
    return [tensors(model, inputs(name))[0] for _ in range(3)]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
def test_wrapped_is_as_sparse_as_bare(wrap: Callable[[torch.nn.Module], Any]) -> None:
    with diffsparse.apply(build(NAME), SPARSE, schedule=ALWAYS) as handle:
        want, expected = three_passes(handle._models["transformer"]), handle.report()
    model = wrap(build(NAME))
    dense = three_passes(model)
    with diffsparse.apply(model, SPARSE, schedule=ALWAYS, strict=True) as handle:
        got, report = three_passes(model), handle.report()
        assert run_of(model) is handle._runs[0]
    assert (report.sparse_calls, report.modules) == (expected.sparse_calls, expected.modules)
    assert {c.layer for c in report.calls} == {c.layer for c in expected.calls}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert run_of(model) is None
    assert all(map(torch.equal, three_passes(model), dense))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
def test_wrapped_is_guided_like_bare(wrap: Callable[[torch.nn.Module], Any]) -> None:
    bare = build(NAME)
    with diffsparse.guide(bare, "0.1"):
        want = tensors(bare, inputs(NAME))[0]
    model = wrap(build(NAME))
    dense = tensors(model, inputs(NAME))[0]
    with diffsparse.guide(model, "0.1") as handle:
        got = tensors(model, inputs(NAME))[0]
        assert handle.report().passes == 1
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, dense)
    assert torch.equal(tensors(model, inputs(NAME))[0], dense)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
def test_wrapped_has_the_names_and_the_fingerprint_of_bare(wrap: Callable[[torch.nn.Module], Any]) -> None:
    bare, wrapped = models_of(build(NAME)), models_of(wrap(build(NAME)))
    assert fingerprints(wrapped) == fingerprints(bare)
    assert resolve(["0.1", "single.*.0"], wrapped["transformer"]) == resolve(["0.1", "single.*.0"], bare["transformer"])


@pytest.mark.parametrize("wrap", [compiled, with_lora], ids=["torch.compile", "peft"])
def test_wrapped_within_a_pipeline(wrap: Callable[[torch.nn.Module], Any]) -> None:
    pipe, call = BUILDERS["wan"]()
    with diffsparse.apply(pipe, SPARSE, schedule=ALWAYS):
        want = run(pipe, call)
    pipe.transformer = wrap(pipe.transformer)
    with diffsparse.apply(pipe, SPARSE, schedule=ALWAYS, strict=True) as handle:
        got = run(pipe, call)
        assert handle.report().sparse_calls
    torch.testing.assert_close(got, want)
    diffsparse.apply(pipe, SPARSE)
    diffsparse.remove(pipe)
    assert run_of(pipe.transformer) is None


# --- copies -------------------------------------------------------------------------------------------------------

TOUCHED: dict[str, Callable[[Any], Any]] = {
    "applied": lambda model: diffsparse.apply(model, AdaSpa(block=8)),
    "guided": lambda model: diffsparse.guide(model, ["0.1"]),
    "both": lambda model: (diffsparse.apply(model, AdaSpa(block=8)), diffsparse.guide(model, ["0.1"])),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _loaded(_saved(model)),
}


def _saved(model: Any) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def _loaded(saved: bytes) -> Any:
    return torch.load(io.BytesIO(saved), weights_only=False)


def traces(model: torch.nn.Module) -> dict[str, list[str]]:
    """What each module holds besides weights and configuration, by name; and the classes of processors."""
    found = {}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        processor = getattr(module, "processor", None)
        of_processor = [type(processor).__name__, *sorted(map(str, vars(processor).items()))] if processor else []
        found[name] = [*sorted(vars(module)), *map(str, hooks), *of_processor]
    return found


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("touch", TOUCHED.values(), ids=list(TOUCHED))
def test_a_copy_is_that_of_an_untouched_model(touch: Callable[[Any], Any], way: Callable[[Any], Any]) -> None:
    model = build("WanTransformer3DModel")
    model.set_attention_backend("_native_math")
    model.reset_attention_backend()
    want, outs = traces(way(model)), three_passes(model, "WanTransformer3DModel")
    touch(model)
    three_passes(model, "WanTransformer3DModel")
    twin = way(model)
    assert traces(twin) == want
    for a, b in zip(three_passes(twin, "WanTransformer3DModel"), outs, strict=True):
        torch.testing.assert_close(a, b)  # other memory, other alignment
    diffsparse.remove(model)
    assert traces(model) == want
    assert all(map(torch.equal, three_passes(model, "WanTransformer3DModel"), outs))


def test_a_backend_of_the_user_is_pickled_and_ours_is_not() -> None:
    model = build("WanTransformer3DModel")
    processor = next(iter(model.attn_processors.values()))
    processor._attention_backend = "_native_math"
    with diffsparse.apply(model, Dense()):
        again = pickle.loads(pickle.dumps(model.attn_processors))
        assert next(iter(again.values()))._attention_backend == "_native_math"
        assert {type(p) for p in again.values()} == {type(processor).__mro__[1]}


def test_a_pickle_is_read_without_this_package(tmp_path: Path) -> None:
    model = build("WanTransformer3DModel")
    with diffsparse.apply(model, AdaSpa(block=8)), diffsparse.guide(model, ["0.1"]):
        (tmp_path / "model.pt").write_bytes(_saved(model))
    code = (
        "import sys, torch; sys.modules['diffsparse'] = None\n"
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); print(type(m).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "WanTransformer3DModel", done.stderr


def test_modules_that_others_walk_show_no_registry_of_ours() -> None:
    """Diffusers' own tests of its caches take each module that has a registry for one of theirs."""
    import diffusers

    model = build("WanTransformer3DModel")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    before = {name for name, module in model.named_modules() if hasattr(module, "_diffusers_hook")}
    with diffsparse.apply(model, Dense()):
        names = {name for name, module in model.named_modules() if hasattr(module, "_diffusers_hook")}
        assert names - {""} == before - {""}
        model.disable_cache()
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        want = [name for name, _ in model.named_modules()]
    assert [name for name, _ in model.named_modules()] == want


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_hooks_of_others_come_and_go_around_ours(first: str) -> None:
    """Ours is in the registry of the model, and no link of the chain of its forwards."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Doubles(ModelHook):  # type: ignore[misc]
        def post_forward(self, module: Any, output: Any) -> Any:
            return tuple(2 * x for x in output)

    model = build("WanTransformer3DModel")
    want = three_passes(model, "WanTransformer3DModel")
    registry = HookRegistry.check_if_exists_or_initialize(model)
    if first == "ours":
        diffsparse.apply(model, Dense())
    registry.register_hook(Doubles(), "a")
    registry.register_hook(Doubles(), "b")
    if first == "theirs":
        diffsparse.apply(model, Dense())
    got = three_passes(model, "WanTransformer3DModel")
    assert all(torch.equal(a, 4 * b) for a, b in zip(got, want, strict=True))
    registry.remove_hook("a")
    got = three_passes(model, "WanTransformer3DModel")
    assert all(torch.equal(a, 2 * b) for a, b in zip(got, want, strict=True))
    diffsparse.remove(model)
    registry.remove_hook("b")
    assert all(map(torch.equal, three_passes(model, "WanTransformer3DModel"), want))
