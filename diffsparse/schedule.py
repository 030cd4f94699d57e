"""When to stay dense: one value object that every strategy shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from diffsparse.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Steps and layers that always run dense, on the user's own attention backend.

    Steps are those of the schedule, of which a step cache may skip some: what counts is how far the noise has come.

    The default, a fifth of the steps, is the published warm-up of AdaSpa (10 of 50); any fraction above zero means
    at least one step, so that models of 4 to 8 steps keep one or two.

    Attributes:
        dense_first: dense steps at the start of a run; an int counts steps, a float is a fraction of the run's steps
            (one more where a step cache would extrapolate from a dense and a sparse one). The strategy may look at the
            last of them (AdaSpa makes its first search there).
        dense_last: the same for the end of a run.
        dense_layers: attention layers by number, in the order of the model's modules; negative counts from the end.

    Raises:
        ConfigError: a value of another type, or out of its range.

    Examples:
        >>> from diffsparse import Schedule
        >>> Schedule(dense_first=0.2, dense_layers=(0, -1)).describe(steps=50)
        'dense steps 1-10 of 50'
        >>> Schedule(dense_first=2).bounds(steps=8)  # the first sparse step, and the first after those
        (2, 8)
    """

    dense_first: int | float = 0.2
    dense_last: int | float = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dense_first", "dense_last"):
            check_amount(name, getattr(self, name))
        layers = self.dense_layers
        if not isinstance(layers, tuple) or not all(isinstance(layer, int) for layer in layers):
            raise ConfigError(f"dense_layers wants a tuple of layer numbers such as (0, -1); got {layers!r}")

    def bounds(self, steps: int | None, warm_up: int = 0) -> tuple[int, int | None]:
        """First sparse step and first step of the dense end (None: the run's length is unknown), both 0-based.

        Args:
            steps: length of the run; None if it is unknown.
            warm_up: steps at the start from which a step cache extrapolates, by the difference of the last two: a share
                of the run takes both or neither.
        """
        first = resolve(self.dense_first, steps)
        if isinstance(self.dense_first, float) and first == warm_up - 1 > 0:
            first = warm_up
        return first, None if steps is None else steps - resolve(self.dense_last, steps)

    def excludes(self, layer: int, layers: int) -> bool:
        """Whether a layer is dense at every step.

        Args:
            layer: its number, counted from 0.
            layers: how many there are.
        """
        return layer in self.dense_layers or layer - layers in self.dense_layers

    def describe(self, steps: int, warm_up: int = 0) -> str:
        """The dense steps of a run in words, numbered from 1 as people count them.

        Args:
            steps: length of the run.
            warm_up: as in `bounds`.
        """
        first, end = self.bounds(steps, warm_up)
        first, end = min(first, steps), steps if end is None else end
        spans = [(1, first), (max(end, first) + 1, steps)]
        named = [f"{a}-{b}" if a < b else f"{a}" for a, b in spans if a <= b]
        return f"dense steps {', '.join(named) or 'none'} of {steps}"

    def of_unknown_length(self) -> str:
        """What becomes of the shares, and of the end, in a run whose length nobody knows; empty if nothing does."""
        changed = [f"dense_first={self.dense_first} is 1 step"] if isinstance(self.dense_first, float) else []
        changed = changed if self.dense_first else []
        changed += [f"dense_last={self.dense_last} is not kept"] if self.dense_last else []
        told = "cache_context(name, step_index=..., num_inference_steps=...) tells it"
        return f"the length of this run is unknown, so {' and '.join(changed)}: {told}" if changed else ""


def resolve(amount: int | float, steps: int | None) -> int:
    """Number of steps that `amount` stands for: itself if an int, else that share of `steps`, at least 1."""
    if isinstance(amount, int) or amount == 0:
        return int(amount)
    return max(1, nearest(exact(amount) * steps)) if steps else 1


def check_amount(name: str, amount: int | float) -> None:
    """Raise ConfigError unless `amount` is a number of steps (int) or a share of them (float in [0, 1])."""
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise ConfigError(f"{name} wants a number of steps (int) or a fraction (float); got {amount!r}")
    if amount < 0 or (isinstance(amount, float) and not amount <= 1):
        raise ConfigError(
            f"{name} wants a whole number of steps such as 3, or a fraction in [0, 1] such as 0.2; got {amount!r}"
        )


def exact(share: float | Fraction) -> Fraction:
    """The number as written: 0.1 is a tenth, so that a fifth of what 0.8 of 50 leaves is 2, not a little less."""
    return share if isinstance(share, Fraction) else Fraction(str(share))


def evenly_spread(count: int, length: int) -> set[int]:
    """Up to `count` places out of `length`, 0-based: the middles of equal parts."""
    return {(2 * i + 1) * length // (2 * count) for i in range(count)}


def nearest(number: Fraction) -> int:
    """The nearest whole number; halves go up, always (`round` sends them to the even one)."""
    return math.floor(number + Fraction(1, 2))
