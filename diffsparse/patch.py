"""Put on, take off: `apply` adopts a transformer's attention processors, `remove` gives them back as they were."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention, MochiAttention
from torch._dynamo.eval_frame import skip_code
from torch.overrides import TorchFunctionMode

from diffsparse.errors import ConfigError, UnsupportedModelError
from diffsparse.models import LINEAR_ATTENTION, argument_names, patch_of, spec_of
from diffsparse.report import Report
from diffsparse.run import Call, Layer, Perturber, Run
from diffsparse.schedule import Schedule
from diffsparse.strategies.dense import Dense

# A child module without weights carries the stateful hook. On the model itself, a hook would replace its `forward`
# by one that is bound to it, and a deep copy would then run the original's.
BEACON = "_diffsparse"
BARE = "transformer"  # what a transformer is called that comes without its pipeline: the name it has in most
_ATTENTION = (Attention, MochiAttention, AttentionModuleMixin)
_NATIVE = AttentionBackendName.NATIVE


class _Redirect(TorchFunctionMode):
    """Sends the attention products of one processor call to its layer. Modes are per thread, and so is this."""

    def __init__(self, layer: Layer, cross: bool) -> None:
        super().__init__()
        self.layer, self.cross, self.number = layer, cross, -1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.number += 1
            return self.layer.intercept(Call(*args, **kwargs), self.number, self.cross)
        if func is torch.Tensor.unflatten:  # its super() call is what Dynamo can't inline under a mode
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


@functools.cache
def _adopted(cls: type) -> type:
    """A subclass of processor class `cls` that runs the original under a redirect."""
    original: Any = cls.__call__

    @functools.wraps(original)  # Attention.forward drops keyword arguments that this signature lacks
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        layer = attn.__dict__.get("_diffsparse")
        if layer is None:
            return original(self, attn, *args, **kwargs)
        encoder = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        with _Redirect(layer, encoder is not None):
            return original(self, attn, *args, **kwargs)

    namespace = {"__call__": __call__, "__module__": cls.__module__, "_diffsparse_original": cls}
    adopted = type(f"BlockSparse{cls.__name__}", (cls,), namespace)
    with contextlib.suppress(ValueError):  # step caches look processors up by class, where the class is known
        AttentionProcessorRegistry.register(adopted, AttentionProcessorRegistry.get(cls))
    return adopted


class Handle:
    """What `apply` gives back: `report()` tells what happened, `remove()` or leaving a `with` block undoes it."""

    def __init__(self, strategy: Any, models: dict[str, torch.nn.Module], runs: list[Run]) -> None:
        self.strategy = strategy
        self._models, self._runs = models, runs

    def report(self) -> Report:
        """Summary of the last (or running) pipeline call; empty before the first."""
        modules = sum(len(run.layers) for run in self._runs)
        return Report.of(self.strategy, modules, [run.ledger for run in self._runs])

    def reset(self) -> None:
        """Forget the current run. Only hand-written loops over a bare transformer need it, between two runs."""
        for run in self._runs:
            run.reset_state()

    def remove(self) -> None:
        """Give every processor, hook and backend back as it was. Removing twice does no harm."""
        for model, run in zip(self._models.values(), self._runs, strict=True):
            if run_of(model) is run:
                _remove(model)
                if run.guidance is not None:  # guidance stays, on dense attention
                    attach(run.name, model, run.guidance, run.clock.pipe)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        names = ", ".join(f"{name} ({len(run.layers)})" for name, run in zip(self._models, self._runs, strict=True))
        return f"Handle({self.strategy!r} on attention modules of {names})"


def apply(target: Any, strategy: Any, *, schedule: Schedule | None = None, strict: bool = False) -> Handle:
    """Run the self-attention of `target` by `strategy` until the handle is removed. Applying again replaces.

    Args:
        target: a Diffusers pipeline (all its transformers are taken), or a transformer.
        strategy: any object with `attend(q, k, v, site)`, such as `AdaSpa(sparsity=0.8)`.
        schedule: steps and layers that stay dense; by default the first fifth of the steps.
        strict: raise `DenseFallbackError` where a call that should be sparse would have to run dense.

    Raises:
        UnsupportedModelError: `target` holds no attention that can be redirected.
        ConfigError: `strategy` is no strategy.
    """
    if not callable(getattr(strategy, "attend", None)) or isinstance(strategy, type):
        raise ConfigError(
            f"a strategy is an object with a method attend(q, k, v, site), such as AdaSpa(); got {strategy!r}"
        )
    pipe = None if isinstance(target, torch.nn.Module) else target
    models = models_of(target)
    check = getattr(strategy, "check", None)
    if check is not None:
        check(models)
    schedule = Schedule() if schedule is None else schedule
    runs = []
    for name, model in models.items():
        guidance = getattr(run_of(model), "guidance", None)
        _remove(model)
        runs.append(_apply(name, model, strategy, schedule, strict, pipe))
        _guided(runs[-1], guidance)
    return Handle(strategy, models, runs)


def remove(target: Any) -> None:
    """Undo `apply` and `guide` on a pipeline or transformer; one that was never touched stays as it is."""
    for model in models_of(target).values():
        guidance = getattr(run_of(model), "guidance", None)
        if guidance is not None:
            guidance.unhook()
        _remove(model)


def attach(name: str, model: torch.nn.Module, guidance: Perturber, pipe: Any) -> None:
    """Put `guidance` on the run of `model`, or on a dense one that is made for it."""
    run = run_of(model)
    if run is None:
        run = _apply(name, model, Dense(), Schedule(0), False, pipe)
        run.bare = True
    _guided(run, guidance)


def detach(model: torch.nn.Module, guidance: Perturber) -> None:
    """Undo `attach`, unless something else has taken the guidance's place."""
    run = run_of(model)
    if run is None or run.guidance is not guidance:
        return
    run.guidance = None
    if run.bare:
        _remove(model)


