"""What a strategy is, and what may be asked of it; the only place that asks other objects by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ParamSpec, Protocol, TypeVar, cast

from torch import Tensor, nn

from diffsparse.errors import ConfigError
from diffsparse.orders.choice import candidates, most_alike
from diffsparse.orders.named import AUTO, RASTER
from diffsparse.orders.per_head import HeadOrders
from diffsparse.schedule import Schedule
from diffsparse.site.compute import Method, Site
from diffsparse.strategies.work import Kind, Outline, Step
from diffsparse_kernels import Block, edges

P = ParamSpec("P")
R = TypeVar("R")
Models = Mapping[str, nn.Module]  # the transformers of a pipeline, by their names there

_ASKED = ("order", "block", "sparsity", "needs_grid", "is_compensated")


class Strategy(ABC):
    """What to compute in each self-attention call of a run.

    Write a strategy as a frozen dataclass on this class: its fields are its knobs. `attend` is all it needs; everything
    else has a default.

    Attributes:
        order: of the tokens when `attend` is called, a name of `diffsparse.orders`; "auto" finds each head's own and
            wants `block` too.
        block: tokens of a block, or its queries and keys.
        sparsity: share of the blocks that it drops; None if that is not known beforehand.
        needs_grid: it means nothing where the tokens' places on the grid are unknown; such calls run dense.
        is_compensated: it makes up for what it drops by itself.
    """

    order: str = RASTER
    block: Block | None = None
    sparsity: float | None = None
    needs_grid: bool = False
    is_compensated: bool = False

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Attention in steps and layers that may be sparse.

        Args:
            q: queries after rotary embedding, [B, H, N, D], in the order of the tokens that the strategy has asked for.
            k: keys, likewise.
            v: values, likewise.
            site: where the call is, what it may remember, and what computes.

        Returns:
            The output [B, H, N, D], of q's dtype.
        """

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Dense attention in the last of the dense first steps, for strategies that learn from it.

        Called only where a strategy has an `observe` of its own. Arguments and result are those of `attend`.
        """
        return site.dense(q, k, v, reason="schedule")

    @property
    def observes(self) -> bool:
        """Whether it has an `observe` of its own."""
        return type(self).observe is not Strategy.observe

    @property
    def wants_grid(self) -> bool:
        """Whether its calls run dense where the tokens' places are unknown."""
        return self.needs_grid or self.order not in (RASTER, AUTO)

    def check(self, models: Models) -> None:  # noqa: B027  # most have nothing to check
        """Called by `diffsparse.apply` before it changes anything.

        Args:
            models: the transformers of the pipeline, by their names there.

        Raises:
            DiffsparseError: the strategy is not for these models; by default nothing is checked.
        """

    def expected(self, run: Outline) -> list[Step]:
        """What each step of a run computes. By default its `sparsity` is taken at its word.

        Args:
            run: its length, its dense steps, and the layout of its tokens if that is known.
        """
        steps = run.constant(None if self.sparsity is None else 1.0 - self.sparsity)
        if self.observes and run.search is not None:
            steps[run.search] = Step("search", None)
        return steps

    def steps(self, run: Outline) -> list[Step]:
        """`expected`, where steps that compute everything count as dense."""
        return [Step() if step.is_whole else step for step in self.expected(run)]

    def kinds(self, schedule: Schedule, steps: int) -> list[Kind]:
        """What each step is in the layers that may be sparse.

        Args:
            schedule: steps and layers that stay dense.
            steps: length of the run.
        """
        return [step.kind for step in self.steps(Outline.of(schedule, steps))]

    def facts(self) -> dict[str, str]:
        """What a user may want to know about it beyond its knobs, in a few words by name."""
        return {}


class Wrapper(Strategy):
    """A strategy that lets another one run. Whatever it doesn't answer itself, the other answers."""

    strategy: Strategy

    def __post_init__(self) -> None:
        for name in _ASKED:
            object.__setattr__(self, name, getattr(self.strategy, name))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The strategy's attention over q, k, v [B, H, N, D]."""
        return self.strategy.attend(q, k, v, site)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The strategy's own."""
        return self.strategy.observe(q, k, v, site)

    @property
    def observes(self) -> bool:
        """Whether the strategy does."""
        return self.strategy.observes

    def check(self, models: Models) -> None:
        """Whatever the strategy checks."""
        self.strategy.check(models)

    def expected(self, run: Outline) -> list[Step]:
        """What the strategy expects."""
        return self.strategy.expected(run)

    def facts(self) -> dict[str, str]:
        """What the strategy has to say."""
        return self.strategy.facts()


