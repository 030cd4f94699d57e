"""The calls of one run of one transformer, and what they add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import FunctionType, ModuleType

import torch

from diffsparse.site.record import CallRecord, Kind

Number = float | torch.Tensor  # a tensor of one element stays where it is: no step waits for it

_NO_HOLDERS = (type, ModuleType, FunctionType, torch.nn.Module)  # their tensors are no strategy's memory


@dataclass
class Sums:
    """What a report adds up over calls. Some sums stay on the device, where the numbers are: no call waits for them."""

    calls: int = 0
    density: Number = 0.0
    work: Number = 0.0
    sparse: int = 0
    sparse_density: Number = 0.0
    recalls: int = 0
    recall: Number = 0.0
    seconds: float = 0.0
    backends: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    notes: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, calls: list[CallRecord]) -> Sums:
        """Of some calls."""
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
            passed_over=Counter(reason for call in calls for reason in set(call.passed_over)),
            notes={call.note: None for call in calls if call.note},
        )

    def add(self, other: Sums) -> None:
        """Add others' sums to these."""
        for name, theirs in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, dict):
                mine.update(theirs)  # a Counter adds
            else:
                setattr(self, name, _plus(mine, theirs))


@dataclass
class Tally:
    """The steps that reached one layer in one guidance branch; a step cache answered the others.

    Attributes:
        first: the first step of the branch.
        last: the latest that reached the layer.
        steady: so many came at the start without a gap.
        skipped: steps between them that did not reach it.
        passes: passes of the model that did.
        calls: the calls in them.
        last_pass: the number of the latest.
        was_dense: whether it had dense steps at the start.
        taught: the step in which its strategy observed; None if it has not.
    """

    first: int
    last: int
    steady: int = 1
    skipped: int = 0
    passes: int = 0
    calls: int = 0
    was_dense: bool = False
    taught: int | None = None
    last_pass: int = -1

    @classmethod
    def late(cls, step: int, missed: int) -> Tally:
        """Of a layer that the first steps of its branch did not reach."""
        missed = min(missed, step)
        return cls(step - missed, step, int(not missed), missed)

    def reach(self, step: int, number: int, answered: bool) -> None:
        """Note a call in a step, in the pass of that number; `answered`: the steps between were not left out."""
        self.calls += 1
        self.passes, self.last_pass = self.passes + (number != self.last_pass), number
        if step <= self.last:
            return
        self.skipped += step - self.last - 1 if answered else 0
        self.steady += not self.skipped
        self.last = step

    def skipped_calls(self, steps: int, passes: int | None = None) -> int:
        """Calls that a step cache answered in the first `steps` of the run, of whose passes the number may be known."""
        executed = self.last + 1 - self.first - self.skipped
        skipped = self.skipped + steps - 1 - self.last
        return skipped * self.calls // executed if passes is None else (passes - self.passes) * self.calls_of_a_pass

    @property
    def calls_of_a_pass(self) -> int:
        """As many as most passes had."""
        return -(-self.calls // self.passes)

    def to_skip(self, end: int) -> int:
        """How many of the steps until `end` will not reach it, if it goes on as since the first gap."""
        since = self.last + 1 - self.first - self.steady
        return round(max(end - 1 - self.last, 0) * self.skipped / since) if self.skipped else 0


@dataclass
class Ledger:
    """The calls of one run of one transformer, and what its strategy keeps between steps.

    Attributes:
        calls: all of them, or the last ones where `bound` moved earlier ones into `sums`.
        notes: about the whole run.
        memories: any nesting of containers and objects with tensors, as it stands; its size is kept when it is
            `close`d.
        tallies: by layer and guidance branch.
        cache: what answered the steps that are missing there.
        cache_is_wide: whether it did so with whole blocks.
        passes: of the model, by guidance branch; under None those of branches without a name.
        idle: of these, the passes since the last call in such a branch: a step cache answered all of them.
        extra: branches that guidance adds.
        length: steps of the run, None if that is unknown.
    """

    calls: list[CallRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    memories: object = field(default_factory=dict, repr=False)
    sums: Sums = field(default_factory=Sums, repr=False)
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict, repr=False)
    cache: str | None = None
    cache_is_wide: bool = False
    passes: Counter[str | None] = field(default_factory=Counter, repr=False)
    idle: Counter[str | None] = field(default_factory=Counter, repr=False)
    extra: set[str | None] = field(default_factory=set, repr=False)
    length: int | None = None
    steps: int = 0  # in the sums, and how many of them had a sparse call
    sparse_steps: int = 0
    _last_step: int = -1  # of those in the sums
    _settled: int = 0  # calls whose events are gone
    _held: int | None = None

    def begin_pass(self, branch: str | None, extra: bool = False) -> None:
        """The model runs, in a branch whose name is known ahead of its calls or not; guidance may have added it."""
        self.passes[branch] += 1
        self.idle[branch] += 1
        if extra:
            self.extra.add(branch)

    def open(self, layer: str, step: int, branch: str, cache: str | None = None) -> CallRecord:
        """Begin the record of one call, behind a step cache or not."""
        while self._settled < len(self.calls) and self.calls[self._settled].settle():
            self._settled += 1
        self.calls.append(CallRecord(layer, step, branch))
        self.cache = cache or self.cache
        key, name = (layer, branch), self._name(branch)
        self.idle[name] = 0
        if key not in self.tallies:
            missed = self.passes[name] - 1 if cache and name is not None else 0
            self.tallies[key] = Tally.late(step, max(missed, 0))
        tally, number = self.tallies[key], self.passes.total()
        gap = step > tally.last + 1  # which a loop may have left out by itself
        tally.reach(step, number, gap and (cache is not None or number - tally.last_pass > len(self.branches)))
        return self.calls[-1]

    def _name(self, branch: str) -> str | None:
        """That of a branch ahead of its calls."""
        return branch if branch in self.passes else None

    def bound(self, most: int) -> None:
        """Move the oldest step's calls into the sums if there are more than `most`, and the device is through them."""
        if len(self.calls) <= most:
            return
        first = self.calls[0].step
        cut = next((i for i, call in enumerate(self.calls) if call.step != first), len(self.calls) - most)
        if cut > self._settled:
            return
        folded = self.calls[:cut]
        self.sums.add(Sums.of(folded))
        if first > self._last_step:
            self._last_step, self.steps = first, self.steps + 1
            self.sparse_steps += any(call.kind == "sparse" for call in folded)
        self._settled -= cut
        del self.calls[:cut]

    def listed_steps(self, kind: Kind | None = None) -> set[int]:
        """Steps of the listed calls (of one kind) that are not in the sums."""
        return {c.step for c in self.calls if c.step > self._last_step and kind in (None, c.kind)}

    @property
    def branches(self) -> list[str]:
        """Guidance branches, in the order of their first passes; those without a name if they attended."""
        attended = dict.fromkeys(branch for _, branch in self.tallies)
        named = [name for name in self.passes if name is not None]
        return [*named, *(branch for branch in attended if branch not in self.passes)]

    def beside(self, branch: str) -> list[str]:
        """The branches that a step cache without contexts counts together with one: guidance keeps its own apart."""
        return [other for other in self.branches if (other in self.extra) == (branch in self.extra)]

    @property
    def reached(self) -> int:
        """Number of the step that follows the last one so far, with a call or without."""
        unnamed = max(sum(branch not in self.passes for branch in self.branches), 1)
        over = 0
        for (_, branch), tally in self.tallies.items():
            name = self._name(branch)
            over = max(over, tally.last + 1 - (-self.idle[name] // (unnamed if name is None else 1)))
        return over if self.length is None else min(over, self.length)

    @property
    def begun(self) -> int:
        """The first step with a call: not 0 where a strategy was applied in the middle of a run."""
        return min(tally.first for tally in self.tallies.values())

    @property
    def skipped_calls(self) -> int:
        """Self-attention calls that a step cache answered."""
        skipped = sum(
            tally.skipped_calls(self.reached, self.passes.get(branch)) for (_, branch), tally in self.tallies.items()
        )
        attended = {branch for _, branch in self.tallies}
        layers: Counter[str] = Counter()
        for (layer, _), tally in self.tallies.items():
            layers[layer] = max(layers[layer], tally.calls_of_a_pass)
        return skipped + layers.total() * sum(self.passes[name] for name in self.branches if name not in attended)

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


def nbytes(kept: object) -> int:
    """Bytes of all tensors in a nesting of containers and objects, each storage once."""
    storages = (x.untyped_storage() for x in _tensors(kept, set()))
    return sum({(str(s.device), s.data_ptr()): s.nbytes() for s in storages}.values())


def _tensors(kept: object, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(kept) in seen:
        return
    seen.add(id(kept))
    if torch.is_tensor(kept):
        yield kept
        return
    parts: Iterable[object] = ()
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


def _sum(numbers: Iterable[Number]) -> Number:
    """Sum of numbers and tensors of one element, in double precision; on the device if any of them is there."""
    whole: Number = 0.0
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


def _plus(a: Number, b: Number) -> Number:
    return a + b.to(a.device, non_blocking=True) if torch.is_tensor(a) and torch.is_tensor(b) else a + b
