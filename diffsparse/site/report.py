"""What happened: every self-attention call of a run, dense or sparse, with its reason, density and time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any, Literal

import torch

Kind = Literal["dense", "search", "sparse"]

PLANNED = "schedule"
_NO_HOLDERS = (type, ModuleType, FunctionType, torch.nn.Module)  # their tensors are no strategy's memory
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
    _seconds: float = field(default=0.0, repr=False)

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
        try:
            yield
        except BaseException:
            self.reason, self.planned = "cut off", False
            raise
        self._marks.append(mark(device))

    @property
    def work(self) -> float:
        """All that was computed, in dense calls; waits for the device where it must."""
        return float(self.density) + float(self.beside)

    @property
    def seconds(self) -> float:
        """Seconds of the call; waits for the device where it must."""
        return elapsed(*self._marks) if len(self._marks) == 2 else self._seconds

    def settle(self) -> bool:
        """Keep the seconds in place of the events that tell them; False if the device has not come so far."""
        if len(self._marks) == 2:
            if not isinstance(self._marks[1], float) and not _passed(self._marks[1]):
                return False
            self._seconds, self._marks = elapsed(*self._marks), []
        return True


def mark(device: torch.device) -> Any:
    """A moment, for `elapsed`: an event on a CUDA device (no sync), else the wall clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _passed(event: Any) -> bool:
    """Whether the device has come so far; nobody may ask while a CUDA graph is captured."""
    return not torch.cuda.is_current_stream_capturing() and bool(event.query())


def elapsed(start: Any, stop: Any) -> float:
    """Seconds between two marks; waits for the device where it must."""
    if isinstance(start, float):
        return float(stop - start)
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


class Reading:
    """A number on its way from the device."""

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number.to("cpu", non_blocking=True)
        self._here = torch.cuda.Event() if number.is_cuda else None
        if self._here is not None:
            self._here.record()

    def value(self) -> float | None:
        """None if it isn't here yet."""
        if self._here is not None:
            if torch.cuda.is_current_stream_capturing() or not self._here.query():
                return None
            self._here = None
        return float(self._number)

    def wait(self) -> float:
        """Waits for the device where it must."""
        if self._here is not None:
            self._here.synchronize()
            self._here = None
        return float(self._number)


@dataclass
class _Sums:
    """What a report adds up over calls. Some sums stay on the device, where the numbers are: nobody waits for them."""

    calls: int = 0
    density: Any = 0.0
    work: Any = 0.0
    sparse: int = 0
    sparse_density: Any = 0.0
    recalls: int = 0
    recall: Any = 0.0
    seconds: float = 0.0
    backends: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    notes: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, calls: list[CallRecord]) -> _Sums:
        sparse = [call.density for call in calls if call.kind == "sparse"]
        recalls = [call.recall for call in calls if call.recall is not None]
        return cls(
            calls=len(calls),
            density=_sum(call.density for call in calls),
            work=_plus(_sum(call.density for call in calls), _sum(call.beside for call in calls)),
            sparse=len(sparse),
            sparse_density=_sum(sparse),
            recalls=len(recalls),
            recall=_sum(recalls),
            seconds=sum(call.seconds for call in calls),
            backends=Counter(call.backend for call in calls),
            fallbacks=Counter(c.reason for c in calls if c.kind == "dense" and not c.planned),
            modes=Counter(mode for call in calls for mode in call.heads),
            passed_over=Counter(reason for call in calls for reason in call.passed_over),
            notes={call.note: None for call in calls if call.note},
        )

    def add(self, other: _Sums) -> None:
        for name, theirs in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, dict):
                mine.update(theirs)  # a Counter adds
            else:
                setattr(self, name, _plus(mine, theirs))


