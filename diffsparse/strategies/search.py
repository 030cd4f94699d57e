"""What offline searches share: each watches some runs of a pipeline and ends with a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from diffsparse.plans.sums import Sums
from diffsparse.site.compute import Site


class Search(Protocol):
    """An offline search: a frozen dataclass whose fields are its knobs.

    strategy: whose plans it makes. passes: how often each prompt is run.
    """

    strategy: str
    passes: int

    def watcher(self, number: int, sums: Sums) -> Any:
        """The strategy that runs in pass `number`; it adds to `sums` what it sees."""

    def plan(self, sums: Sums) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings and tensors of the plan."""


@dataclass(frozen=True)
class Watcher:
    """Runs dense and shows each call to `look(q, k, lse, site)`."""

    look: Callable[[Tensor, Tensor, Tensor, Site], None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Dense attention over q, k, v [B, H, N, D]."""
        out, lse = site.dense_with_lse(q, k, v)
        self.look(q, k, lse, site)
        return out


def is_look(site: Site, looks: int) -> bool:
    """Whether this step is one of `looks` evenly spread ones; all are, if nobody knows the run's length."""
    return not site.steps or site.step in {(2 * i + 1) * site.steps // (2 * looks) for i in range(looks)}
