"""Drive an offline search over runs of a pipeline; what it has added up is on disk after each run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffsparse import sealed
from diffsparse.errors import ConfigError, InputFileError, PlanError
from diffsparse.files import if_stopped, locked, writable
from diffsparse.layout import Layout
from diffsparse.parallel import check_alone
from diffsparse.patch import apply, models_of
from diffsparse.plan import Plan, fingerprints
from diffsparse.schedule import Schedule
from diffsparse.site import Site


class Sums:
    """What a search has added up so far: tensors on the CPU by "model.layer.what", and the video they are of."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.layout: Layout | None = None

    def add(self, site: Site, what: str, value: Tensor, shape: tuple[int, ...], at: Any = ...) -> None:
        """Add `value` to place `at` of the tensor `what` [shape] of this layer, zero at first.

        Raises:
            PlanError: the runs differ in size.
        """
        if self.layout not in (None, site.layout.grid):
            raise PlanError(f"all runs of a search want one size; got {self.layout} and {site.layout.grid}")
        self.layout = site.layout.grid
        total = self.tensors.setdefault(f"{site.model}.{site.layer}.{what}", torch.zeros(shape))
        if total.shape != shape:
            raise PlanError(f"all runs of a search want one number of steps; got {total.shape[0]} and {shape[0]}")
        total[at] += value.cpu()

    def has(self, site: Site, what: str) -> bool:
        """Whether anything of that kind was added for this layer."""
        return f"{site.model}.{site.layer}.{what}" in self.tensors

    def of(self, what: str) -> dict[str, Tensor]:
        """All tensors of that kind, by "model.layer"."""
        ending = f".{what}"
        return {name.removesuffix(ending): x for name, x in self.tensors.items() if name.endswith(ending)}


def is_look(site: Site, looks: int) -> bool:
    """Whether this step is one of `looks` evenly spread ones; all are, if nobody knows the run's length."""
    return not site.steps or site.step in {(2 * i + 1) * site.steps // (2 * looks) for i in range(looks)}


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


@dataclass
class _Progress:
    """Where a search stands, and the file that says so."""

    path: Path
    key: str
    done: int = 0
    sums: Sums = field(default_factory=Sums)

    def load(self) -> None:
        """Go on where the file stopped, if there is one.

        Raises:
            InputFileError: it can't be read. ConfigError: it is of another search.
        """
        if not self.path.exists():
            return
        try:
            header, self.sums.tensors = sealed.read(self.path, "search", "delete it to begin anew")
            key, self.done, layout = header["key"], header["done"], header["layout"]
            self.sums.layout = None if layout is None else Layout(**layout)
        except (PlanError, KeyError, TypeError) as error:
            raise InputFileError(f"can't read {self.path}: {error}; delete it to begin anew") from error
        if key != self.key:
            raise ConfigError(
                f"{self.path} is of a search with other settings; delete it, or choose another --out, to begin anew"
            )

    def save(self) -> None:
        layout = None if self.sums.layout is None else vars(self.sums.layout)
        sealed.write(self.path, {"key": self.key, "done": self.done, "layout": layout}, self.sums.tensors)

    def kept(self, runs: int) -> str:
        """What a search that is stopped leaves behind."""
        return f"{self.done} of {runs} runs are kept in {self.path}; the same command goes on with the next"


def partial(out: Path) -> Path:
    """Where the work so far is kept until `out` is written."""
    return out.with_name(f"{out.name}.partial")


def calibrate(
    pipe: Any,
    search: Any,
    calls: Sequence[Callable[[], Any]],
    names: Sequence[str],
    out: Path,
    after_run: Callable[[int], Any] = lambda done: None,
) -> Plan:
    """Run `calls` under each pass of `search`, and write the plan to `out`.

    A search that was killed goes on after the last run that it finished, and ends with the same plan.

    Args:
        pipe: a Diffusers pipeline, or a transformer.
        search: such as `PAROSearch(sparsity=0.8)`.
        calls: functions that run `pipe` once, each with its own prompt and seed, always in the same way.
        names: what tells the calls apart; a search is only continued with the same ones.
        out: a `.safetensors` file; the work so far is kept beside it until the plan is written.
        after_run: told how many runs are done, at first those of an earlier attempt.

    Raises:
        ConfigError: no calls, or the file beside `out` is of another search.
        OutputFileError: `out` can't be written, or another process is at it.
        PlanError: the calls differ in size, or the pipeline never attended.
        UnsupportedModelError: this process sees but a share of the heads.
    """
    if not calls or len(calls) != len(names):
        raise ConfigError(f"a search wants one or more calls, each with a name; got {len(calls)} and {len(names)}")
    check_alone(models_of(pipe))
    writable(out)
    models = fingerprints(models_of(pipe))
    key = hashlib.sha256(json.dumps([repr(search), models, list(names)]).encode()).hexdigest()
    progress, runs = _Progress(partial(out), key), search.passes * len(calls)
    with locked(progress.path, wait=False), if_stopped(lambda: progress.kept(runs)):
        progress.load()
        after_run(progress.done)
        for number in range(progress.done, runs):
            turn, call = divmod(number, len(calls))
            with apply(pipe, search.watcher(turn, progress.sums), schedule=Schedule(dense_first=0)):
                calls[call]()
            progress.done = number + 1
            progress.save()
            after_run(progress.done)
        if progress.sums.layout is None:
            raise PlanError("the runs held no self-attention over a token grid; there is nothing to plan")
        settings, tensors = search.plan(progress.sums)
        plan = Plan(search.strategy, models, progress.sums.layout, settings, tensors)
        plan.save(out)
        progress.path.unlink()
    return plan
