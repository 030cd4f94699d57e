"""The hooks on a transformer: around its forward passes, and in Diffusers' registry of stateful hooks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import HookFunctionReference
from torch._dynamo.eval_frame import skip_code
from torch.nn import Module

from diffsparse.schedule import Schedule
from diffsparse.seam import processors
from diffsparse.seam.caches import around, cache_on
from diffsparse.seam.compiled import untraced
from diffsparse.seam.copies import LAYER, hide_traces, registry_of, show_traces
from diffsparse.seam.models import Inputs, argument_names, patch_of, spec_of
from diffsparse.seam.parallel import shard_of
from diffsparse.seam.run import Run
from diffsparse.seam.targets import all_attentions, attentions, bound_processors
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.dense import Dense
from diffsparse.wrappers import class_of, unwrapped

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.models.attention_processor import Attention

HOOK = "diffsparse"  # name of ours in the registry


def run_of(model: Module) -> Run | None:
    """The state of an applied or guided transformer, in whatever wrapper; None of an untouched one."""
    registry = registry_of(unwrapped(model))
    run = registry.get_hook(HOOK) if registry is not None else None
    return run if isinstance(run, Run) else None


def install(
    name: str, model: Module, strategy: Strategy, schedule: Schedule, strict: bool, pipe: DiffusionPipeline | None
) -> Run:
    """Adopt the attention modules of `model` and hook its forward passes."""
    run = Run(name, spec_of(model), strategy, schedule, strict, pipe)
    modules = dict(attentions(model))
    for path, module in modules.items():
        processors.adopt(module, run.add_layer(path))
    hook = _PassHook(model, run, list(modules.values()))
    run.hooks = [model.register_forward_pre_hook(hook, with_kwargs=True), model.register_forward_hook(hook.after)]
    hide_traces(model)
    _enlist(model, run)
    if bound := bound_processors(model):
        warnings.warn(
            f"{class_of(model).__name__}: {', '.join(bound)} runs on one backend only and is left as it is, dense",
            UserWarning,
            stacklevel=3,
        )
    return run


def uninstall(model: Module) -> None:
    """Undo `install`; a model that was never touched stays as it is."""
    run = run_of(model)
    if run is None:
        return
    for hook in run.hooks:
        hook.remove()
    show_traces(model)
    _delist(model, run)
    for _, module in all_attentions(model):
        if LAYER in module.__dict__:
            processors.release(module)
    if run.added is not None:
        run.added()


def _enlist(model: Module, run: Run) -> None:
    """Enter the run in the model's registry: Diffusers then sets its context and resets it after a pipeline call.

    `register_hook` would bind `forward` to this model, for deep copies too, and a walk through the modules would meet
    the registry as a child. First in the list, the run is no link in the chain of the other hooks' forwards.
    """
    run.made_registry = registry_of(model) is None
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.hooks[HOOK] = run
    registry._hook_order.insert(0, HOOK)
    registry._fn_refs.insert(0, HookFunctionReference())


def _delist(model: Any, run: Run) -> None:
    registry = model._diffusers_hook
    place = registry._hook_order.index(HOOK)
    del registry.hooks[HOOK], registry._hook_order[place], registry._fn_refs[place]
    if run.made_registry and not registry.hooks:
        del model._diffusers_hook


class _PassHook:
    """Before each forward pass: reads the token grid, and adopts processors that the user has replaced meanwhile."""

    def __init__(self, model: Module, run: Run, modules: list[Attention]) -> None:
        self.run, self.modules, self.model = run, modules, class_of(model).__name__
        self.patch, self.names = patch_of(model), argument_names(model)
        self.chains = around(model, modules)

    def __call__(self, model: Module, args: tuple[object, ...], kwargs: Inputs) -> None:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling():
            self.run.begin_compiled(self.run.spec.grid(self.patch, inputs))
        else:
            self._begin(model, inputs)

    @untraced
    def _begin(self, model: Module, inputs: Inputs) -> None:
        run = self.run
        run.grid = run.spec.grid(self.patch, inputs).grid()
        ordered = run.guidance is not None or not isinstance(run.strategy, Dense)
        run.shard = shard_of(model, run.spec, ordered)  # parallelism may be enabled after `apply`
        run.begin_pass(lambda: [cache_on(chain) for chain in self.chains])  # so may caches
        for module in self.modules:
            processors.renew(module)

    def after(self, *_: object) -> None:
        """After a pass that ended well: one that failed says nothing about the model."""
        if not torch.compiler.is_compiling():
            self.run.warn_if_unused(self.model)


# `torch.compile(model)` runs hooks ahead of its graph, where a frame of Dynamo's would be one more graph for each size;
# within a larger graph the hooks are traced with the rest.
skip_code(_PassHook.__call__.__code__)
skip_code(_PassHook.after.__code__)
