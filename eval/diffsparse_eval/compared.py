"""What is compared: strategies, with or without a step cache and head guidance, and their names in reports."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING

import diffsparse
from diffsparse import Dense, Handle, Preset, Schedule
from diffsparse.seam.added import stacked
from diffsparse.seam.caching import Caching
from diffsparse.strategies import SEARCHES, Compensated, Rounded, Strategy, as_strategy, knobs_of, name_of
from diffsparse.strategies.base import as_given
from diffsparse.strategies.planned import Planned

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_HEADS = "+heads"  # after the name of a strategy that runs under head guidance


@dataclass(frozen=True)
class Cached:
    """A strategy in the steps that a step cache leaves."""

    cache: Caching
    strategy: Strategy


@dataclass(frozen=True)
class Guided:
    """A strategy, and head guidance on top of it."""

    strategy: Strategy | Cached
    preset: Preset


Compared = Strategy | Cached | Guided


def compared(stacks: Iterable[tuple[Caching | None, Strategy]]) -> tuple[Strategy | Cached, ...]:
    """Strategies, those with a step cache on top of it."""
    return tuple(strategy if cache is None else Cached(cache, strategy) for cache, strategy in stacks)


def guided(compared: Iterable[Strategy | Cached], preset: Preset) -> tuple[Compared, ...]:
    """The strategies, and dense and each of them once more under head guidance."""
    compared = tuple(compared)
    return *compared, *(Guided(strategy, preset) for strategy in dict.fromkeys((Dense(), *compared)))


@contextmanager
def applied(pipe: DiffusionPipeline, compared: Compared, schedule: Schedule, strict: bool = False) -> Iterator[Handle]:
    """Within: the pipeline runs by a strategy, or by one under head guidance."""
    with ExitStack() as stack:
        strategy, cache = _parts(compared)
        handle = stack.enter_context(stacked(pipe, strategy, cache, schedule=schedule, strict=strict))
        if isinstance(compared, Guided):
            stack.enter_context(diffsparse.guide(pipe, compared.preset))
        yield handle


def _parts(compared: Compared) -> tuple[Strategy, Caching | None]:
    """The strategy and the step cache."""
    inner = compared.strategy if isinstance(compared, Guided) else compared
    return (inner.strategy, inner.cache) if isinstance(inner, Cached) else (inner, None)


def ready(compared: Compared, steps: int, ratios: Callable[[], list[float]]) -> Compared:
    """MagCache with the `ratios` that it wants for a run of `steps`; anything else as it is."""
    inner = compared.strategy if isinstance(compared, Guided) else compared
    if not isinstance(inner, Cached) or inner.cache.name != "mag" or "ratios" in dict(inner.cache.knobs):
        return compared
    knobs = {**dict(inner.cache.knobs), "steps": steps, "ratios": ratios()}
    cached = Cached(Caching("mag", **knobs), inner.strategy)
    return Guided(cached, compared.preset) if isinstance(compared, Guided) else cached


def magnitude_ratios(pipe: DiffusionPipeline, steps: int, generate: Callable[[], object]) -> list[float]:
    """How the norms of a model's residuals change from step to step in one run of `generate` (arXiv 2506.09045).

    MagCache prints what it finds, once for each guidance branch; the first is the conditional one.
    """
    asked, printed = Caching("mag", calibrate=True, steps=steps), io.StringIO()
    with applied(pipe, Cached(asked, Dense()), Schedule(0)), redirect_stdout(printed):
        generate()
    found: list[float] = json.loads(next(line for line in printed.getvalue().splitlines() if re.match(r"\[\d", line)))
    return found


def sparsity_of(compared: Compared) -> float | None:
    """Share of the blocks to drop; None if that is not known beforehand."""
    strategy, _ = _parts(compared)
    return 0.0 if strategy == Dense() else as_strategy(strategy).sparsity


def strategy_name(compared: Compared) -> str:
    """The strategy's name: `adaspa`, `random+means`, `digest+heads`, `taylor-seer/digest`."""
    if isinstance(compared, Guided):
        return f"{strategy_name(compared.strategy)}{_HEADS}"
    return f"{compared.cache.name}/{name_of(compared.strategy)}" if isinstance(compared, Cached) else name_of(compared)


def label(compared: Compared) -> str:
    """Name, sparsity and what else differs from the defaults: `adaspa 0.8 order=tile4x4x4`, `random 0.8 +means`."""
    if isinstance(compared, Compensated):
        return f"{label(compared.strategy)} +{compared.by}"
    if isinstance(compared, Rounded):
        return f"{label(compared.strategy)} +{compared.precision}"
    if isinstance(compared, Cached):
        return f"{compared.cache}/{label(compared.strategy)}"
    if isinstance(compared, Guided):
        preset = compared.preset
        return f"{label(compared.strategy)} {_HEADS} {preset.head_strength:g}x{preset.head_scale:g}"
    parts = [name_of(compared)]
    for knob, value, default in _knobs(compared):
        if value is None:
            continue
        if knob == "sparsity":
            parts.append(f"{value:g}")
        elif value != default:
            joint = "x" if knob == "block" else "+"
            parts.append(f"{knob}={joint.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(parts)


def _knobs(strategy: Strategy) -> Iterator[tuple[str, object, object]]:
    """Name, value and default of each knob; of a strategy that runs on a plan, those of the search that made it."""
    if isinstance(strategy, Planned):
        settings = strategy.plan.settings
        for name, default in knobs_of(SEARCHES[strategy.plan.strategy]).items():
            value = settings.get(name, default)
            yield name, tuple(value) if isinstance(value, list) else value, default
    else:
        own = as_given(strategy)
        for name, default in knobs_of(type(own)).items():
            yield name, vars(own)[name], default
