"""`python -m support.matrix` writes docs/support.md: what holds in which surroundings, as the tests have it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from support.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs/support.md"
_HEAD = """# What works where

Written by `python -m support.matrix` from `tests/library/test_surroundings.py`: each "yes" is a test that compares
with dense attention, or with the same method undisturbed, and that fails where a call is dense without a reason.

"""


def rows(tests: ModuleType) -> Iterator[tuple[str, str]]:
    """Name and title of each surrounding: of the tests that take every method."""
    for name, function in vars(tests).items():
        marks = getattr(function, "pytestmark", [])
        if name.startswith("test_") and any(mark.args[:1] == ("method",) for mark in marks):
            yield name.removeprefix("test_"), str(function.__doc__).strip().splitlines()[0]


def page(tests: ModuleType) -> str:
    """The page as it should be."""
    limits, notes = tests.LIMITS, dict[str, int]()
    lines = [f"| surroundings | {' | '.join(METHODS)} |", f"|---|{':---:|' * len(METHODS)}"]
    for name, title in rows(tests):
        reasons = [limits.get((name, method)) for method in METHODS]
        cells = ["yes" if why is None else f"[{notes.setdefault(why, len(notes) + 1)}]" for why in reasons]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", *(f"[{number}] {why}" for why, number in notes.items())]
    return _HEAD + "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(importlib.import_module("library.test_surroundings")))
    print(PAGE.name)
