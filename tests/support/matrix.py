"""`python -m support.matrix` writes docs/support.md: what holds in which surroundings, as the tests have it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from support.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs/support.md"
_HEAD = """# Surroundings

Whether diffsparse works in the code that you have: autocast, compile, PEFT, several devices, loops of your own.

Each "yes" is a test that compares with dense attention, or with the same method undisturbed, and that fails where a
call is dense without a reason. What a row means is in the title of the test.

"""
_FOOT = """

## And beside these

- **Step caches**, put on before or after `apply`, by you or by `accelerate`: [Stack with caches](stack.md).
- **Offloading, LoRA, fused projections, other attention backends**, set before or after `apply`:
  [Low memory](recipes/memory.md).
- **Guidance** in one batch or one call after the other; distilled or off.
- **Custom loops** over a bare transformer: passes are counted, or `transformer.cache_context("cond", step_index=i,
  num_inference_steps=n)` tells the step (Diffusers 0.41 on).
- **Not served**: ring attention, UNets, linear attention. A deep copy of an applied model runs dense.

Written by `python -m support.matrix` from `tests/library/test_surroundings.py`.
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
    return _HEAD + "\n".join(lines).rstrip() + _FOOT


if __name__ == "__main__":
    PAGE.write_text(page(importlib.import_module("library.test_surroundings")))
    print(PAGE.name)
