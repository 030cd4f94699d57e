"""The one line: a step cache and sparse attention on top of it, with settings that were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch.nn import Module

from diffsparse.errors import ConfigError, UnknownNameError
from diffsparse.schedule import Schedule
from diffsparse.seam.added import caches_of, checked, stacked
from diffsparse.seam.caching import CACHES, Caching
from diffsparse.seam.patch import Handle
from diffsparse.seam.targets import models_of
from diffsparse.strategies import knobs_of
from diffsparse.strategies.base import Attending, Strategy
from diffsparse.strategies.digest import Digest
from diffsparse.strategies.tangent import Tangent

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Speed(NamedTuple):
    """Settings of one speed: a step cache, and the strategy of the steps that it leaves.

    Attributes:
        cache: the step cache.
        strategy: its class.
        sparsity: of the strategy.
    """

    cache: Caching
    strategy: type[Tangent]
    sparsity: float


# Measured on the embedded model, twelve prompts with and without classifier-free guidance: docs/stack.md.
SPEEDS: dict[str, Speed] = {
    "quality": Speed(Caching("taylor-seer", interval=2, order=1, warm_up=0.45), Digest, 0.8),
    "balanced": Speed(Caching("taylor-seer", interval=3, order=1, warm_up=0.45), Tangent, 0.8),
    "fast": Speed(Caching("taylor-seer", interval=4, order=1, warm_up=0.33), Tangent, 0.8),
}


def accelerate(
    target: DiffusionPipeline | Module,
    speed: str = "balanced",
    *,
    cache: object = "taylor-seer",
    strategy: Strategy | Attending | None = None,
    schedule: Schedule | None = None,
    strict: bool = False,
    **knobs: object,
) -> Handle:
    """Make a pipeline fast in one line: a step cache, and sparse attention in the steps that it leaves.

    A cache that is on already stays as it is, also afterwards. With the cache of a speed, a run of fewer than ten
    steps skips none.

    Args:
        target: a Diffusers pipeline (all its transformers are taken), or a transformer.
        speed: "quality", "balanced" or "fast".
        cache: a name with knobs such as "first-block:threshold=0.1" (`diffsparse.seam.caching.CACHES`), or a
            configuration of Diffusers; None for none.
        strategy: in place of that of the speed.
        schedule: steps and layers that stay dense; by default the first fifth of the run.
        strict: as in `apply`.
        **knobs: of the strategy (`sparsity`, `block`, `probes`, ...) and of the cache (`interval`, `warm_up`, ...).
            What both have is the strategy's: `order` is that of the tokens, TaylorSeer's is `max_order`.

    Returns:
        A handle with `report()`; its `remove()` takes off both.

    Raises:
        UnknownNameError: no such speed or cache.
        ConfigError: no such knob, or a value out of range.
        UnsupportedModelError: nothing to redirect, or no cache is proven for such a transformer, or the one that is
            given has nothing to skip in it.

    Examples:
        >>> from diffsparse import accelerate
        >>> with accelerate(pipe, "fast", sparsity=0.7) as fast:
        ...     video = pipe("a red ball").frames[0]
    """
    if speed not in SPEEDS:
        raise UnknownNameError(f"no speed is called {speed!r}; known: {', '.join(SPEEDS)}")
    present = list(caches_of(models_of(target)))
    asked = _made(SPEEDS[speed], knobs) if strategy is None else strategy
    chosen = None if present else _cache(cache, SPEEDS[speed].cache, knobs)
    if knobs:
        known = {*knobs_of(type(asked)), *(CACHES[chosen.name].short if isinstance(chosen, Caching) else ())}
        raise ConfigError(f"accelerate has no {', '.join(knobs)} here; it has {', '.join(sorted(known))}")
    if isinstance(chosen, Caching):  # before anything that is on is taken off
        for model in models_of(target).values():
            chosen.config(model)
    handle = stacked(target, asked, chosen, schedule=schedule, strict=strict)
    handle.note(_told(chosen, present))
    return handle


def _told(chosen: object, present: list[str]) -> str:
    if present:
        return f"{', '.join(present)} was on already and stays as it is"
    return "no step cache" if chosen is None else f"step cache: {chosen}"


def _cache(cache: object, speed: Caching, knobs: dict[str, object]) -> object:
    """The cache with its knobs, which are taken out of `knobs`."""
    named = Caching.parse(cache) if isinstance(cache, str) else cache
    if not isinstance(named, Caching):
        return None if cache is None else checked(cache)
    own, short = dict(speed.knobs) if named.name == speed.name else {}, CACHES[named.name].short
    mine = {name: knobs.pop(name) for name in list(knobs) if name in {*short, *short.values()}}
    return Caching(named.name, **{**own, **dict(named.knobs), **mine})


def _made(speed: Speed, knobs: dict[str, Any]) -> Strategy:
    """The strategy with its knobs, which are taken out of `knobs`."""
    mine = {name: knobs.pop(name) for name in list(knobs) if name in knobs_of(speed.strategy)}
    return speed.strategy(**{"sparsity": speed.sparsity, **mine})
