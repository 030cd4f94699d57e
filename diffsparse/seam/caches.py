"""Step caches on a transformer, of Diffusers and of cache-dit: which steps they leave to its attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.nn import Module

from diffsparse.seam.copies import registry_of


class Passes(NamedTuple):
    """The forward passes of one guidance branch in a run.

    Attributes:
        steps: of the run.
        branches: passes in a step.
        branch: number of this one among them.
        timesteps: of the steps; None if they are not known.
    """

    steps: int
    branches: int = 1
    branch: int = 0
    timesteps: tuple[float, ...] | None = None


Rule = Callable[[Any, Passes], Collection[int] | None]


@dataclass(frozen=True)
class StepCache:
    """A step cache as one attention layer meets it.

    Attributes:
        name: for people.
        hook: what decides.
        rule: which steps reach the layer, where that does not depend on what is computed; else None.
        warm_up: steps that it computes at the start to extrapolate from.
        is_wide: it spares the whole block, not the attention alone.
    """

    name: str
    hook: object = None
    rule: Rule | None = None
    warm_up: int = 0
    is_wide: bool = True

    @property
    def counts_branches(self) -> bool:
        """Whether `executed` wants to know all passes of a step, and the timesteps; else a branch is by itself."""
        return self.rule is _broadcast_steps

    def reads(self, timestep: float) -> bool:
        """Whether it is told that timestep now: Mochi tells 1000 less the scheduler's."""
        return float(self.hook.current_timestep_callback()) == timestep  # type: ignore[attr-defined]

    def executed(self, passes: Passes) -> Collection[int] | None:
        """The steps that reach the layer; None if the cache decides as it goes."""
        return None if self.rule is None else self.rule(self.hook, passes)


def around(model: Module, modules: Iterable[Module]) -> list[tuple[Module, ...]]:
    """For each of some modules of a model: itself and all that it is part of, from the inside."""
    parents = {child: parent for parent in model.modules() for child in parent.children()}

    def chain(module: Module) -> tuple[Module, ...]:
        return (module, *chain(parents[module])) if module in parents else (module,)

    return [chain(module) for module in modules]


def cache_on(chain: tuple[Module, ...]) -> StepCache | None:
    """The step cache that a layer meets, from the layer's module and those around it; None if there is none."""
    for place, module in enumerate(chain):
        registry = registry_of(module)
        for hook in () if registry is None else registry.hooks.values():
            if (kind := _KINDS.get(type(hook).__name__)) is not None:
                return StepCache(kind.name, hook, kind.rule, kind.warm_up(hook), place > 0)
    return StepCache("cache-dit") if getattr(chain[-1], "_is_cached", False) else None


class Outlook(NamedTuple):
    """What a step cache leaves of an attention layer in a run.

    Attributes:
        executed: steps that reach it, 0-based; all of them where the cache decides as it goes.
        is_known: whether it does not.
        warm_up: as in `StepCache`.
        is_wide: as in `StepCache`.
    """

    executed: tuple[int, ...]
    is_known: bool = True
    warm_up: int = 0
    is_wide: bool = True


def outlook(model: Module, modules: Iterable[Module], passes: Passes) -> list[Outlook]:
    """What step caches will leave of some attention modules of a model."""
    return [_outlook(cache_on(chain), passes) for chain in around(model, modules)]


def _outlook(cache: StepCache | None, passes: Passes) -> Outlook:
    if cache is None:
        return Outlook(tuple(range(passes.steps)))
    steps = cache.executed(passes)
    found = tuple(range(passes.steps) if steps is None else sorted(steps))
    return Outlook(found, steps is not None, cache.warm_up, cache.is_wide)


def is_cached(model: Module | None) -> bool:
    """Whether a step cache is on, whatever it skips."""
    return any(getattr(model, name, False) for name in ("is_cache_enabled", "_is_cached"))


def _taylor_steps(hook: Any, run: Passes) -> Collection[int]:
    first, last, interval = hook.disable_cache_before_step, hook.disable_cache_after_step, hook.cache_interval
    end = run.steps if last is None else last
    return [s for s in range(run.steps) if s < first or s >= end or (s - first - 1) % interval == 0]


def _broadcast_steps(hook: Any, run: Passes) -> Collection[int] | None:
    """Pyramid Attention Broadcast knows no guidance branches: it counts all passes of a module."""
    if run.timesteps is None:
        return None
    low, high = hook.timestep_skip_range
    passes = ((s, s * run.branches + run.branch) for s in range(run.steps))
    within = [low < t < high for t in run.timesteps]
    return [s for s, number in passes if not within[s] or number % hook.block_skip_range == 0]


def _magnitude_steps(hook: Any, run: Passes) -> Collection[int]:
    """In the precision of its ratios, for an error may meet the threshold to the last bit."""
    config, executed = hook.config, []
    for step in range(run.steps):
        number = step % config.num_inference_steps  # it starts over
        if number == 0:
            ratio, error, skipped = 1.0, 0.0, 0
        if not config.calibrate and number >= _retained(config):
            ratio = ratio * config.mag_ratios[number]
            error, skipped = error + abs(1.0 - ratio), skipped + 1
            if number and error <= config.threshold and skipped <= config.max_skip_steps:
                continue
            ratio, error, skipped = 1.0, 0.0, 0
        executed.append(step)
    return executed


def _retained(config: Any) -> int:
    return int(config.retention_ratio * config.num_inference_steps + 0.5)


class _Kind(NamedTuple):
    name: str
    rule: Rule | None = None
    warm_up: Callable[[Any], int] = lambda hook: 0


_KINDS = {
    "TaylorSeerCacheHook": _Kind("TaylorSeer", _taylor_steps, lambda hook: int(hook.disable_cache_before_step)),
    "PyramidAttentionBroadcastHook": _Kind("PyramidAttentionBroadcast", _broadcast_steps),
    "MagCacheHeadHook": _Kind("MagCache", _magnitude_steps),
    "MagCacheBlockHook": _Kind("MagCache", _magnitude_steps),
    "FBCHeadBlockHook": _Kind("FirstBlockCache", lambda hook, run: range(run.steps)),
    "FBCBlockHook": _Kind("FirstBlockCache"),
    "FasterCacheBlockHook": _Kind("FasterCache"),
    "SeaCacheLeaderBlockHook": _Kind("SeaCache"),
    "SeaCacheBlockHook": _Kind("SeaCache"),
}
