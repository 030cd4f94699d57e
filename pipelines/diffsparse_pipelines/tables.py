"""Numbers as texts, and texts as tables: for pages, and for terminals of any width."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

FEWEST = 5  # values below which a confidence interval says more of their number than of them
_GAP = 2  # spaces between columns
_LEGIBLE, _NARROW = 23, 8  # letters of a name: below the first, spare columns go; the second it always has
_BREAKS = re.compile(r"[^\s/:,]+[/:,]*\s*|[/:,]+\s*|\s+")  # a line may end after each


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column is a name, the others numbers."""
    ruled = [headings, ["---", *["---:"] * (len(headings) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def spliced(page: str, begin: str, made: str, end: str) -> str:
    """A page with `made` between two marks, in place of what stood there."""
    before, rest = page.split(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval (Student's t).

    Args:
        values: at least one.

    Returns:
        The mean, and half of the interval; None in its place for fewer than five values.
    """
    import numpy as np
    from scipy.stats import sem, t

    mean = float(np.mean(values))
    return mean, None if len(values) < FEWEST else float(sem(values) * t.ppf(0.975, len(values) - 1))


def spread(values: Sequence[float], form: str) -> str:
    """Values as a text: mean ± half of its 95 % interval; of fewer than `FEWEST` the median, and the range if it shows.

    >>> spread([40.0, 42.0, 43.0], ".1f")
    '42.0 (40.0 to 43.0)'

    Args:
        values: at least one.
        form: of a number, as `format` takes it.
    """
    from statistics import median

    mean, half = mean_and_interval(values)
    if half is None:
        low, high = format(min(values), form), format(max(values), form)
        return format(median(values), form) + (f" ({low} to {high})" if low != high else "")
    shown = format(half, form)
    return format(mean, form) + (f" ± {shown}" if float(shown) else "")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a text."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def significant(value: float) -> str:
    """A positive number with three significant digits, or with all that stand before its decimal point.

    >>> significant(1.4321), significant(1567.8)
    ('1.43', '1,568')
    """
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


class Laid(NamedTuple):
    """A table as lines.

    head: the headings and a rule; none without headings.
    body: the rows.
    first: letters of the first column.
    left_out: headings of columns that did not fit.
    """

    head: list[str]
    body: list[str]
    first: int
    left_out: list[str]


def laid_out(
    rows: Sequence[Sequence[str]], alignment: str, headings: Sequence[str], width: int, spare: Sequence[str] = ()
) -> Laid:
    """Rows as lines of at most `width` letters; texts on the left are broken, numbers on the right never.

    Args:
        rows: texts, one for each column; a text may have several lines.
        alignment: a letter for each column, "l" or "r".
        headings: of the columns; none for a list of facts.
        width: letters of a line. Where not even broken texts fit, lines are longer.
        spare: headings of columns to leave out, the first one first, before names become hard to read.
    """
    headings = list(headings) or [""] * len(alignment)
    columns = [
        _Column.of(heading, [row[i] for row in rows], side)
        for i, (heading, side) in enumerate(zip(headings, alignment, strict=True))
    ]
    kept, left_out, waiting = list(range(len(columns))), [], list(spare)
    while waiting and _over([columns[i] for i in kept], width):
        left_out.append(waiting.pop(0))
        kept.remove(headings.index(left_out[-1]))
    widths, sides = _narrowed([columns[i] for i in kept], width), [alignment[i] for i in kept]
    body = [line for row in rows for line in _lines([row[i] for i in kept], sides, widths)]
    if not any(headings):
        return Laid([], body, widths[0], left_out)
    head = _lines([headings[i] for i in kept], sides, widths)
    return Laid([*head, "-" * max(map(len, [*head, *body]))], body, widths[0], left_out)


class _Column(NamedTuple):
    """How wide a column would like to be, how wide it is legible, and how wide it has to be."""

    natural: int
    legible: int
    least: int

    @classmethod
    def of(cls, heading: str, cells: Sequence[str], side: str) -> _Column:
        word = max((len(part) for part in heading.split()), default=0)
        natural = max([word, *(len(line) for cell in cells for line in cell.split("\n"))])
        if side == "r":
            return cls(natural, natural, natural)
        return cls(natural, min(natural, max(word, _LEGIBLE)), min(natural, max(word, _NARROW)))


def _over(columns: Sequence[_Column], width: int) -> bool:
    """Whether columns that are just legible are too wide."""
    return sum(column.legible for column in columns) + _GAP * (len(columns) - 1) > width


def _narrowed(columns: Sequence[_Column], width: int) -> list[int]:
    """Widths: natural ones, and where they don't fit, the widest that can give way do so first."""
    widths = [column.natural for column in columns]
    for _ in range(sum(widths) + _GAP * (len(widths) - 1) - width):
        able = [i for i, column in enumerate(columns) if widths[i] > column.least]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def _lines(cells: Sequence[str], sides: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One row: as many lines as its longest text wants."""
    texts = [broken(cell, width) for cell, width in zip(cells, widths, strict=True)]
    side = {"l": str.ljust, "r": str.rjust}
    gap, lines = " " * _GAP, []
    for number in range(max(map(len, texts))):
        parts = [parts[number] if number < len(parts) else "" for parts in texts]
        lines.append(gap.join(side[s](part, w) for part, s, w in zip(parts, sides, widths, strict=True)).rstrip())
    return lines


def broken(text: str, width: int) -> list[str]:
    """The lines of a text, broken after spaces and marks, or anywhere in longer words."""
    lines = []
    for line in text.split("\n"):
        now = ""
        for part in _BREAKS.findall(line):  # a part ends where a line may
            if now and len((now + part).rstrip()) > width:
                lines.append(now.rstrip())
                now = ""
            now += part
            while len(now.rstrip()) > width:
                lines.append(now[:width])
                now = now[width:]
        lines.append(now.rstrip())
    return lines
