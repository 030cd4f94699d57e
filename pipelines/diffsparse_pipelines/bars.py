"""Progress of long work: a bar on a terminal; in a file or a pipe a line every few seconds. Wants rich."""

from __future__ import annotations

import time
from typing import Any

from rich import progress as parts
from rich.console import Console

from diffsparse_pipelines.tables import duration

PACE = 5.0  # seconds between two lines on work that is under way
_PERIOD = 600.0  # seconds of work from which the time left is told: one unit may take minutes


class Bar(parts.Progress):
    """Counts, time spent and time left: there with its first task, and gone when done."""

    def __init__(self, console: Console) -> None:
        columns = parts.TextColumn("{task.description}"), parts.BarColumn(), parts.MofNCompleteColumn()
        times = parts.TimeElapsedColumn(), parts.TimeRemainingColumn()
        super().__init__(*columns, *times, console=console, transient=True, speed_estimate_period=_PERIOD)

    def __enter__(self) -> Bar:
        return self

    def add_task(self, *args: Any, **kwargs: Any) -> parts.TaskID:
        self.start()
        return super().add_task(*args, **kwargs)

    def stop(self) -> None:
        if self.live.is_started:
            super().stop()

    def say(self, line: str) -> None:
        """Print a line above what is shown."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)


class Lines(Bar):
    """The same as lines: one each time that work has moved on and the last line is `PACE` seconds old."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._said, self._told = time.monotonic(), list[float]()

    def start(self) -> None:
        """Nothing is drawn."""

    def advance(self, task_id: parts.TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell()

    def update(self, task_id: parts.TaskID, **kwargs: Any) -> None:
        super().update(task_id, **kwargs)
        self._tell()

    def say(self, line: str) -> None:
        self._said = time.monotonic()
        super().say(line)

    def _tell(self) -> None:
        done = [task.completed for task in self.tasks]
        if time.monotonic() - self._said >= PACE and any(done) and done != self._told:
            self._told = done
            self.say(counted([(task.description, task.completed, task.total) for task in self.tasks], *self._times()))

    def _times(self) -> tuple[float, float | None]:
        first = self.tasks[0]
        sure = first.completed >= first.fields.get("sure", 0)  # each kind of unit has been there, slow ones too
        return first.elapsed or 0.0, first.time_remaining if sure else None


def counted(tasks: list[tuple[str, float, float | None]], spent: float, left: float | None) -> str:
    """One line on tasks, each with what is done and what there is: `runs 3 of 9, steps 7 of 15: 34 s, ...`."""
    done = ", ".join(f"{name} {done:g} of {total:g}" for name, done, total in tasks if total is not None)
    rest = f", about {duration(left)} left" if left else ""
    return f"{done}: {duration(spent)}{rest}"
