"""What people see of long work and of its results: by rich where it is installed, as plain text where it is not.

`say`, `track` and `show_table` do with and without rich; `terminal` and `bar` are rich's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from diffsparse.cli import RICH

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")


def bar(console: Console) -> Progress:
    """A progress display with counts, time spent and time left: there with its first task, and gone when done."""
    from rich import progress as parts

    class Bar(parts.Progress):
        def __enter__(self) -> Bar:
            return self

        def add_task(self, *args: Any, **kwargs: Any) -> parts.TaskID:
            self.start()
            return super().add_task(*args, **kwargs)

        def stop(self) -> None:
            if self.live.is_started:
                super().stop()

    columns = parts.TextColumn("{task.description}"), parts.BarColumn(), parts.MofNCompleteColumn()
    times = parts.TimeElapsedColumn(), parts.TimeRemainingColumn()
    return Bar(*columns, *times, console=console, transient=True)


def terminal() -> Console:
    """The console to print on; wide enough for tables where the output goes to a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)


def say(text: str, highlight: bool = True) -> None:
    """Print lines, however long; numbers and names in colours, if `highlight`."""
    if RICH:
        terminal().print(text, soft_wrap=True, markup=False, highlight=highlight)
    else:
        print(text)


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a progress bar that counts them."""
    if not RICH:
        yield from items
        return
    with bar(terminal()) as progress:
        yield from progress.track(items, description=what)


def show_table(
    rows: list[list[str]], alignment: str, headings: Sequence[str] = (), title: str = "", wrap: bool = False
) -> None:
    """Print texts in columns, each aligned by its letter in `alignment`, "l" or "r".

    Without headings it is a list of facts: the first column names them, and the last may be long.

    Args:
        rows: texts, one for each column.
        alignment: a letter for each column.
        headings: of the columns.
        title: above the table.
        wrap: break texts of columns that don't fit, rather than cutting them off.
    """
    if RICH:
        _show_rich(rows, alignment, headings, title, wrap)
    else:
        lines = [list(headings), *rows] if headings else rows
        print("\n".join([*filter(None, [title]), *aligned(lines, alignment)]))


def aligned(lines: list[list[str]], alignment: str) -> list[str]:
    """Lines of cells as plain text, two spaces between columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    side = {"l": str.ljust, "r": str.rjust}
    sized = (zip(line, alignment, widths, strict=True) for line in lines)
    return ["  ".join(side[letter](cell, width) for cell, letter, width in line).rstrip() for line in sized]


def _show_rich(rows: list[list[str]], alignment: str, headings: Sequence[str], title: str, wrap: bool) -> None:
    from rich import box
    from rich.table import Column, Table

    sides: dict[str, Literal["left", "right"]] = {"l": "left", "r": "right"}
    columns = [Column(justify=sides[letter], no_wrap=not wrap, overflow="fold") for letter in alignment]
    if headings:
        for column, heading in zip(columns, headings, strict=True):
            column.header = heading
        table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
    else:
        columns[0].style, columns[-1].no_wrap, columns[-1].overflow = "bold", False, "fold"
        table = Table(*columns, title=title or None, box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    terminal().print(table, highlight=bool(headings))
