"""Drive an offline search over runs of a pipeline; what it has added up is on disk after each run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsparse.errors import ConfigError, InputFileError, PlanError
from diffsparse.files import if_stopped, locked, writable
from diffsparse.orders.layout import Layout
from diffsparse.plans import sealed
from diffsparse.plans.plan import Plan, fingerprints
from diffsparse.plans.sums import Sums
from diffsparse.schedule import Schedule
from diffsparse.seam.parallel import check_alone
from diffsparse.seam.patch import apply
from diffsparse.seam.targets import models_of


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
