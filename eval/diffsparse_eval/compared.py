"""What is compared: strategies, with or without head guidance, and their names in reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import diffsparse
from diffsparse import Dense, Handle, Preset, Schedule
from diffsparse.strategies import SEARCHES, Compensated, Rounded, Strategy, as_strategy, knobs_of, name_of
from diffsparse.strategies.base import as_given
from diffsparse.strategies.planned import Planned

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_HEADS = "+heads"  # after the name of a strategy that runs under head guidance


@dataclass(frozen=True)
class Guided:
    """A strategy, and head guidance on top of it."""

    strategy: Strategy
    preset: Preset


Compared = Strategy | Guided


def guided(compared: Iterable[Strategy], preset: Preset) -> tuple[Compared, ...]:
    """The strategies, and dense and each of them once more under head guidance."""
    compared = tuple(compared)
    return *compared, *(Guided(strategy, preset) for strategy in dict.fromkeys((Dense(), *compared)))


@contextmanager
def applied(pipe: DiffusionPipeline, compared: Compared, schedule: Schedule, strict: bool = False) -> Iterator[Handle]:
    """Within: the pipeline runs by a strategy, or by one under head guidance."""
    with ExitStack() as stack:
        strategy = compared.strategy if isinstance(compared, Guided) else compared
        handle = stack.enter_context(diffsparse.apply(pipe, strategy, schedule=schedule, strict=strict))
        if isinstance(compared, Guided):
            stack.enter_context(diffsparse.guide(pipe, compared.preset))
        yield handle


def sparsity_of(compared: Compared) -> float | None:
    """Share of the blocks to drop; None if that is not known beforehand."""
    strategy = compared.strategy if isinstance(compared, Guided) else compared
    return 0.0 if strategy == Dense() else as_strategy(strategy).sparsity


def strategy_name(compared: Compared) -> str:
    """The strategy's name: `adaspa`, `random+means`, `digest+heads`."""
    return f"{name_of(compared.strategy)}{_HEADS}" if isinstance(compared, Guided) else name_of(compared)


def label(compared: Compared) -> str:
    """Name, sparsity and what else differs from the defaults: `adaspa 0.8 order=tile4x4x4`, `random 0.8 +means`."""
    if isinstance(compared, Compensated):
        return f"{label(compared.strategy)} +{compared.by}"
    if isinstance(compared, Rounded):
        return f"{label(compared.strategy)} +{compared.precision}"
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
