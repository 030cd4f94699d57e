"""The stages, and how one runs: in a child process that reports what it tries, and then the outcome.

A stage is a module with `jobs(options)`, names of children, and `run(job, options, channel)`, what such a child does.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol, Unpack, cast

import torch

from diffsparse_eval.rows import AccountFacts, Attempt
from diffsparse_kernels.case import Case
from diffsparse_kernels.child import say

if TYPE_CHECKING:
    from diffsparse.site.report import Report


class Options(NamedTuple):
    """Options of the account, for all stages.

    Attributes:
        device: "cuda" or "cpu".
        shrink: divides tokens, on a machine without a GPU.
        custom: kernels of one's own to try beside ours, as module:attribute.
        without: labels of kernels that hung or crashed; stages that only time kernels leave them out.
    """

    device: str
    shrink: int
    custom: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device.startswith("cuda")

    def arguments(self) -> list[str]:
        """The same as arguments of the command line."""
        custom = ["--kernels", ",".join(self.custom)] if self.custom else []
        return ["--device", self.device, "--shrink", str(self.shrink), *custom]


def label(kernel: str, masked: bool) -> str:
    """A kernel, with a key mask or without."""
    return f"{kernel}+mask" if masked else kernel


def usual(words: list[str], masked: bool) -> bool:
    """Whether a case, by its words, is what most models need: attention of bfloat16 in blocks of one size."""
    case = Case.read(words)
    square = case.q_block == case.kv_block and case.head_dim == 128 and not case.axes
    return case.kind == "attend" and case.dtype == torch.bfloat16 and square and case.masked == masked


class Stage(NamedTuple):
    """One stage of the account.

    Attributes:
        name: of the stage, in the rows.
        module: of this package.
        seconds: share of `WHOLE`.
        silence: seconds without a message after which a child is killed.
        at_once: children side by side.
    """

    name: str
    module: str
    seconds: float
    silence: float
    at_once: int = 1


STAGES = (  # most important first
    Stage("facts", "facts", 10, 30),
    Stage("compile", "compiling", 55, 60, 16),
    Stage("numerics", "numerics", 85, 20, 4),
    Stage("sanitizer", "sanitizer", 20, 30),
    Stage("speed", "speed", 95, 30),
    Stage("step", "step", 55, 30),
    Stage("accelerate", "accelerated", 65, 30),
    Stage("tune", "tuning", 20, 20),
    Stage("end to end", "whole", 60, 30),
    Stage("sanity", "sanity", 25, 30),
)
WHOLE = sum(stage.seconds for stage in STAGES)


def reported(report: Report) -> Attempt:
    """What a run's report says of the kernels, as a part of a row."""
    return {
        "density": report.density,
        "backends": report.backends,
        "fallbacks": report.fallbacks,
        "passed_over": report.passed_over,
    }


class StageModule(Protocol):
    """What the module of a stage has."""

    def jobs(self, options: Options) -> list[str]:
        """Names of its children."""

    def run(self, job: str, options: Options, channel: Channel) -> None:
        """What a child does."""


def module_of(stage: Stage) -> StageModule:
    """The module of a stage; imported when it is needed, since some need packages that others don't."""
    return cast(StageModule, import_module(f"diffsparse_eval.gpu.{stage.module}"))


class Channel:
    """Messages of a child to its parent.

    Attempts are numbered, so that after one that ended the child another child goes on with the next.

    Attributes:
        failed: the numbers of those that ended a child.
        first: number of the first new attempt; earlier ones have their rows.
        end: when the child should be done, by `time.monotonic`.
    """

    def __init__(self, failed: tuple[int, ...] = (), first: int = 0, end: float = math.inf) -> None:
        self._next, self._failed, self._first, self.end = 0, failed, first, end

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def attempt(
        self,
        kernel: str,
        shape: str,
        measure: Callable[[], Attempt],
        again: bool = False,
        known: Attempt | None = None,
    ) -> Attempt:
        """Report what is tried, try it, report the outcome; an exception is an outcome, too.

        Args:
            kernel: what is tried.
            shape: on which size.
            measure: tries it.
            again: repeat an attempt of an earlier child that did not end it, for what comes after.
            known: more fields of the row.

        Returns:
            The outcome; empty if an earlier child has it.
        """
        number, self._next = self._next, self._next + 1
        if number in self._failed or (number < self._first and not again):
            return {}
        trying: Attempt = {"kernel": kernel, "shape": shape, **(known or {})}
        say(number=number, trying=trying)
        found = _outcome(measure)
        if number >= self._first:
            self._send({**trying, **found}, number)
        if found["verdict"] == "raised" and torch.cuda.is_available():
            leave_if_broken()
        return found

    def row(self, **row: Unpack[Attempt]) -> None:
        """Report a row that needs no attempt."""
        self._send(row)

    def clocks(self, clocks: dict[str, str]) -> None:
        """Report the device's clocks, by nvidia-smi's own names."""
        say(row={"kernel": "clocks", "shape": "as they are", "verdict": "done", **clocks})

    def _send(self, row: Attempt, number: int | None = None) -> None:
        say(row=row, **({} if number is None else {"number": number}))

    def plan(self, jobs: dict[str, list[str] | str]) -> None:
        """Report the children of each stage, or why it has none."""
        say(jobs=jobs)

    def alive(self) -> None:
        """Report that this child does not hang."""
        say(alive=True)

    @contextmanager
    def heartbeat(self, seconds: float) -> Iterator[None]:
        """Within: `alive` every 5 s for so many seconds, around what compiles or tries kernels and so is silent."""
        over, end = threading.Event(), time.monotonic() + seconds

        def tick() -> None:
            while time.monotonic() < end and not over.wait(5):
                self.alive()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def facts(self, **facts: Unpack[AccountFacts]) -> None:
        """Report what holds for all rows."""
        say(facts=facts)

    def missing(self, what: str) -> None:
        """Report why nothing can be done here."""
        say(missing=what)


def _outcome(measure: Callable[[], Attempt]) -> Attempt:
    try:
        return {"verdict": "done", **measure()}
    except ImportError as error:
        return {"verdict": "left out", "why": str(error)}
    except Exception as error:
        return {"verdict": "raised", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def leave_if_broken() -> None:
    """End this process if its CUDA context is broken: after an illegal access all calls fail, in this process."""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        sys.exit(f"the context is broken: {error}")
