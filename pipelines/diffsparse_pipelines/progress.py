"""What people see of long work: how far, how long still."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def bar(console: Console) -> Progress:
    """A progress display with counts, time spent and time left, which disappears when done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def terminal() -> Console:
    """The console to print on; wide enough for tables where the output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