@dataclass
class Ledger:
    """The calls of one run of one transformer, and what its strategy keeps between steps.

    calls: all of them, or the last ones where `bound` moved earlier ones into `sums`. notes: about the whole run.
    memories: any nesting of containers and objects with tensors, as it stands; its size is kept when it is `close`d.
    """

    calls: list[CallRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    memories: Any = field(default_factory=dict, repr=False)
    sums: _Sums = field(default_factory=_Sums, repr=False)
    steps: int = 0  # in the sums, and how many of them had a sparse call
    sparse_steps: int = 0
    _last_step: int = -1  # of those in the sums
    _settled: int = 0  # calls whose events are gone
    _held: int | None = None

    def open(self, layer: str, step: int, branch: str) -> CallRecord:
        """Begin the record of one call."""
        while self._settled < len(self.calls) and self.calls[self._settled].settle():
            self._settled += 1
        self.calls.append(CallRecord(layer, step, branch))
        return self.calls[-1]

    def bound(self, most: int) -> None:
        """Move the oldest step's calls into the sums if there are more than `most`, and the device is through them."""
        if len(self.calls) <= most:
            return
        first = self.calls[0].step
        cut = next((i for i, call in enumerate(self.calls) if call.step != first), len(self.calls) - most)
        if cut > self._settled:
            return
        folded = self.calls[:cut]
        self.sums.add(_Sums.of(folded))
        if first > self._last_step:
            self._last_step, self.steps = first, self.steps + 1
            self.sparse_steps += any(call.kind == "sparse" for call in folded)
        self._settled -= cut
        del self.calls[:cut]

    def listed_steps(self, kind: Kind | None = None) -> set[int]:
        """Steps of the listed calls (of one kind) that are not in the sums."""
        return {c.step for c in self.calls if c.step > self._last_step and kind in (None, c.kind)}

    def note(self, text: str) -> None:
        """Note what the user should know about the run; equal notes are shown once."""
        if text not in self.notes:
            self.notes.append(text)

    def close(self) -> None:
        """The run is over, and its memories are about to go."""
        self._held, self.memories = self.memory_bytes, {}

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors in the memories, each storage once; of a run that is over, at its end."""
        return nbytes(self.memories) if self._held is None else self._held


@dataclass(frozen=True)
class Report:
    """Summary of the last pipeline call; of its last window, if the pipeline makes a long video in windows.

    density counts every self-attention call (dense = 1), sparse_density the sparse ones alone; work counts every pass
    over the keys: density, and what searches compute beside it, a mass pass as half a dense one. recall is the mean
    softmax mass that the chosen blocks held when they were chosen; attention_seconds is the time inside
    self-attention; memory_bytes is what the strategy keeps between steps (masks, LSE), or kept at the end; fallbacks
    are the dense calls that nobody planned, by reason, and passed_over the calls that a faster backend of this device
    did not take, by the reason. Where a strategy chooses by head, modes is the share of heads in each mode, over
    all calls in which it chose, and heads the modes of a layer's heads, by layer and step. notes is what
    else the strategy has to say. calls lists single calls: of a loop whose length is unknown the last ones alone, as do
    heads and `table`, and all other numbers count the whole run.
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
        sums = _Sums.of(calls)
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


def nbytes(kept: Any) -> int:
    """Bytes of all tensors in a nesting of containers and objects, each storage once."""
    storages = (x.untyped_storage() for x in _tensors(kept, set()))
    return sum({(str(s.device), s.data_ptr()): s.nbytes() for s in storages}.values())


def _tensors(kept: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(kept) in seen:
        return
    seen.add(id(kept))
    if torch.is_tensor(kept):
        yield kept
        return
    parts: Iterable[Any] = ()
    if isinstance(kept, Mapping):
        parts = kept.values()
    elif isinstance(kept, list | tuple | set | frozenset):
        parts = kept
    elif hasattr(kept, "__dict__") and not isinstance(kept, _NO_HOLDERS):
        parts = vars(kept).values()
    elif is_dataclass(kept) and not isinstance(kept, type):  # with slots
        parts = [getattr(kept, f.name) for f in fields(kept)]
    for part in parts:
        yield from _tensors(part, seen)


def _count_steps(ledgers: list[Ledger], kind: Kind | None = None) -> int:
    """Number of steps (with a call of that kind), over all ledgers."""
    listed = {step for ledger in ledgers for step in ledger.listed_steps(kind)}
    summed = (ledger.sparse_steps if kind else ledger.steps for ledger in ledgers)
    return len(listed) + max(summed, default=0)


def _sum(numbers: Iterable[Any]) -> Any:
    """Sum of numbers and tensors of one element, in double precision; on the device if any of them is there."""
    whole: Any = 0.0
    tensors: dict[torch.device, list[torch.Tensor]] = {}
    for x in numbers:
        if torch.is_tensor(x):
            tensors.setdefault(x.device, []).append(x.detach())
        else:
            whole += x
    for device, several in tensors.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        whole = _plus(whole, torch.stack(several).sum(dtype=wide))
    return whole


def _plus(a: Any, b: Any) -> Any:
    return a + b.to(a.device, non_blocking=True) if torch.is_tensor(a) and torch.is_tensor(b) else a + b


def _heads(calls: list[CallRecord]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for call in calls:
        if call.heads:
            found.setdefault(call.layer, {})[str(call.step)] = " ".join(call.heads)
    return found


def _mean(total: Any, count: int) -> float | None:
    return float(total) / count if count else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in counts.items())
