"""Tables of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column is a name, the others numbers."""
    ruled = [headings, ["---", *["---:"] * (len(headings) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def spliced(page: str, begin: str, made: str, end: str) -> str:
    """A page with `made` between two marks, in place of what stood there."""
    before, rest = page.split(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
