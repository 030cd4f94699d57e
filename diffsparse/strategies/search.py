"""What offline searches have in common: each watches some runs of a pipeline and ends with a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from diffsparse.plans.sealed import Values
from diffsparse.plans.sums import LayerSums, Sums
from diffsparse.schedule import evenly_spread
from diffsparse.site.compute import Site
from diffsparse.strategies.base import Strategy


class Search(Protocol):
    """An offline search: a frozen dataclass whose fields are its knobs.

    Attributes:
        strategy: the name of the strategy that runs on its plans.
        passes: how often each prompt is run.
    """

    strategy: ClassVar[str]
    passes: ClassVar[int]

    def watcher(self, number: int, sums: Sums) -> Strategy:
        """The strategy that runs in pass `number`; it adds to `sums` what it sees."""

    def plan(self, sums: Sums) -> tuple[Values, dict[str, Tensor]]:
        """Settings and tensors of the plan."""


@dataclass(frozen=True)
class Watcher(Strategy):
    """Runs dense and shows each call to `watch(q, k, lse, site)`."""

    watch: Callable[[Tensor, Tensor, Tensor, Site], None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Dense attention over q, k, v [B, H, N, D]."""
        out, lse = site.dense_with_lse(q, k, v)
        self.watch(q, k, lse, site)
        return out


def sums_of(sums: Sums, site: Site) -> LayerSums:
    """The sums of the layer that attends at `site`."""
    return sums.layer(site.model, site.layer, site.layout)


def is_sampled(site: Site, count: int) -> bool:
    """Whether this step is one of `count` evenly spread ones; all are if the length of the run is unknown."""
    return not site.steps or site.step in evenly_spread(count, site.steps)