class Attending(Protocol):
    """Any object with this method may be used as a strategy; `as_strategy` wraps it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Attention over q, k, v [B, H, N, D] -> [B, H, N, D]."""


def is_attending(strategy: object) -> bool:
    """Whether an object, not a class, has the method."""
    return callable(getattr(strategy, "attend", None)) and not isinstance(strategy, type)


class Foreign(Strategy):
    """Makes a strategy of an object that has `attend`.

    What else it has of a strategy is used, attributes as they are when it is wrapped; the rest is default.
    """

    def __init__(self, inner: Attending) -> None:
        self.inner = inner
        for name in _ASKED:
            setattr(self, name, getattr(inner, name, getattr(Strategy, name)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The object's own."""
        return self.inner.attend(q, k, v, site)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The object's own, if it has one."""
        return self._method("observe", super().observe)(q, k, v, site)

    @property
    def observes(self) -> bool:
        """Whether the object has an `observe`."""
        return getattr(self.inner, "observe", None) is not None

    def check(self, models: Models) -> None:
        """The object's own, if it has one."""
        self._method("check", super().check)(models)

    def expected(self, run: Outline) -> list[Step]:
        """The object's own, if it has one."""
        return self._method("expected", super().expected)(run)

    def facts(self) -> dict[str, str]:
        """The object's own, if it has some."""
        return self._method("facts", super().facts)()

    def _method(self, name: str, default: Callable[P, R]) -> Callable[P, R]:
        """The object's method of that name; the default where it has none, or None."""
        own: Callable[P, R] | None = getattr(self.inner, name, None)
        return default if own is None else own

    def __repr__(self) -> str:
        return repr(self.inner)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Foreign) and self.inner == other.inner

    def __hash__(self) -> int:
        return hash(self.inner)


def as_strategy(strategy: object) -> Strategy:
    """The strategy itself, or a stranger's object with `attend` as one.

    Raises:
        ConfigError: it has no such method.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not is_attending(strategy):
        raise ConfigError(
            f"a strategy is an object with a method attend(q, k, v, site), such as Digest(); got {strategy!r}"
        )
    return Foreign(cast(Attending, strategy))


def as_given(strategy: object) -> object:
    """The object that `as_strategy` was given."""
    return strategy.inner if isinstance(strategy, Foreign) else strategy


def in_order(strategy: Strategy, method: Method, qkv: tuple[Tensor, Tensor, Tensor], site: Site) -> Tensor:
    """Call `method(q, k, v, site)` with the tokens in the strategy's order; its output stands as q does."""
    if strategy.order == RASTER:
        return method(*qkv, site)
    if strategy.order == AUTO:
        orders = _own_orders(strategy, qkv, site)
    else:
        orders = HeadOrders.same(strategy.order, site.layout, qkv[0].device)
    return site.in_order(orders, method, *qkv)


def _own_orders(strategy: Strategy, qkv: tuple[Tensor, Tensor, Tensor], site: Site) -> HeadOrders:
    """The order of each head of each sample that was found when the run first asked."""
    names = candidates(site.layout, _block_of(strategy))
    if "orders" not in site.memory:
        site.memory["orders"] = most_alike(qkv, names, site.layout, _block_of(strategy), site.key_mask)
    return HeadOrders.of(names, site.memory["orders"], site.layout, qkv[0].device, move_text=False)


def found_orders(strategy: Strategy, site: Site) -> tuple[str, ...]:
    """By name, what "auto" found for each head of a site that was called; of its first sample where samples differ."""
    names = candidates(site.layout, _block_of(strategy))
    return tuple(names[int(i)] for i in site.memory["orders"][0])


def _block_of(strategy: Strategy) -> int:
    """Tokens that an order gathers: a block of keys."""
    if strategy.block is None:
        raise ConfigError(f"order 'auto' wants a strategy with a block; {strategy!r} has none")
    return edges(strategy.block)[1]
