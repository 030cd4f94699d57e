"""One file for each paper: what to compute, written as the paper writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from inspect import signature
from typing import Any, TypeVar

from diffsparse.errors import ConfigError, UnknownNameError, closest
from diffsparse.plans.plan import Plan
from diffsparse.strategies.adaspa import AdaSpa
from diffsparse.strategies.base import Strategy, as_given, as_strategy
from diffsparse.strategies.compensated import WAYS, Compensated
from diffsparse.strategies.dense import Dense
from diffsparse.strategies.digest import Digest
from diffsparse.strategies.gna import GNA
from diffsparse.strategies.paro import PARO, PAROSearch
from diffsparse.strategies.planned import Planned
from diffsparse.strategies.random import Random
from diffsparse.strategies.rivals import PISA, SVGEAR, DiTFastAttn, SolAttn
from diffsparse.strategies.rounded import Rounded
from diffsparse.strategies.search import Search
from diffsparse.strategies.sparse_vdit import SparseVDiT, SparseVDiTSearch
from diffsparse.strategies.tangent import Tangent
from diffsparse_kernels import PRECISIONS

__all__ = [
    "GNA",
    "PARO",
    "SEARCHES",
    "STRATEGIES",
    "AdaSpa",
    "Compensated",
    "Dense",
    "Digest",
    "Random",
    "Rounded",
    "SparseVDiT",
    "Strategy",
    "Tangent",
    "as_strategy",
    "knobs_of",
    "name_of",
    "of_plan",
    "parse",
    "with_knobs",
]


T = TypeVar("T")

STRATEGIES: dict[str, type[Strategy]] = {
    "adaspa": AdaSpa,
    "dense": Dense,
    "digest": Digest,
    "dit-fast": DiTFastAttn,
    "gna": GNA,
    "paro": PARO,
    "pisa": PISA,
    "random": Random,
    "sol": SolAttn,
    "sparse-vdit": SparseVDiT,
    "svg-ear": SVGEAR,
    "tangent": Tangent,
}

_WRAPPERS: dict[str, Callable[[Strategy, Any], Strategy]] = {
    **dict.fromkeys(WAYS, Compensated),
    **dict.fromkeys(PRECISIONS, Rounded),
}
SEARCHES: dict[str, type[Search]] = {"paro": PAROSearch, "sparse-vdit": SparseVDiTSearch}


def name_of(strategy: object) -> str:
    """The name under which `parse` knows the strategy; of others, that of the class in small letters."""
    if isinstance(strategy, Compensated):
        return f"{name_of(strategy.strategy)}+{strategy.by}"
    if isinstance(strategy, Rounded):
        return f"{name_of(strategy.strategy)}+{strategy.precision}"
    cls = type(as_given(strategy))
    return next((name for name, known in STRATEGIES.items() if known is cls), cls.__name__.lower())


def knobs_of(cls: type) -> dict[str, object]:
    """The knobs of a strategy or of a search, with their defaults; None where there is none."""
    if not is_dataclass(cls):
        return {}
    made = {knob.name: knob.default_factory for knob in fields(cls) if knob.default_factory is not MISSING}
    return {knob.name: None if knob.default is MISSING else knob.default for knob in fields(cls)} | {
        name: make() for name, make in made.items()
    }


def of_plan(plan: Plan) -> Planned:
    """The strategy that runs on a plan.

    Raises:
        PlanError: its values make no sense.
    """
    planned: dict[str, type[Planned]] = {"paro": PARO, "sparse-vdit": SparseVDiT}
    return planned[plan.strategy](plan)


def parse(names: str, **knobs: Any) -> list[Strategy]:
    """Strategies from a comma-separated list such as "adaspa,random+means,paro:plan.safetensors".

    Each gets the knobs that it has; one that runs on a plan gets nothing but the file after the colon. `+means` or
    `+tail` makes up for what it drops (`Compensated`), `+int8` computes in eight bits (`Rounded`).

    Args:
        names: keys of `STRATEGIES`, each with what follows it.
        **knobs: of any of the strategies; None leaves a strategy its default.

    Raises:
        UnknownNameError: a name that is no strategy's.
        ConfigError: no name at all, a knob out of range, a plan that is missing or for a strategy that takes none.
        InputFileError: a plan that can't be read.
        PlanError: a plan that is damaged, or another strategy's.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise ConfigError(f"wanted one or more strategies out of {', '.join(STRATEGIES)}; got an empty list")
    return [_make(name, knobs) for name in listed]


def _make(text: str, knobs: dict[str, Any]) -> Strategy:
    name, colon, plan = text.partition(":")
    name, plus, how = name.lower().rpartition("+")
    if plus:
        if how not in _WRAPPERS:
            raise ConfigError(f"after a plus wanted one of {', '.join(_WRAPPERS)}; got {how!r}")
        inner = _make(name + colon + plan, knobs)
        if how in WAYS and inner.is_compensated:
            raise ConfigError(
                f"+{how} wants a strategy that doesn't make up for what it drops; got {name_of(inner)}, which does. "
                f"Leave out +{how}"
            )
        return _WRAPPERS[how](inner, how)
    name = how
    if name not in STRATEGIES:
        raise UnknownNameError(f"no strategy is called {name!r}; known: {closest(name, STRATEGIES)}")
    cls = STRATEGIES[name]
    if issubclass(cls, Planned):
        if not plan:
            raise ConfigError(f"strategy {name!r} wants a plan, as in {name}:plan.safetensors (diffsparse calibrate)")
        return cls.load(plan)
    if colon:
        raise ConfigError(f"strategy {name!r} takes no plan; got {text!r}")
    return as_strategy(with_knobs(cls, knobs))


def with_knobs(make: Callable[..., T], knobs: dict[str, Any]) -> T:
    """A strategy or search with those of the knobs that it has; its own default for those that are None.

    Args:
        make: a class, or a function that makes a strategy.
        knobs: values by name.

    Raises:
        ConfigError: a value out of its range.
    """
    own = signature(make).parameters
    return make(**{key: value for key, value in knobs.items() if key in own and value is not None})
