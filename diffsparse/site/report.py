"""What a pipeline call did: every self-attention call of it, summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from diffsparse.site.ledger import Ledger, Number, Sums
from diffsparse.site.record import CallRecord, Kind

_NONE_YET = "no self-attention call yet"


@dataclass(frozen=True)
class Report:
    """Summary of the last pipeline call; of its last window, if the pipeline makes a long video in windows.

    `print(report)` shows it as a table.

    Attributes:
        strategy: as Python writes it.
        modules: attention modules that were adopted.
        steps: denoising steps that reached attention.
        dense_steps: those of them without any sparse call.
        skipped_steps: steps that did not reach attention.
        skipped_calls: self-attention calls that a step cache answered.
        cache: that step cache; None if there was none.
        cache_is_wide: whether it spares whole blocks.
        density: mean share of attention computed, over all self-attention calls that were made, dense ones as 1.
        sparse_density: mean over the sparse calls; None if there was none.
        dense_calls: number of self-attention calls that ran dense.
        sparse_calls: number of those that ran sparse.
        recall: mean softmax mass that the chosen blocks held when they were chosen; None if none were.
        backends: calls by what computed them.
        fallbacks: dense calls that were not planned, by reason.
        attention_seconds: time inside self-attention.
        memory_bytes: what the strategy keeps between steps (masks, LSE), or kept at the end.
        modes: share of heads in each mode over all calls, where a strategy chooses by head.
        heads: modes of a layer's heads, by layer and step.
        notes: what else the user should know.
        passed_over: calls that a faster back end of this device did not take, by reason.
        work: every pass over the keys: density, and what searches compute beside it, a mass pass as half a dense one.
        calls: the single calls. Of a loop of unknown length the last ones alone, as in `heads` and `table`; all other
            numbers count the whole run.
    """

    strategy: str
    modules: int
    steps: int
    density: float
    sparse_density: float | None
    dense_steps: int
    dense_calls: int
    sparse_calls: int
    recall: float | None
    backends: dict[str, int]
    fallbacks: dict[str, int]
    attention_seconds: float
    memory_bytes: int
    modes: dict[str, float] = field(default_factory=dict)
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)
    work: float = 1.0
    skipped_steps: int = 0
    skipped_calls: int = 0
    cache: str | None = None
    cache_is_wide: bool = False
    calls: tuple[CallRecord, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, strategy: object, modules: int, ledgers: list[Ledger]) -> Report:
        """Summarise the ledgers of all transformers of one pipeline call."""
        calls = [call for ledger in ledgers for call in ledger.calls]
        sums = Sums.of(calls)
        for ledger in ledgers:
            sums.add(ledger.sums)
        steps = _count_steps(ledgers)
        own = [note for ledger in ledgers for note in ledger.notes]
        return cls(
            strategy=repr(strategy),
            modules=modules,
            steps=steps,
            density=float(sums.density) / sums.calls if sums.calls else 1.0,
            sparse_density=_mean(sums.sparse_density, sums.sparse),
            dense_steps=steps - _count_steps(ledgers, "sparse"),
            dense_calls=sums.calls - sums.sparse,
            sparse_calls=sums.sparse,
            recall=_mean(sums.recall, sums.recalls),
            backends=dict(sums.backends),
            fallbacks=dict(sums.fallbacks),
            attention_seconds=sums.seconds,
            memory_bytes=sum(ledger.memory_bytes for ledger in ledgers),
            modes={name: count / sums.modes.total() for name, count in sums.modes.most_common()},
            heads=_heads(calls),
            notes=list(dict.fromkeys([*own, *sums.notes])),
            passed_over=dict(sums.passed_over),
            work=float(sums.work) / sums.calls if sums.calls else 1.0,
            skipped_steps=_steps_between(ledgers) - steps if sums.calls else 0,
            skipped_calls=sum(ledger.skipped_calls for ledger in ledgers),
            cache=next((ledger.cache for ledger in ledgers if ledger.cache), None),
            cache_is_wide=any(ledger.cache_is_wide for ledger in ledgers),
            calls=tuple(calls),
        )

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values, ready for JSON."""
        return {f.name: copy(getattr(self, f.name)) for f in fields(self) if f.name != "calls"}

    def table(
        self, by: Literal["step", "layer"] = "step", of: Literal["density", "work"] = "density"
    ) -> dict[str, float]:
        """Means over the calls of each step, or of each layer.

        Args:
            by: "step", numbers from 0, or "layer", names of attention modules.
            of: "density", the share of attention computed, or "work", with what searches compute beside it.
        """
        groups: dict[str, list[float]] = {}
        for call in self.calls:
            groups.setdefault(str(getattr(call, by)), []).append(float(getattr(call, of)))
        return {key: sum(values) / len(values) for key, values in groups.items()}

    @property
    def executed(self) -> float:
        """Share of the self-attention calls that no step cache answered."""
        made = self.dense_calls + self.sparse_calls
        return made / (made + self.skipped_calls) if made else 1.0

    @property
    def _steps(self) -> str:
        if not self.skipped_steps:
            return f"{self.steps}, of which {self.dense_steps} dense"
        kinds = f"{self.dense_steps} dense, {self.steps - self.dense_steps} sparse"
        return f"{self.steps + self.skipped_steps}: {self.steps} executed ({kinds}), {self.skipped_steps} skipped"

    @property
    def _skipped(self) -> Iterator[tuple[str, str]]:
        """What a step cache answered."""
        if self.cache is None and not self.skipped_calls:
            return
        whole = self.dense_calls + self.sparse_calls + self.skipped_calls
        yield "step cache", f"{self.cache or 'unknown'} answered {self.skipped_calls} of {whole} calls"

    @property
    def _computed(self) -> Iterator[tuple[str, str]]:
        """Shares of attention: of the calls that were made, and of the whole run where a step cache answered some."""
        over, of = ("executed calls", " in executed calls") if self.skipped_calls else ("all calls", "")
        yield "density", f"{self.density:.3f} over {over}, {_number(self.sparse_density)} over sparse ones"
        yield "work", f"{self.work:.3f} of dense attention{of}, searches included"
        if self.skipped_calls:
            yield "whole run", f"{self.work * self.executed:.3f} of the attention of a dense run without a step cache"
        if self.recall is not None:
            yield "retained mass", _number(self.recall)

    def _head_rows(self) -> Iterator[tuple[str, str]]:
        """Share of each mode; then, by layer, the mode that each head had at most steps."""
        if self.modes:
            yield "head modes", ", ".join(f"{name} {share:.1%}" for name, share in self.modes.items())
        for layer, steps in self.heads.items():
            by_head = zip(*(modes.split() for modes in steps.values()), strict=True)
            yield layer, " ".join(Counter(modes).most_common(1)[0][0] for modes in by_head)

    def __str__(self) -> str:
        rows = [
            ("strategy", self.strategy),
            ("attention modules", str(self.modules)),
            ("steps", self._steps),
            *self._skipped,
            *self._computed,
            ("calls", f"{self.sparse_calls} sparse, {self.dense_calls} dense" if self.steps else _NONE_YET),
            ("backends", _counts(self.backends)),
            ("fall-backs", _counts(self.fallbacks) or "none"),
            *(("passed over", f"{reason} x{count}") for reason, count in self.passed_over.items()),
            ("attention time", f"{self.attention_seconds:.2f} s"),
            ("memory kept", f"{self.memory_bytes / 2**20:.1f} MiB"),
            *(("notes", note) for note in self.notes),
            *self._head_rows(),
        ]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


def _steps_between(ledgers: list[Ledger]) -> int:
    """Steps from the first with a call to the last so far."""
    called = [ledger for ledger in ledgers if ledger.tallies]
    first = min((ledger.begun for ledger in called), default=0)
    return max((ledger.reached for ledger in called), default=first) - first


def _count_steps(ledgers: list[Ledger], kind: Kind | None = None) -> int:
    """Number of steps (with a call of that kind), over all ledgers."""
    listed = {step for ledger in ledgers for step in ledger.listed_steps(kind)}
    summed = (ledger.sparse_steps if kind else ledger.steps for ledger in ledgers)
    return len(listed) + max(summed, default=0)


def _heads(calls: list[CallRecord]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for call in calls:
        if call.heads:
            found.setdefault(call.layer, {})[str(call.step)] = " ".join(call.heads)
    return found


def _mean(total: Number, count: int) -> float | None:
    return float(total) / count if count else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in counts.items())
