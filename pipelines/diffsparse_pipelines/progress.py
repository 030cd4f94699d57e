"""What people see of long work and of its results: by rich where it is installed, as plain text where it is not.

`say`, `status`, `track` and `show_table` do with and without rich; `terminal` and `bar` are rich's own. All of them do
with and without a terminal: in a file or a pipe a line every few seconds takes the place of a bar, and tables are as
wide as $COLUMNS says, or 80.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from diffsparse.cli import RICH
from diffsparse_pipelines import tables

if TYPE_CHECKING:
    from rich.console import Console

    from diffsparse_pipelines.bars import Bar

T = TypeVar("T")


def bar(console: Console) -> Bar:
    """A progress display: there with its first task, and gone when done; lines where there is no terminal."""
    from diffsparse_pipelines.bars import Bar, Lines

    return Bar(console) if console.is_interactive else Lines(console)


def terminal() -> Console:
    """The console to print on."""
    from rich.console import Console

    return Console()


def width() -> int:
    """Letters in a line of the terminal; of a file or a pipe what $COLUMNS says, or 80."""
    return shutil.get_terminal_size((80, 24)).columns


def say(text: str, highlight: bool = True, fill: bool = False) -> None:
    """Print lines, however long.

    Args:
        text: the lines.
        highlight: show numbers and names in colours.
        fill: break lines between words to fit the width; not for what people copy.
    """
    if fill:
        text = "\n".join(textwrap.fill(line, width(), break_on_hyphens=False) for line in text.splitlines())
    if RICH:
        terminal().print(text, soft_wrap=True, markup=False, highlight=highlight)
    else:
        print(text, flush=True)


def status(text: str) -> AbstractContextManager[object]:
    """Within: the terminal says what goes on; elsewhere it is said once."""
    if RICH and (console := terminal()).is_interactive:
        return console.status(text)
    say(text, highlight=False)
    return nullcontext()


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a progress display that counts them; without rich there is none."""
    if not RICH:
        yield from items
        return
    with bar(terminal()) as progress:
        task = progress.add_task(what, total=len(items))
        for item in items:
            yield item
            progress.advance(task)


def show_table(
    rows: list[list[str]], alignment: str, headings: Sequence[str] = (), title: str = "", spare: Sequence[str] = ()
) -> None:
    """Print texts in columns, each aligned by its letter in `alignment`, "l" or "r".

    Without headings it is a list of facts: the first column names them, and the last may be long. Texts on the left
    are broken where the width lacks, numbers never.

    Args:
        rows: texts, one for each column; a text may have several lines.
        alignment: a letter for each column.
        headings: of the columns, with their units.
        title: above the table.
        spare: headings of columns that are left out, the first one first, where the width lacks; a line tells which.
    """
    found = tables.laid_out(rows, alignment, headings, width(), spare)
    if title:
        say(title, highlight=False, fill=True)
    if RICH:
        _show_rich(found)
    else:
        print("\n".join([*found.head, *found.body]), flush=True)
    if found.left_out:
        say(f"not shown at this width: {', '.join(found.left_out)}", highlight=False, fill=True)


def _show_rich(found: tables.Laid) -> None:
    from rich.text import Text

    console = terminal()
    for line in found.head:
        console.print(Text(line, style="bold"), soft_wrap=True)
    for line in found.body:
        if found.head:
            console.print(line, markup=False, soft_wrap=True)
        else:
            text = Text(line)
            text.stylize("bold", 0, found.first)
            console.print(text, soft_wrap=True)
