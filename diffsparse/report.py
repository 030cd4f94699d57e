"""What happened: every self-attention call of a run, dense or sparse, with its reason, density and time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

Kind = Literal["dense", "search", "sparse"]

PLANNED = "schedule"
_NONE_YET = "no self-attention call yet"


@dataclass
class CallRecord:
    """One self-attention call. `reason` says why a dense call was dense; `planned` ones are no fall-backs.

    heads: what each head did, by name, where a strategy chooses by head. note: what else the user should know.
    passed_over: backends of this device that come before the one that ran, and why they didn't run. beside: what was
    computed beside the share `density` of attention, in dense calls: mass passes, and products that were only compared.
    """

    layer: str
    step: int
    branch: str
    kind: Kind = "dense"
    density: float | torch.Tensor = 1.0
    reason: str = PLANNED
    planned: bool = True
    backend: str = "native"
    recall: torch.Tensor | None = None
    heads: tuple[str, ...] = ()
    note: str = ""
    passed_over: tuple[str, ...] = ()
    beside: float | torch.Tensor = 0.0
    _marks: list[Any] = field(default_factory=list, repr=False)

    def ran_dense(
        self,
        reason: str,
        *,
        planned: bool,
        backend: str,
        kind: Kind = "dense",
        passed_over: tuple[str, ...] = (),
    ) -> None:
        """Note a dense call; one of kind "search" ran on our kernels, others on the user's backend."""
        self.kind, self.density, self.passed_over = kind, 1.0, passed_over
        self.reason, self.planned, self.backend = reason, planned, backend

    def ran_sparse(self, density: torch.Tensor, backend: str, passed_over: tuple[str, ...] = ()) -> None:
        """Note a block-sparse call; `density` may still live on the device."""
        self.kind, self.density, self.reason, self.backend = "sparse", density, "", backend
        self.passed_over = passed_over

    def searched(self, recall: torch.Tensor) -> None:
        """Note that this call chose blocks; `recall` is their share of the softmax mass."""
        self.recall = recall.detach().mean()

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Time the call: with events on a CUDA device (no sync), else with the wall clock."""
        self._marks = [mark(device)]
        yield
        self._marks.append(mark(device))

    @property
    def work(self) -> float:
        """All that was computed, in dense calls; waits for the device where it must."""
        return float(self.density) + float(self.beside)

    @property
    def seconds(self) -> float:
        """Seconds of the call; waits for the device where it must."""
        return elapsed(*self._marks) if len(self._marks) == 2 else 0.0


def mark(device: torch.device) -> Any:
    """A moment, for `elapsed`: an event on a CUDA device (no sync), else the wall clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: Any, stop: Any) -> float:
    """Seconds between two marks; waits for the device where it must."""
    if isinstance(start, float):
        return float(stop - start)
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


@dataclass
class Ledger:
    """The calls of one run of one transformer, and the bytes that its strategy kept between steps."""

    calls: list[CallRecord] = field(default_factory=list)
    memory: dict[tuple[str, str], int] = field(default_factory=dict)

    def open(self, layer: str, step: int, branch: str) -> CallRecord:
        """Begin the record of one call."""
        self.calls.append(CallRecord(layer, step, branch))
        return self.calls[-1]


@dataclass(frozen=True)
class Report:
    """Summary of the last pipeline call.

    density counts every self-attention call (dense = 1), sparse_density the sparse ones alone; work counts every pass
    over the keys: density, and what searches compute beside it, a mass pass as half a dense one. recall is the mean
    softmax mass that the chosen blocks held when they were chosen; attention_seconds is the time inside
    self-attention; memory_bytes is what the strategy kept between steps (masks, LSE); fallbacks are the dense calls
    that nobody planned, by reason, and passed_over the calls that a faster backend of this device did not take, by the
    reason. Where a strategy chooses by head, modes is the share of heads in each mode, over
    all calls in which it chose, and heads the modes of a layer's heads, by layer and step. notes is what
    else the strategy has to say.
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
    calls: tuple[CallRecord, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, strategy: object, modules: int, ledgers: list[Ledger]) -> Report:
        """Summarise the ledgers of all transformers of one pipeline call."""
        calls = [call for ledger in ledgers for call in ledger.calls]
        densities = [float(call.density) for call in calls]
        sparse = [d for d, call in zip(densities, calls, strict=True) if call.kind == "sparse"]
        steps = {call.step for call in calls}
        return cls(
            strategy=repr(strategy),
            modules=modules,
            steps=len(steps),
            density=sum(densities) / len(densities) if densities else 1.0,
            sparse_density=_mean(sparse),
            dense_steps=len(steps - {call.step for call in calls if call.kind == "sparse"}),
            dense_calls=len(calls) - len(sparse),
            sparse_calls=len(sparse),
            recall=_mean([float(call.recall) for call in calls if call.recall is not None]),
            backends=dict(Counter(call.backend for call in calls)),
            fallbacks=dict(Counter(c.reason for c in calls if c.kind == "dense" and not c.planned)),
            attention_seconds=sum(call.seconds for call in calls),
            memory_bytes=sum(sum(ledger.memory.values()) for ledger in ledgers),
            modes=_shares(mode for call in calls for mode in call.heads),
            heads=_heads(calls),
            notes=list(dict.fromkeys(call.note for call in calls if call.note)),
            passed_over=dict(Counter(reason for call in calls for reason in call.passed_over)),
            work=sum(call.work for call in calls) / len(calls) if calls else 1.0,
            calls=tuple(calls),
        )

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values, ready for JSON."""
        return {f.name: copy(getattr(self, f.name)) for f in fields(self) if f.name != "calls"}

    def table(
        self, by: Literal["step", "layer"] = "step", of: Literal["density", "work"] = "density"
    ) -> dict[str, float]:
        """Mean density (or work) for each step, or for each layer."""
        groups: dict[str, list[float]] = {}
        for call in self.calls:
            groups.setdefault(str(getattr(call, by)), []).append(float(getattr(call, of)))
        return {key: sum(values) / len(values) for key, values in groups.items()}

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
            ("steps", f"{self.steps}, of which {self.dense_steps} dense"),
            (
                "density",
                f"{self.density:.3f} over all calls, {_number(self.sparse_density)} over sparse ones",
            ),
            ("work", f"{self.work:.3f} of dense attention, searches included"),
            ("retained mass", _number(self.recall)),
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


def _shares(names: Iterable[str]) -> dict[str, float]:
    counts = Counter(names)
    return {name: count / counts.total() for name, count in counts.most_common()}


def _heads(calls: list[CallRecord]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for call in calls:
        if call.heads:
            found.setdefault(call.layer, {})[str(call.step)] = " ".join(call.heads)
    return found


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in counts.items())
