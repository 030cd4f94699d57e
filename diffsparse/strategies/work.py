"""What the steps of a run compute, known before it runs. The unit of work is one dense pass of attention.

AdaSpa's run (arXiv 2502.21079) of T steps, of which w are dense, is w + 1/2 + (T - w) d + r/2: the pass that sums
masses has one product of two, and each of r later searches needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from diffsparse.orders.layout import Layout
from diffsparse.schedule import Schedule
from diffsparse_kernels import Summary

# search: dense, with what a search computes beside it; refresh: sparse, with a search on a cached log-sum-exp;
# tail: dense beside sparse, to keep what the dropped blocks gave
Kind = Literal["dense", "search", "refresh", "tail", "sparse"]
KINDS: tuple[Kind, ...] = ("dense", "search", "refresh", "tail", "sparse")


class Parts(NamedTuple):
    """What a compensated product consists of, where its time is told and not its operations alone.

    Attributes:
        listed: share of the blocks that are computed.
        summary: how the others stand for their keys.
        lists: whether the step makes them, if only again.
        routed: whether the estimated errors of the summaries choose the blocks.
        probes: rows that are computed exactly.
        rank: of the residual that is added.
    """

    listed: float
    summary: Summary
    lists: bool = False
    routed: bool = False
    probes: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Step:
    """One step in the layers that may be sparse.

    Attributes:
        kind: "dense", "search" (dense, with what a search computes beside it), "refresh" (sparse, with a search on a
            cached log-sum-exp), "tail" (dense beside sparse, to keep what dropped blocks gave) or "sparse".
        density: share of attention computed by blocks and summaries, as a report counts it; None if only the run will
            show.
        beside: what is computed beside that, in dense passes: mass passes, and products that are only compared.
        new: share of the layers whose blocks are new.
        parts: of its product, or of the one that a dense step only compares; None where blocks are all that there is.
    """

    kind: Kind = "dense"
    density: float | None = 1.0
    beside: float = 0.0
    new: float = 0.0
    parts: Parts | None = None

    @property
    def is_whole(self) -> bool:
        """Whether a sparse step computes everything."""
        return self.kind == "sparse" and self.density is not None and self.density >= 1

    @property
    def work(self) -> float | None:
        """All of it, in dense passes."""
        return None if self.density is None else self.density + self.beside


@dataclass(frozen=True)
class Outline:
    """A run before it starts; steps are counted from 0.

    Steps are those that reach attention: a step cache skips the others.

    Attributes:
        steps: length of the run.
        first: first step that may be sparse.
        end: first step after those.
        layout: of the tokens, None if it is not known; without it text counts as none, and blocks as shares.
        head_dim: channels of a head, None if it is not known.
    """

    steps: int
    first: int
    end: int
    layout: Layout | None = None
    head_dim: int | None = None

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        steps: int,
        layout: Layout | None = None,
        head_dim: int | None = None,
        executed: Sequence[int] | None = None,
        warm_up: int = 0,
    ) -> Outline:
        """The run of a schedule.

        Args:
            schedule: steps and layers that stay dense.
            steps: length of the run.
            layout: of the tokens, if it is known.
            head_dim: channels of a head, if it is known.
            executed: those of the steps that reach attention; None for all.
            warm_up: as in `Schedule.bounds`.
        """
        first, end = schedule.bounds(steps, warm_up)
        end = steps if end is None else end
        if executed is None:
            return cls(steps, first, end, layout, head_dim)
        early, inner = (sum(step < bound for step in executed) for bound in (first, end))
        return cls(len(executed), early, inner, layout, head_dim)

    @property
    def search(self) -> int | None:
        """Step of the first search: the last dense one at the start, or the first of all; None if there is neither."""
        if self.first:
            return self.first - 1 if self.first <= self.steps else None
        return 0 if self.end > 0 else None

    def each(self, sparse: Callable[[int], Step]) -> list[Step]:
        """All steps: dense where the schedule says so, `sparse(step)` elsewhere."""
        return [sparse(step) if self.first <= step < self.end else Step() for step in range(self.steps)]

    def constant(self, density: float | None) -> list[Step]:
        """All steps of a strategy that chooses its blocks once, without a search."""
        return self.each(lambda step: Step("sparse", density, new=float(step == self.first)))
