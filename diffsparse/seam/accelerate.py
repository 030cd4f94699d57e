"""The one line: a step cache and sparse attention on top of it, with settings that were measured."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from diffsparse.errors import ConfigError, UnknownNameError
from diffsparse.schedule import Schedule
from diffsparse.seam.caching import CACHES, Caching, caches_of, put_on
from diffsparse.seam.patch import Handle, apply
from diffsparse.seam.targets import models_of
from diffsparse.strategies import knobs_of
from diffsparse.strategies.base import Attending, Strategy
from diffsparse.strategies.digest import Digest
from diffsparse.strategies.tangent import Tangent

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_DEFAULT = "taylor-seer"
_FEW_STEPS = 10  # with the first three computed there is too little left for a cache to spare


@dataclass(frozen=True)
class Speed:
    """Settings of one speed.

    interval: steps from one that is computed to the next; TaylorSeer extrapolates those between.
    order: of the extrapolation.
    warm_up: steps that are computed at the start, with dense attention.
    strategy: of the others that are computed.
    """

    interval: int
    order: int
    warm_up: int
    strategy: Strategy


# Measured on the embedded model (docs/stack.md says how): 2.1, 2.4 and 3 times as fast as dense.
SPEEDS: dict[str, Speed] = {
    "quality": Speed(2, 1, 3, Digest(0.7)),
    "balanced": Speed(2, 1, 3, Digest(0.8)),
    "fast": Speed(3, 1, 3, Digest(0.8)),
}


def accelerate(
    target: DiffusionPipeline | Module,
    speed: str = "balanced",
    *,
    cache: object = _DEFAULT,
    strategy: Strategy | Attending | None = None,
    schedule: Schedule | None = None,
    steps: int | None = None,
    strict: bool = False,
    **knobs: object,
) -> Handle:
    """Make a pipeline fast in one line: a step cache, and sparse attention in the steps that it leaves.

    >>> with diffsparse.accelerate(pipe, "fast") as fast:  # doctest: +SKIP
    ...     video = pipe(prompt).frames[0]

    A cache that is on already stays as it is, also afterwards. Runs of few steps get sparse attention alone.

    Args:
        target: a Diffusers pipeline (all its transformers are taken), or a transformer.
        speed: "quality", "balanced" or "fast".
        cache: a name with knobs such as "first-block:threshold=0.1" (`diffsparse.seam.caching.CACHES`), or a
            configuration of Diffusers; None for none.
        strategy: in place of that of the speed.
        schedule: steps and layers that stay dense; by default those from which the cache extrapolates.
        steps: of the run; by default those of the pipeline's own call.
        strict: as in `apply`.
        knobs: of the strategy (`sparsity`, `block`, `probes`, ...) and of the cache (`interval`, `warm_up`, ...).

    Returns:
        A handle: `report()`, and `remove()`, which takes off both.

    Raises:
        UnknownNameError: no such speed or cache. ConfigError: no such knob, or a value out of range.
        UnsupportedModelError: nothing to redirect, or no cache is proven for such a transformer, or the one that is
            given has nothing to skip in it.
    """
    if speed not in SPEEDS:
        raise UnknownNameError(f"no speed is called {speed!r}; known: {', '.join(SPEEDS)}")
    models = models_of(target)
    present, few = list(caches_of(models)), _is_short(target, steps)
    spared = present or (few and cache == _DEFAULT)
    chosen = None if spared else _cache(cache, SPEEDS[speed], knobs)
    asked = _strategy(strategy, SPEEDS[speed], few, knobs)
    if knobs:
        known = {*knobs_of(type(asked)), *(CACHES[chosen.name].short if isinstance(chosen, Caching) else ())}
        raise ConfigError(f"accelerate has no {', '.join(knobs)} here; it has {', '.join(sorted(known))}")
    pipe = None if isinstance(target, Module) else target
    handle = apply(target, asked, schedule=schedule, strict=strict)
    if chosen is not None:
        handle.also(lambda model: put_on(model, chosen.config(model, pipe) if isinstance(chosen, Caching) else chosen))
    handle.note(_told(chosen, present))
    return handle


def _told(chosen: object, present: list[str]) -> str:
    if present:
        return f"{', '.join(present)} was on already and stays as it is"
    return "no step cache" if chosen is None else f"step cache: {chosen}"


def _is_short(target: DiffusionPipeline | Module, steps: int | None) -> bool:
    """Whether runs have few steps; their number is that of the pipeline's call, if it is not given."""
    if steps is None and not isinstance(target, Module):
        default = inspect.signature(type(target).__call__).parameters.get("num_inference_steps")
        steps = default.default if default is not None and isinstance(default.default, int) else None
    return steps is not None and steps < _FEW_STEPS


def _cache(cache: object, speed: Speed, knobs: dict[str, object]) -> object:
    """The cache with its knobs, which are taken out of `knobs`."""
    if isinstance(cache, str):
        cache = Caching.parse(cache)
    if not isinstance(cache, Caching):
        return cache
    named = cache
    own = {name: getattr(speed, name) for name in CACHES[named.name].short if hasattr(speed, name)}
    mine = {name: knobs.pop(name) for name in list(knobs) if name in CACHES[named.name].short}
    return Caching(named.name, **{**own, **dict(named.knobs), **mine})


def _strategy(
    given: Strategy | Attending | None, speed: Speed, few: bool, knobs: dict[str, object]
) -> Strategy | Attending:
    """The strategy with its knobs, which are taken out of `knobs`."""
    if given is not None:
        return given
    strategy = speed.strategy
    if few:
        strategy = Tangent(strategy.sparsity or 0.8)
    own = {knob.name for knob in fields(strategy)}  # type: ignore[arg-type]
    mine: dict[str, Any] = {name: knobs.pop(name) for name in list(knobs) if name in own}
    return replace(strategy, **mine)  # type: ignore[type-var]
