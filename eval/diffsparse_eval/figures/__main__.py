"""Draw the figures of the docs: `python -m diffsparse_eval.figures [NAMES...]`, by default all.

Each is written twice, `docs/figures/NAME-light.svg` and `NAME-dark.svg`, transparent, from committed rows, from the
library's own objects, or from ten seconds of the embedded model; the same bytes each time on one machine. `loss` goes
to the card of the embedded model instead, as PNG.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from diffsparse_eval import style
from diffsparse_eval.figures.table import CARD, FIGURES
from diffsparse_pipelines import tiny

FOLDER = Path(__file__).parents[3] / "docs/figures"
CARD_FOLDER = Path(tiny.__file__).parent / "card"


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


def draw_card(names: Sequence[str], folder: Path = CARD_FOLDER) -> list[Path]:
    """Write pictures of the embedded model's card, on white paper; the files."""
    files = []
    for name in names:
        files.append(folder / f"{name}.png")
        with style.drawn(style.LIGHT):
            style.save(CARD[name](style.LIGHT), files[-1])
    return files


def main(names: Sequence[str]) -> None:
    """Draw the figures of these names; all where none is given."""
    known = [*FIGURES, *CARD]
    unknown = [name for name in names if name not in known]
    if unknown or not FOLDER.parent.is_dir():
        print(f"error: wanted, in a checkout, some of {', '.join(known)}; got {' '.join(unknown)}", file=sys.stderr)
        sys.exit(2)
    wanted = names or known
    for path in draw([name for name in wanted if name in FIGURES]):
        print(path)
    for path in draw_card([name for name in wanted if name in CARD]):
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
