"""A step cache that is put on a transformer beside sparse attention: kept in time with its runs, and taken off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers.hooks.hooks import CacheContext
from torch.nn import Module

from diffsparse.errors import ConfigError, UnsupportedModelError
from diffsparse.schedule import Schedule
from diffsparse.seam.caches import around, cache_on, is_cached
from diffsparse.seam.caching import CACHES, Caching, first_steps
from diffsparse.seam.clock import Ahead, set_context
from diffsparse.seam.copies import REGISTRY, registry_of
from diffsparse.seam.hooks import HOOK, run_of
from diffsparse.seam.patch import Handle, apply
from diffsparse.seam.run import Run
from diffsparse.seam.targets import attentions, entrances_of
from diffsparse.strategies.base import Attending, Strategy
from diffsparse.wrappers import class_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.hooks import HookRegistry

_TAYLOR = "taylorseer_cache"
_FEW_STEPS = 10  # of a run: with a warm-up there is too little left to skip


class Added:
    """A cache that was enabled on a model; calling it takes that off, if it still is on, with all that it left.

    Raises:
        UnsupportedModelError: the cache is not for such a model, which is left as it was.
    """

    def __init__(self, model: Any, config: Any, warm_up: float | None = None, experts: int = 1) -> None:
        self.model, self.config, self._warm_up, self._experts = model, config, warm_up, experts
        self._fitted: int | None = None  # steps of a run
        self._before = [(module, _names(module), _hooks(module)) for module in model.modules()]
        try:
            model.enable_cache(config)
        except Exception as error:  # Diffusers checks little: what a value does not fit may raise anything
            self._put = self._new()
            self._clear()
            raise UnsupportedModelError(
                f"{type(config).__name__} is not for {class_of(model).__name__}: {error}"
            ) from error
        self._put = self._new()

    @property
    def is_on(self) -> bool:
        """Whether nobody has taken it off or put another in its place."""
        return self.model._cache_config is self.config

    def fit(self, steps: int) -> None:
        """A run has so many steps: a warm-up that is a share takes its part of them, and short runs are all of it.

        Each of a pipeline's experts counts its own steps, of which it has its part.
        """
        if self._warm_up is None or steps == self._fitted or not self.is_on:
            return
        self._fitted = steps
        first = steps if steps < _FEW_STEPS else first_steps(self._warm_up, steps // self._experts)
        for _, registry in self._registries():
            if (hook := registry.get_hook(_TAYLOR)) is not None:
                hook.disable_cache_before_step = first

    @property
    def note(self) -> str:
        """What the user should know about the latest run; empty if there is nothing."""
        if self._fitted is None or self._fitted >= _FEW_STEPS:
            return ""
        return (
            f"the step cache skips nothing in a run of {self._fitted} steps: with a warm_up that is a share of the "
            f"steps, runs of fewer than {_FEW_STEPS} are computed whole; a warm_up in steps (int) holds in any run"
        )

    def begin(self, ahead: Ahead) -> None:
        """A forward pass begins: the cache forgets an earlier run, which may have been cut off, and learns the branch.

        Raises:
            ConfigError: nothing says in which guidance branch the pass is.
        """
        if ahead.steps is not None:
            self.fit(ahead.steps)
        if ahead.is_first:
            self.reset()
        if ahead.branch is None:
            return
        if ahead.branch == "" and self.is_on:
            raise ConfigError(
                f"{type(self.config).__name__} wants to know the guidance branch of a pass outside of a pipeline: run "
                f"it within `with model.cache_context(name)`, or accelerate without a cache"
            )
        set_context(self.model, CacheContext(ahead.branch) if self.is_on and ahead.branch else None)

    def reset(self) -> None:
        """Forget the current run; a context that a pass has entered stays."""
        for module, registry in self._registries() if self.is_on else ():
            for name, hook in registry.hooks.items():
                if name == HOOK or not hook._is_stateful:
                    continue
                managers = [each for each in vars(hook).values() if hasattr(each, "set_context")]
                contexts = [manager._context for manager in managers]
                hook.reset_state(module)
                for manager, context in zip(managers, contexts, strict=True):
                    manager.set_context(context)

    def _registries(self) -> Iterator[tuple[Module, HookRegistry]]:
        for module, _, _ in self._before:
            if (registry := registry_of(module)) is not None:
                yield module, registry

    def _new(self) -> list[set[str]]:
        """The hooks of each module that it has put there; what comes later is of the user."""
        return [_hooks(module) - hooks - {HOOK} for module, _, hooks in self._before]

    def __call__(self) -> None:
        """Take it off, or what is left of it where the user did."""
        if self.is_on:
            self.model.disable_cache()
        if self.model._cache_config is None:
            self._clear()

    def _clear(self) -> None:
        """Take away its hooks, and registries and names that were not there."""
        for (module, names, _), put in zip(self._before, self._put, strict=True):
            registry = registry_of(module)
            if registry is not None:
                for name in put & registry.hooks.keys():
                    registry.remove_hook(name, recurse=False)
            _tidy(module, names)


def put_on(model: Any, cache: object, pipe: DiffusionPipeline | None = None) -> Added:
    """Enable a cache, a `Caching` or a configuration, and return what takes it off and leaves the model as it was.

    Raises:
        UnsupportedModelError: the class takes no such cache, or the cache has nothing to skip in it.
        ConfigError: it is no cache, or wants what it was not given.
    """
    if not hasattr(model, "enable_cache"):
        raise UnsupportedModelError(
            f"{class_of(model).__name__} takes no step cache of Diffusers; give None as `cache` to go without one"
        )
    if isinstance(cache, Caching):
        experts = 1 if pipe is None else len(entrances_of(pipe))
        added = Added(model, cache.config(model, lambda: _timestep(model)), cache.warm_up, experts)
    else:
        added = Added(model, checked(cache))
    if not any(map(cache_on, around(model, [module for _, module in attentions(model)]))):
        added()
        raise UnsupportedModelError(
            f"{type(added.config).__name__} skips nothing of {class_of(model).__name__}: its patterns fit no module "
            "there. Leave `cache` out for patterns that do"
        )
    return added


def stacked(
    target: DiffusionPipeline | Module,
    strategy: Strategy | Attending,
    cache: object,
    *,
    schedule: Schedule | None = None,
    strict: bool = False,
) -> Handle:
    """`apply`, and a cache on top of it unless that is None: one handle takes off both.

    Raises:
        UnsupportedModelError, ConfigError: as `apply` and `put_on`; both are off then.
    """
    pipe = None if isinstance(target, Module) else target
    handle = apply(target, strategy, schedule=schedule, strict=strict)
    if cache is not None:
        handle.also(lambda model: put_on(model, cache, pipe))
        handle.cache = cache
    return handle


def checked(cache: object) -> object:
    """A configuration of a step cache.

    Raises:
        ConfigError: it is none.
    """
    kinds = tuple(getattr(diffusers, kind.config) for kind in CACHES.values() if hasattr(diffusers, kind.config))
    if not isinstance(cache, kinds):
        names = ", ".join(CACHES)
        raise ConfigError(f"cache wants None, a name ({names}) or a configuration of Diffusers; got {cache!r}")
    return cache


def _timestep(model: Module) -> object:
    """That of the pipeline that runs the model now."""
    run = run_of(model)
    found = getattr(None if run is None else run.clock.pipe, "_current_timestep", None)
    if found is None:
        raise ConfigError("this step cache asks for the timestep, which a pipeline tells: accelerate the pipeline")
    return found


def prepare(model: Module, steps: int) -> None:
    """A run of `steps` is about to be estimated."""
    run = run_of(model)
    if run is not None and isinstance(run.added, Added):
        run.added.fit(steps)


def _names(module: Module) -> set[str]:
    """What the object has of its own, without a registry of hooks that is there for ours alone."""
    registry = registry_of(module)
    ours = None if registry is None else registry.get_hook(HOOK)
    return set(module.__dict__) - ({REGISTRY} if isinstance(ours, Run) and ours.made_registry else set())


def _hooks(module: Module) -> set[str]:
    registry = registry_of(module)
    return set() if registry is None else set(registry.hooks)


def _tidy(module: Module, names: set[str]) -> None:
    """Diffusers leaves empty registries, methods bound to the object, and a configuration that is None."""
    registry, own = registry_of(module), module.__dict__.get("forward")
    left = {"_cache_config"}
    if getattr(own, "__func__", None) is type(module).forward:  # whatever else is there has been put there by others
        left.add("forward")
    if registry is not None and not registry.hooks:
        left.add(REGISTRY)
    for name in left - names:
        module.__dict__.pop(name, None)


def caches_of(models: dict[str, Module]) -> Iterator[str]:
    """Names of the step caches that transformers have of the user, also of those that skip nothing."""
    for model in models.values():
        run = run_of(model)
        if run is not None and isinstance(run.added, Added) and run.added.is_on:
            continue
        chains = around(model, [module for _, module in attentions(model)])
        found = [cache.name for chain in chains if (cache := cache_on(chain)) is not None]
        if not found and is_cached(model):
            found = [type(getattr(model, "_cache_config", None)).__name__]
        yield from dict.fromkeys(found)
