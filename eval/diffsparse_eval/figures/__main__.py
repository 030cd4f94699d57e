"""Draw the figures of the docs: `python -m diffsparse_eval.figures [NAMES...]`, by default all.

Each is written twice, `docs/figures/NAME-light.svg` and `NAME-dark.svg`, transparent, from committed rows, from the
library's own objects, or from ten seconds of the embedded model; the same bytes each time on one machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from diffsparse_eval import style
from diffsparse_eval.figures.table import FIGURES

FOLDER = Path(__file__).parents[3] / "docs/figures"


def draw(names: Sequence[str], folder: Path = FOLDER) -> list[Path]:
    """Write figures into a folder; the files, light and dark."""
    folder.mkdir(exist_ok=True)
    files = []
    for name in names:
        for theme in style.THEMES:
            files.append(folder / f"{name}-{theme.name}.svg")
            with style.drawn(theme):
                style.save(FIGURES[name](theme), files[-1])
    return files


def main(names: Sequence[str]) -> None:
    """Draw the figures of these names; all where none is given."""
    unknown = [name for name in names if name not in FIGURES]
    if unknown or not FOLDER.parent.is_dir():
        print(f"error: wanted, in a checkout, some of {', '.join(FIGURES)}; got {' '.join(unknown)}", file=sys.stderr)
        sys.exit(2)
    for path in draw(names or list(FIGURES)):
        print(path.relative_to(FOLDER.parents[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