def _guided(run: Run, guidance: Perturber | None) -> None:
    run.guidance = guidance
    if guidance is not None:
        guidance.run = run


def models_of(target: Any) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline that can be applied to, by name; a bare transformer is one of its own.

    Raises:
        UnsupportedModelError: there are none.
    """
    if isinstance(target, torch.nn.Module):
        found = {BARE: target}
    else:
        parts = getattr(target, "components", None)
        parts = parts if isinstance(parts, dict) else {}
        found = {name: x for name, x in parts.items() if "transformer" in name and isinstance(x, torch.nn.Module)}
    found = {name: model for name, model in found.items() if any(attentions(model))}
    if not found:
        raise UnsupportedModelError(
            f"{type(target).__name__} holds no transformer whose attention can be made sparse. Wanted: a pipeline with "
            "a `transformer`, or a Diffusers transformer with scaled-dot-product self-attention (Wan, HunyuanVideo, "
            "CogVideoX, LTX, Mochi, Flux, SD3, Qwen-Image and their kin); UNets and linear attention are not supported"
        )
    return found


def attentions(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The attention modules of a transformer that `apply` adopts, by name, in its order."""
    if type(model).__name__ in LINEAR_ATTENTION or "UNet" in type(model).__name__:
        return
    for name, module in model.named_modules():
        if isinstance(module, _ATTENTION) and getattr(module, "processor", None) is not None:
            yield name, module


def _apply(name: str, model: torch.nn.Module, strategy: Any, schedule: Schedule, strict: bool, pipe: Any) -> Run:
    run = Run(name, spec_of(model), strategy, schedule, strict, pipe)
    modules = dict(attentions(model))
    for path, module in modules.items():
        module.__dict__["_diffsparse"] = run.add_layer(path)
        _adopt(module)
    run.pre_hook = model.register_forward_pre_hook(_Watch(model, run, list(modules.values())), with_kwargs=True)
    beacon = torch.nn.Module()
    model.add_module(BEACON, beacon)
    HookRegistry.check_if_exists_or_initialize(beacon).register_hook(run, BEACON)
    _forget_registries(model)
    return run


class _Watch:
    """Before each forward pass: reads the token grid, and adopts processors that were replaced since the last."""

    def __init__(self, model: torch.nn.Module, run: Run, modules: list[torch.nn.Module]) -> None:
        self.run, self.modules, self.model = run, modules, type(model).__name__
        self.patch, self.names = patch_of(model), argument_names(model)

    def __call__(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling():
            self.run.begin_compiled(self.run.spec.grid(self.patch, inputs))
        else:
            self._begin(inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, inputs: dict[str, Any]) -> None:
        self.run.grid = self.run.spec.grid(self.patch, inputs).grid()
        self.run.notice_idleness(self.model)
        for module in self.modules:
            _adopt(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model is not applied: nobody watches it."""
        return _nobody


# `torch.compile(model)` runs hooks ahead of its graph, where a frame of Dynamo's would be one more graph for each size;
# within a larger graph the hook is traced with the rest.
skip_code(_Watch.__call__.__code__)


def _nobody(*_: Any) -> None:
    """The watch of a copied model."""


def _adopt(module: Any) -> None:
    """Adopt the module's processor unless that is done, and pin its backend, remembering the user's."""
    processor, layer = module.processor, module.__dict__["_diffsparse"]
    cls = type(processor)
    if not hasattr(cls, "_diffsparse_original"):
        processor.__class__ = _adopted(cls)  # type: ignore[arg-type]
    if not hasattr(processor, "_attention_backend"):
        return
    state = processor.__dict__
    if state.get("_attention_backend") is not _NATIVE or "_diffsparse_backend" not in state:
        own = "_attention_backend" in state
        state["_diffsparse_backend"] = (own, processor._attention_backend)
        state["_attention_backend"] = _NATIVE
    layer.dispatches, layer.backend = True, state["_diffsparse_backend"][1]


def _release(module: Any) -> None:
    module.__dict__.pop("_diffsparse", None)
    processor = module.processor
    processor.__class__ = getattr(type(processor), "_diffsparse_original", type(processor))
    pinned = processor.__dict__.pop("_diffsparse_backend", None)
    if pinned is None:
        return
    own, backend = pinned
    del processor.__dict__["_attention_backend"]
    if own:
        processor.__dict__["_attention_backend"] = backend


def run_of(model: torch.nn.Module) -> Run | None:
    """The state of an applied or guided transformer; None of an untouched one."""
    registry = getattr(model._modules.get(BEACON), "_diffusers_hook", None)
    run = registry.get_hook(BEACON) if registry is not None else None
    return run if isinstance(run, Run) else None


def _forget_registries(model: torch.nn.Module) -> None:
    """Diffusers remembers which modules have hooks, from release to release in another way; let it look again."""
    registry: Any = getattr(model, "_diffusers_hook", None)
    if hasattr(registry, "_child_registries_cache"):
        registry._child_registries_cache = None


def _remove(model: torch.nn.Module) -> None:
    run = run_of(model)
    if run is None:
        return
    if run.pre_hook is not None:  # a copy has none
        run.pre_hook.remove()
    del model._modules[BEACON]
    _forget_registries(model)
    for _, module in attentions(model):
        _release(module)
