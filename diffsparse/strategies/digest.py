"""Digest: Tangent, and what its product missed in the last dense step. Ours, of known parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, NamedTuple

from torch import Tensor

from diffsparse.schedule import exact, nearest
from diffsparse.site.compute import Site
from diffsparse.strategies.blocks import check_number
from diffsparse.strategies.residual import LowRank, affordable_rank
from diffsparse.strategies.tangent import Tangent
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import edges

_RENEWING = Fraction(3, 8)  # of the work of a long run: its later dense steps
_APART = 10  # steps
_NOTHING = Fraction(0)


class _Plan(NamedTuple):
    """How a run spends its work from a dense step on. Steps are counted among those that reach attention.

    Attributes:
        first: the dense step that taught first.
        start: the dense step from which on it holds.
        spent: work since `first`, in dense passes.
        ahead: dense steps to come.
        done: and how many have been since `first`.
        sparsity: of the steps between.
        repeats: whether the blocks stay the same from one dense step to the next.
    """

    first: int
    start: int
    spent: Fraction
    ahead: list[int]
    done: int
    sparsity: Fraction
    repeats: bool

    def spent_until(self, step: int) -> Fraction:
        """Work since the first dense step until after `step`, beside dense products."""
        return self.spent + (1 - self.sparsity) * (step - self.start)


class _Kept(NamedTuple):
    """What a dense step has left for those that follow.

    Attributes:
        residual: of the sparse product.
        step: that it was.
        blocks: that the product computed, as bits uint8 [B, H, nQ, nK / 8]; None where each step chooses its own.
        plan: of the run.
        between: what runs until the next dense step.
    """

    residual: LowRank
    step: int
    blocks: Tensor | None
    plan: _Plan
    between: Digest


@dataclass(frozen=True)
class Digest(Tangent):
    """Tangent that also learns from dense steps, where the schedule has one.

    In the last of the dense first steps the sparse product is computed too. What it misses changes slowly from step to
    step and is smooth along the tokens: it is kept as a factor of low rank for each head, N (r + 2) bytes. In the steps
    that follow, the probes see what of it still holds: their fit may start from it, and has its coefficients among its
    features. Where there are no probes, it is added as it is for half of the run.

    Long runs renew it: where three eighths of the work suffice for two dense steps or more, ten steps apart, these
    are spread evenly over the run. Between them the blocks stay the same, for what a product misses depends on them:
    there is no routing. Probes take a thirty-second of the work at most, so that there are some from about 20,000
    tokens; where there are none, all that was kept is added. At 80 % sparsity with a fifth of the steps dense, a run
    of 36 steps is the first such.

    A dense output less a cheaper one, kept and added in later steps, is DiTFastAttn's (arXiv 2406.08552), Re-ttention's
    (2505.22918) and QuantSparse's (2509.23681), which keeps it in low rank. Ours are what it is a residual of, and that
    exact rows, where there are probes, decide in each step, for each head, what of it is used.

    Without a dense first step it is Tangent. Nothing is renewed where the length of the run is unknown, or how much of
    it a transformer has (the experts of Wan 2.2), or where the memory has no room for the blocks. Where the length is
    unknown, only probes use what was kept.

    Attributes:
        sparsity: share of attention that is not computed, in [0, 1), counted as in `Tangent`; the residual counts too.
        block: tokens of a block, or its queries and keys; by default 128 x 64 on a machine with a GPU, else 64.
        order: of the tokens (`diffsparse.orders`); "auto" finds each head's own in its first call.
        probes: whether some rows are computed exactly, to correct all others.
        memory: GiB that may be kept, for each sample of each guidance branch; a lower rank than 4 where that is too
            little.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> from diffsparse import Digest, Schedule, apply
        >>> strategy = Digest(sparsity=0.7)
        >>> with apply(pipe, strategy, schedule=Schedule(dense_first=1)) as sparse:
        ...     video = pipe("a red ball").frames[0]
        >>> print(sparse.report())
        strategy           Digest(sparsity=0.7, ...)
        ...
    """

    memory: float = 1.2
    _most_rank: ClassVar[int] = 4  # on the embedded model as good as all of it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("memory", self.memory)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Dense attention over q, k, v [B, H, N, D]; keeps what the sparse product misses of it."""
        return self._learn(q, k, v, site, site.dense(q, k, v, reason="schedule"))

    def _learn(self, q: Tensor, k: Tensor, v: Tensor, site: Site, out: Tensor, before: _Plan | None = None) -> Tensor:
        """The dense output, after what the sparse product misses of it is kept; `before` is the plan that wants it."""
        plan, rank = self._affordable(q, site, before)
        if rank < min(self._most_rank, q.shape[3]):
            site.record.note = (
                f"Digest keeps a residual of rank {rank}, not {self._most_rank}: that is what {self.memory:g} GiB hold"
            )
        if rank and not self._is_whole:
            between = self._between(plan)
            blocks = between._blocks(q, k, v, site, None)
            missed = LowRank.of(out - site.compare(q, k, v, blocks), rank)
            bits = blocks.lists.packed() if plan.repeats else None
            site.memory["kept"] = _Kept(missed, site.step, bits, plan, between)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Tangent's attention over q, k, v [B, H, N, D] with what was kept; dense where that is renewed."""
        kept: _Kept | None = site.memory.get("kept")
        if kept is None:
            return super().attend(q, k, v, site)
        old = kept.plan
        ahead = self._ahead(site.end, old.first, old.start, old.done) if old.repeats else []
        if ahead and ahead[0] <= site.executed:
            return self._learn(q, k, v, site, site.dense(q, k, v, reason="renewal"), kept.plan)
        if kept.plan.ahead and not ahead:  # a step cache leaves fewer steps than it seemed: too few to renew it
            plan = self._followed(kept.plan, site.end, site.executed - 1)
            site.memory["kept"] = kept = kept._replace(blocks=None, plan=plan, between=self._between(plan))
        residual = kept.between._useful(kept, q, site)
        return site.sparse(q, k, v, kept.between._blocks(q, k, v, site, residual, kept.blocks))

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes: as Tangent, and the sparse product beside the dense one in steps that teach."""
        first = run.first - 1
        if not (0 <= first < run.steps and self.memory) or self._is_whole:
            return super().expected(run)
        plan = self._plan(run.end, first)
        sparse = self._between(plan)._expected(run)
        parts = None if sparse.parts is None else sparse.parts._replace(routed=True, probes=0, rank=0)
        learning = Step("dense", 1.0, (sparse.density or 0.0) + self._routing(), parts=parts)
        steps = run.each(lambda step: learning if step in plan.ahead else sparse)
        steps[first] = learning
        return steps

    def _renewals(self, end: int | None, first: int) -> list[int]:
        """Dense steps after the first, if there are several: of three eighths of the work, ten steps apart or more.

        Args:
            end: first step after the sparse ones; None if it is unknown.
        """
        left = 0 if end is None else max(end - 1 - first, 0)
        count = min(int(_RENEWING * (1 - exact(self.sparsity)) * left), (left + 1) // _APART - 1)
        return [first + nearest(Fraction(i * (left + 1), count + 1)) for i in range(1, count + 1)] if count > 1 else []

    def _ahead(self, end: int | None, first: int, start: int, done: int) -> list[int]:
        """Dense steps after `start` in a run that ends before `end`, an estimate that may change from step to step."""
        later = [max(step, start + _APART // 2) for step in self._renewals(end, first)[done:]]
        return [step for step in later if end is not None and step + _APART <= end]

    def _plan(
        self,
        end: int | None,
        start: int,
        first: int | None = None,
        spent: Fraction = _NOTHING,
        done: int = 0,
        renews: bool = True,
    ) -> _Plan:
        """What is left of the work after the step `start`, shared out evenly among the steps before `end`."""
        first, share = start if first is None else first, 1 - exact(self.sparsity)
        ahead = self._ahead(end, first, start, done) if renews else []
        if end is not None and end - 1 > start:
            left = (share * (end - 1 - first) - spent - len(ahead)) / (end - 1 - start)
            share = min(max(left, share / 8), Fraction(1))
        return _Plan(first, start, spent, ahead, done, 1 - share, renews and bool(done or ahead))

    def _followed(self, plan: _Plan, end: int | None, start: int, dense: int = 0, renews: bool = False) -> _Plan:
        """The plan after `plan`, which was followed until after the step `start`."""
        return self._plan(end, start, plan.first, plan.spent_until(start) + dense, plan.done + dense, renews)

    def _affordable(self, q: Tensor, site: Site, before: _Plan | None) -> tuple[_Plan, int]:
        """The plan, without later dense steps where the memory can't hold the blocks too, and the rank that it can."""

        def plan(renews: bool) -> _Plan:
            if before is None:
                return self._plan(site.end, site.executed, renews=renews)
            return self._followed(before, site.end, site.executed, dense=1, renews=renews)

        wanted = plan(before is None or before.repeats)
        rank = self._rank(q, site, wanted.repeats)
        return (wanted, rank) if rank else (plan(renews=False), self._rank(q, site, repeats=False))

    def _between(self, plan: _Plan) -> Digest:
        """As it is between dense steps, which take their share of the work."""
        if plan.repeats:
            return _Repeated(float(plan.sparsity), self.block, self.order, self.probes, self.memory)
        return self if plan.sparsity == exact(self.sparsity) else replace(self, sparsity=float(plan.sparsity))

    def _useful(self, kept: _Kept, q: Tensor, site: Site) -> LowRank | None:
        """The residual, if it is renewed, or probes tell what of it is of use; else for half of the rest of the run."""
        half = kept.step + math.ceil(((site.steps or 0) - 1 - kept.step) / 2)
        serves = kept.blocks is not None or self._probe_count(*q.shape[2:]) or site.step <= half
        return kept.residual if serves else None

    def _rank(self, q: Tensor, site: Site, repeats: bool) -> int:
        """As high as the memory allows, beside the blocks where they are kept."""
        rows, columns = map(site.layout.blocks, edges(self.block))
        head_bytes = self.memory * 2**30 / (site.layers * q.shape[1]) - (rows * -(-columns // 8) if repeats else 0)
        return affordable_rank(self._most_rank, head_bytes, q.shape[2], q.shape[3])


class _Repeated(Digest):
    """Digest with the blocks of an earlier step."""

    _most_probing: ClassVar[float] = 1 / 32  # what was kept is fresh: they are a safeguard

    def _routing(self) -> float:
        return 0.0

    def _expected(self, run: Outline) -> Step:
        return replace(super()._expected(run), new=0.0)
