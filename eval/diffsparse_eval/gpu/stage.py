"""The stages, and how one runs: in a child that says what it tries, and then what came of it.

A stage is a module with `jobs(options)`, names of children, and `run(job, options, talk)`, what such a child does.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch

from diffsparse_kernels.case import Case
from diffsparse_kernels.child import say

Row = dict[str, Any]


class Options(NamedTuple):
    """device: cuda or cpu. shrink: divides tokens. strangers: kernels of one's own to try too, as module:attribute.

    without: labels of kernels that hung or crashed; stages that only time them leave them out.
    """

    device: str
    shrink: int
    strangers: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device.startswith("cuda")

    def arguments(self) -> list[str]:
        """As the command line has them."""
        named = ["--kernels", ",".join(self.strangers)] if self.strangers else []
        return ["--device", self.device, "--shrink", str(self.shrink), *named]


def label(kernel: str, masked: bool) -> str:
    """A kernel, with a key mask or without."""
    return f"{kernel}+mask" if masked else kernel


def usual(words: list[str], masked: bool) -> bool:
    """Whether a case, by its words, is what most models ask for: attention of bfloat16 in blocks of one size."""
    case = Case.read(words)
    square = case.q_block == case.kv_block and case.head_dim == 128 and not case.axes
    return case.kind == "attend" and case.dtype == torch.bfloat16 and square and case.masked == masked


class Stage(NamedTuple):
    """name: of the rows. module: in this package. seconds: its share of `WHOLE`. silence: seconds without a word after
    which a child is killed. at_once: children side by side.
    """

    name: str
    module: str
    seconds: float
    silence: float
    at_once: int = 1


STAGES = (  # most telling first
    Stage("facts", "facts", 15, 30),
    Stage("compile", "compiling", 55, 60, 16),
    Stage("numerics", "numerics", 90, 20, 4),
    Stage("sanitizer", "sanitizer", 25, 30),
    Stage("speed", "speed", 110, 30),
    Stage("step", "step", 60, 30),
    Stage("end to end", "whole", 85, 30),
    Stage("sanity", "sanity", 30, 30),
    Stage("tune", "tuning", 10, 20),
)
WHOLE = sum(stage.seconds for stage in STAGES)


def module_of(stage: Stage) -> Any:
    """Imported now, for some want packages that others don't."""
    return import_module(f"diffsparse_eval.gpu.{stage.module}")


class Talk:
    """A child's words to its parent. Attempts are numbered: after one that ended the child, the next goes on behind it.

    failed: the numbers of those that ended a child. first: of the attempts that are new, earlier ones have rows.
    end: by `time.monotonic`, when the child should be through.
    """

    def __init__(self, failed: tuple[int, ...] = (), first: int = 0, end: float = math.inf) -> None:
        self._next, self._failed, self._first, self.end = 0, failed, first, end

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def attempt(self, kernel: str, shape: str, measure: Callable[[], Row], again: bool = False, **known: Any) -> Row:
        """Say what is tried, try it, say what came of it -> that, or nothing where an earlier child did it.

        An exception is an outcome, too.

        again: try it in this child too, if it did not end the earlier one, for the sake of what comes after.
        """
        known = {"kernel": kernel, "shape": shape, **known}
        number, self._next = self._next, self._next + 1
        if number in self._failed or (number < self._first and not again):
            return {}
        say(number=number, trying=known)
        try:
            found = {"verdict": "done", **measure()}
        except ImportError as error:
            found = {"verdict": "left out", "why": str(error)}
        except Exception as error:
            found = {"verdict": "raised", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if number >= self._first:
            self.row(number, **known, **found)
        if found["verdict"] == "raised" and torch.cuda.is_available():
            leave_if_broken()
        return found

    def row(self, number: int | None = None, **row: Any) -> None:
        """A row that needs no attempt, or that of one."""
        say(row=row, **({} if number is None else {"number": number}))

    def plan(self, jobs: dict[str, list[str] | str]) -> None:
        """The children of each stage, or why it has none."""
        say(jobs=jobs)

    def alive(self) -> None:
        """A sign that this child does not hang."""
        say(alive=True)

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Signs of life for so long, around what compiles or tries kernels, and so is silent for long."""
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

    def facts(self, **facts: Any) -> None:
        """What holds for all rows."""
        say(facts=facts)

    def missing(self, what: str) -> None:
        """Nothing can be done here, and why."""
        say(missing=what)


def leave_if_broken() -> None:
    """End this process if its context is: after an illegal access all fails, and another process starts anew."""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        sys.exit(f"the context is broken: {error}")
