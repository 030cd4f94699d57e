"""Put on, take off: `apply` adopts a transformer's attention processors, `remove` gives them back as they were."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.hooks import HookFunctionReference
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention, MochiAttention
from torch._dynamo import OptimizedModule
from torch._dynamo.eval_frame import skip_code
from torch.overrides import TorchFunctionMode

from diffsparse.errors import ConfigError, UnsupportedModelError
from diffsparse.schedule import Schedule
from diffsparse.seam.call import Call
from diffsparse.seam.copies import LAYER, hide_traces, show_traces
from diffsparse.seam.models import LINEAR_ATTENTION, argument_names, patch_of, spec_of
from diffsparse.seam.parallel import shard_of
from diffsparse.seam.run import Layer, Perturber, Run
from diffsparse.seam.sdpa import OWN, STAND_IN, named
from diffsparse.site.report import Report
from diffsparse.strategies.base import Attending, Strategy, as_strategy
from diffsparse.strategies.dense import Dense
from diffsparse.wrappers import class_of, plain_path, unwrapped

_HOOK = "diffsparse"  # in the model's hook registry
BARE = "transformer"  # what a transformer is called that comes without its pipeline: the name it has in most
_ATTENTION = (Attention, MochiAttention, AttentionModuleMixin)
_NATIVE = AttentionBackendName.NATIVE


class _Redirect(TorchFunctionMode):
    """Sends the attention products of one processor call to its layer. Modes are per thread, and so is this."""

    def __init__(self, layer: Layer, others: int | None) -> None:
        super().__init__()
        self.layer, self.others, self.number = layer, others, -1

    def run(self, processor: Any, *args: Any, **kwargs: Any) -> Any:
        """What `processor` makes of its arguments: its calls are seen, whatever stands under SDPA's name."""
        if F.scaled_dot_product_attention is OWN:
            with self:
                return processor(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler takes modes off torch's own functions that it no longer finds
            self.theirs = F.scaled_dot_product_attention
            with named(self._answer_traced):
                return processor(*args, **kwargs)
        with STAND_IN, self:
            return processor(*args, **kwargs)

    def _answer_traced(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with named(self.theirs):
            return self._answer(*args, **kwargs)

    def _answer(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.number += 1
        return self.layer.intercept(Call(*args, **kwargs), self.number, self.others)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is OWN or func is STAND_IN:
            return self._answer(*args, **kwargs)
        if func is torch.Tensor.unflatten:  # its super() call is what Dynamo can't inline under a mode
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


@functools.cache
def _adopted(cls: type) -> type:
    """A subclass of processor class `cls` that runs the original under a redirect."""
    original: Any = cls.__call__
    names = list(inspect.signature(original).parameters)[2:]  # after the processor and the attention module

    @functools.wraps(original)  # Attention.forward drops keyword arguments that this signature lacks
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        layer = attn.__dict__.get(LAYER)
        if layer is None:
            return original(self, attn, *args, **kwargs)
        others = _other_tokens({**dict(zip(names, args, strict=False)), **kwargs})
        redirect = _Redirect(layer, others)
        out = redirect.run(original, self, attn, *args, **kwargs)
        return layer.missed(out, others) if redirect.number < 0 else out

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        """Copies and pickles are of the original class, with the user's backend."""
        plain: Any = object.__new__(cls)
        plain.__dict__.update(self.__dict__)
        _unpin(plain)
        make, args, *rest = plain.__reduce_ex__(protocol)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle wants it to be of the class of `self`
            make, args = copyreg._reconstructor, (cls, object, None)  # type: ignore[attr-defined]
        return make, args, *rest

    namespace = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "_diffsparse_original": cls,
    }
    adopted = type(f"BlockSparse{cls.__name__}", (cls,), namespace)
    with contextlib.suppress(ValueError):  # step caches look processors up by class, where the class is known
        AttentionProcessorRegistry.register(adopted, AttentionProcessorRegistry.get(cls))
    return adopted


def _other_tokens(inputs: dict[str, Any]) -> int | None:
    """How many tokens a processor was given beside those of its queries; None: no such."""
    others = inputs.get("encoder_hidden_states")
    return None if others is None or others is inputs.get("hidden_states") else others.shape[1]


class Handle:
    """What `apply` gives back: `report()` tells what happened, `remove()` or leaving a `with` block undoes it."""

    def __init__(
        self, strategy: Strategy, models: dict[str, torch.nn.Module], runs: list[Run], notes: tuple[str, ...] = ()
    ) -> None:
        self.strategy = strategy
        self._models, self._runs, self._notes = models, runs, notes

    def report(self) -> Report:
        """Summary of the last (or running) pipeline call; empty before the first."""
        modules = sum(len(run.layers) for run in self._runs)
        report = Report.of(self.strategy, modules, [run.ledger for run in self._runs])
        return replace(report, notes=[*self._notes, *report.notes])

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


def apply(
    target: Any, strategy: Strategy | Attending, *, schedule: Schedule | None = None, strict: bool = False
) -> Handle:
    """Run the self-attention of `target` by `strategy` until the handle is removed. Applying again replaces.

    Args:
        target: a Diffusers pipeline (all its transformers are taken), or a transformer.
        strategy: any object with `attend(q, k, v, site)`, such as `AdaSpa(sparsity=0.8)`.
        schedule: steps and layers that stay dense; by default the first fifth of the steps.
        strict: raise `DenseFallbackError` where a call that should be sparse would have to run dense.

    Raises:
        UnsupportedModelError: `target` holds no attention that can be redirected.
        ConfigError: `strategy` is no strategy, or `schedule` no `Schedule`.
    """
    asked = as_strategy(strategy)
    if not isinstance(schedule, Schedule | None):
        raise ConfigError(f"schedule wants a Schedule, such as Schedule(dense_first=0.2); got {schedule!r}")
    pipe = None if isinstance(target, torch.nn.Module) else target
    models = models_of(target)
    for model in models.values():
        shard_of(model, spec_of(model), not isinstance(strategy, Dense))
    asked.check(models)
    schedule = Schedule() if schedule is None else schedule
    runs = []
    for name, model in models.items():
        guidance = getattr(run_of(model), "guidance", None)
        _remove(model)
        runs.append(_apply(name, model, asked, schedule, strict, pipe))
        _guided(runs[-1], guidance)
    return Handle(asked, models, runs, tuple(_notes_on(target)))


def remove(target: Any) -> None:
    """Undo `apply` and `guide` on a pipeline or transformer; one that was never touched stays as it is."""
    for model in models_of(target).values():
        guidance = getattr(run_of(model), "guidance", None)
        if guidance is not None:
            guidance.unhook()
        _remove(model)


def attach(name: str, model: torch.nn.Module, guidance: Perturber, pipe: Any) -> None:
    """Put `guidance` on the run of `model`, or on a dense one that is made for it."""
    model = unwrapped(model)
    shard_of(model, spec_of(model), ordered=True)
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
        _remove(unwrapped(model))


def _guided(run: Run, guidance: Perturber | None) -> None:
    run.guidance = guidance
    if guidance is not None:
        guidance.run = run


def models_of(target: Any) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline that can be applied to, by name; a bare transformer is one of its own.

    Wrappers (torch.compile, PEFT, DDP, FSDP) are looked through.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = {name: unwrapped(model) for name, model in entrances_of(target).items()}
    left_alone = {type(module.processor).__name__ for model in found.values() for module in _insisting(model)}
    found = {name: model for name, model in found.items() if _adoptable(model)}
    if not found:
        raise UnsupportedModelError(
            f"{type(target).__name__} holds no transformer whose attention can be made sparse. Wanted: a pipeline with "
            "a `transformer`, or a Diffusers transformer with scaled-dot-product self-attention (Wan, HunyuanVideo, "
            "CogVideoX, LTX, Mochi, Flux, SD3, Qwen-Image and their kin); UNets and linear attention are not supported"
            + (f", nor {', '.join(sorted(left_alone))}, which runs on one backend only" if left_alone else "")
        )
    return found


def entrances_of(target: Any) -> dict[str, torch.nn.Module]:
    """Where to hook the forward passes of a pipeline's transformers, by name.

    That is torch.compile's wrapper, if there is one: hooks of the model within would be part of its graph.
    """
    if isinstance(target, torch.nn.Module):
        found = {BARE: target}
    else:
        found = {name: module for name, module in _modules(target).items() if "transformer" in name}
    return {name: x if isinstance(x, OptimizedModule) else unwrapped(x) for name, x in found.items()}


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    parts = getattr(pipe, "components", None)
    parts = parts if isinstance(parts, dict) else {}
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def attentions(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The attention modules of a transformer that `apply` adopts, by name, in its order."""
    for name, module in _attentions(model):
        if not _insists(module.processor):
            yield plain_path(name), module


def _attentions(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    cls = class_of(model).__name__
    if cls in LINEAR_ATTENTION or "UNet" in cls:
        return
    for name, module in model.named_modules():
        if isinstance(module, _ATTENTION) and getattr(module, "processor", None) is not None:
            yield name, module


def _insists(processor: Any) -> bool:
    """Whether the processor's class asks for one backend, and so can't run on torch's SDPA (AnyFlow FAR: flex)."""
    return (
        getattr(getattr(type(processor), "_diffsparse_original", type(processor)), "_attention_backend", None)
        is not None
    )


def _insisting(model: torch.nn.Module) -> list[Any]:
    return [module for _, module in _attentions(model) if _insists(module.processor)]


def _adoptable(model: torch.nn.Module) -> bool:
    """Whether anything is left to adopt; cross-attention beside modules that are left alone doesn't count."""
    left = [type(module.processor).__name__ for _, module in attentions(model)]
    return any("Cross" not in name for name in left) if _insisting(model) else bool(left)


def _notes_on(target: Any) -> Iterator[str]:
    """What of a pipeline's attention `apply` doesn't touch, though it may look so."""
    for name, module in _modules(target).items() if not isinstance(target, torch.nn.Module) else ():
        if "controlnet" in name and any(_attentions(unwrapped(module))):
            yield f"{name} ({class_of(unwrapped(module)).__name__}) runs dense: only transformers are made sparse"


def _apply(name: str, model: torch.nn.Module, strategy: Strategy, schedule: Schedule, strict: bool, pipe: Any) -> Run:
    run = Run(name, spec_of(model), strategy, schedule, strict, pipe)
    modules = dict(attentions(model))
    for path, module in modules.items():
        module.__dict__[LAYER] = run.add_layer(path)
        hide_traces(module)
        _adopt(module)
    watch = _Watch(model, run, list(modules.values()))
    run.pre_hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    run.post_hook = model.register_forward_hook(watch.after)
    hide_traces(model)
    _enlist(model, run)
    left_alone = sorted({type(module.processor).__name__ for module in _insisting(model)})
    if left_alone:
        warnings.warn(
            f"{class_of(model).__name__}: {', '.join(left_alone)} runs on one backend only and is left as it is, dense",
            UserWarning,
            stacklevel=3,
        )
    return run


def _enlist(model: torch.nn.Module, run: Run) -> None:
    """Let Diffusers tell the run the branch and the end of a call, as it tells every stateful hook.

    `register_hook` would bind `forward` to this model, for deep copies too, and on a child of its own the registry is
    met by whoever walks the modules. First in the list, the run is no link in the chain of the others' forwards.
    """
    registry: Any = HookRegistry.check_if_exists_or_initialize(model)
    registry.hooks[_HOOK] = run
    registry._hook_order.insert(0, _HOOK)
    registry._fn_refs.insert(0, HookFunctionReference())


def _delist(model: torch.nn.Module) -> None:
    registry: Any = model._diffusers_hook
    place = registry._hook_order.index(_HOOK)
    del registry.hooks[_HOOK], registry._hook_order[place], registry._fn_refs[place]
    if not registry.hooks:
        del model._diffusers_hook


class _Watch:
    """Before each forward pass: reads the token grid, and adopts processors that were replaced since the last."""

    def __init__(self, model: torch.nn.Module, run: Run, modules: list[Any]) -> None:
        self.run, self.modules, self.model = run, modules, class_of(model).__name__
        self.patch, self.names = patch_of(model), argument_names(model)

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling():
            self.run.begin_compiled(self.run.spec.grid(self.patch, inputs))
        else:
            self._begin(model, inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        run = self.run
        run.grid = run.spec.grid(self.patch, inputs).grid()
        ordered = run.guidance is not None or not isinstance(run.strategy, Dense)
        run.shard = shard_of(model, run.spec, ordered)  # parallelism may be enabled after `apply`
        for module in self.modules:
            _adopt(module)

    def after(self, *_: Any) -> None:
        """A pass has ended well: one that fails says nothing about the model."""
        if not torch.compiler.is_compiling():
            self.run.notice_idleness(self.model)


# `torch.compile(model)` runs hooks ahead of its graph, where a frame of Dynamo's would be one more graph for each size;
# within a larger graph the hooks are traced with the rest.
skip_code(_Watch.__call__.__code__)
skip_code(_Watch.after.__code__)


def _adopt(module: Any) -> None:
    """Adopt the module's processor unless that is done, and pin its backend, remembering the user's."""
    processor, layer = module.processor, module.__dict__[LAYER]
    cls: Any = type(processor)
    if _insists(processor):
        return
    if not hasattr(cls, "_diffsparse_original"):
        processor.__class__ = _adopted(cls)
    if not hasattr(processor, "_attention_backend"):
        return
    state = processor.__dict__
    if state.get("_attention_backend") is not _NATIVE or "_diffsparse_backend" not in state:
        own = "_attention_backend" in state
        state["_diffsparse_backend"] = (own, processor._attention_backend)
        state["_attention_backend"] = _NATIVE
    layer.dispatches, layer.backend = True, state["_diffsparse_backend"][1]


def _release(module: Any) -> None:
    module.__dict__.pop(LAYER, None)
    show_traces(module)
    processor = module.processor
    processor.__class__ = getattr(type(processor), "_diffsparse_original", type(processor))
    _unpin(processor)


def _unpin(processor: Any) -> None:
    """Give the user's backend back."""
    pinned = processor.__dict__.pop("_diffsparse_backend", None)
    if pinned is None:
        return
    own, backend = pinned
    del processor.__dict__["_attention_backend"]
    if own:
        processor.__dict__["_attention_backend"] = backend


def run_of(model: torch.nn.Module) -> Run | None:
    """The state of an applied or guided transformer, in whatever wrapper; None of an untouched one."""
    registry = unwrapped(model).__dict__.get("_diffusers_hook")
    run = registry.get_hook(_HOOK) if registry is not None else None
    return run if isinstance(run, Run) else None


def _remove(model: torch.nn.Module) -> None:
    run = run_of(model)
    if run is None:
        return
    for hook in run.pre_hook, run.post_hook:
        hook.remove()
    show_traces(model)
    _delist(model)
    for _, module in _attentions(model):
        if LAYER in module.__dict__:
            _release(module)
