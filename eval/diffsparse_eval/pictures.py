"""Pictures of an experiment: dense and each strategy side by side, and fidelity over work and speed.

`python -m diffsparse_eval.pictures FOLDER FILE.png` draws the first of them from a folder of `diffsparse evaluate`.
"""

from __future__ import annotations

import re
import sys
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from diffsparse_eval import style
from diffsparse_eval.experiment import RESULTS, load
from diffsparse_eval.report import doubts, groups
from diffsparse_eval.sheet import Strip, draw
from diffsparse_pipelines import media
from diffsparse_pipelines.tables import mean_and_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from diffsparse_eval.rows import ResultRow

_KNOBS = re.compile(r"(?<=\w) \d[\d.]*|:[^/]*(?=/)")  # of a strategy, its sparsity; of a step cache, all


def write_sheet(rows: list[ResultRow], prompt: str, seed: int, out: Path, file: Path | None = None) -> None:
    """Draw one prompt and seed, the first of an experiment: dense, each strategy, and how they differ.

    Args:
        rows: of an experiment; the dense one is there for its prompt and seed.
        prompt, seed: whose videos are shown.
        out: the folder with their files.
        file: the picture; `sheet.png` in that folder if None.

    Raises:
        InputFileError: a video can't be read. OutputFileError: the picture can't be written.
    """
    shown = [row for group in groups(rows).values() for row in group if (row["prompt"], row["seed"]) == (prompt, seed)]
    dense = media.read(out / next(row for row in shown if row["strategy"] == "dense")["file"])
    compared = [row for row in shown if row["strategy"] != "dense"] or shown
    stacked = any("/" in row["label"] for row in compared)
    strips = [Strip(_name(row["label"], stacked), _figures(row), media.read(out / row["file"])) for row in compared]
    draw(prompt, f"{_facts(shown[0])} {doubts(rows).strip()}".strip(), dense, strips, file or out / "sheet.png")


def _name(label: str, stacked: bool) -> str:
    """A label as people read it; beside step caches, with what it is."""
    cache, slash, strategy = label.rpartition("/")
    if not stacked:
        return label
    if not slash:
        return f"sparse alone: {label}"
    return f"step cache alone: {cache}" if strategy == "dense" else f"both: {cache} and {strategy}"


def _figures(row: ResultRow) -> str:
    psnr = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
    return f"{psnr}, {row['speedup']:.2f}x"


def _facts(row: ResultRow) -> str:
    return (
        f"{row['model']}, {row['size']}, {row['steps']} steps. Dense takes {row['dense_seconds']:.1f} s on "
        f"{row['device']}. dB: PSNR to the dense frames. x: speed-up of the whole run."
    )


def write_tradeoff(rows: list[ResultRow], out: Path) -> None:
    """Write `tradeoff.png` into `out`: mean PSNR and its 95 % interval over work and over speed-up.

    One line for each strategy, through its sparsities, with its name beside the end.
    """
    lines = _lines(rows)
    with style.drawn(style.LIGHT):
        names = 0.105 * max(map(len, lines), default=0)  # inches
        width, height = 10.5 + names, max(5.0, 0.24 * len(lines) + 1)
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(0.75 / width, 0.7 / height, 1 - (0.4 + names) / width, 1 - 0.2 / height, 0.06)
        panels = {"density": "share of attention computed, dense steps included", "speedup": "speed-up, end to end"}
        for panel, (column, text) in zip(axes, panels.items(), strict=True):
            for name, points in lines.items():
                _line(panel, name, sorted(points, key=itemgetter(column)), column)
            panel.set_xlabel(text)
            panel.grid()
        axes[0].set_ylabel("PSNR to the dense video, dB")
        style.label_ends(axes[1], [_end(name, points) for name, points in lines.items()])
        style.save(figure, out / "tradeoff.png")


def _line(panel: Axes, name: str, points: list[dict[str, float]], column: str) -> None:
    x, y, halves = ([point[key] for point in points] for key in (column, "psnr_db", "half"))
    panel.errorbar(x, y, halves, capsize=2, linewidth=1.6, **style.line(name))


def _end(name: str, points: list[dict[str, float]]) -> style.End:
    last = max(points, key=itemgetter("speedup"))
    return style.End(last["speedup"], last["psnr_db"], name, style.colour(name, style.LIGHT))


def _lines(rows: list[ResultRow]) -> dict[str, list[dict[str, float]]]:
    """The means of each strategy's rows at each sparsity and cache, by its label without these numbers."""
    lines: dict[str, list[dict[str, float]]] = {}
    for label, group in groups(rows).items():
        differing = [row for row in group if row["psnr_db"] is not None and row["strategy"] != "dense"]
        if not differing:
            continue  # identical, as dense is
        mean, half = mean_and_interval([row["psnr_db"] or 0.0 for row in differing])
        point = {
            "density": float(np.mean([row["density"] for row in differing])),
            "speedup": float(np.mean([row["speedup"] for row in differing])),
            "psnr_db": mean,
            "half": half or 0.0,
        }
        lines.setdefault(_KNOBS.sub("", label), []).append(point)
    return lines


def main(names: list[str]) -> None:
    """Draw the first prompt and seed of a folder of results."""
    if len(names) != 2:
        print("usage: python -m diffsparse_eval.pictures FOLDER FILE.png", file=sys.stderr)
        sys.exit(2)
    folder, file = map(Path, names)
    rows: list[ResultRow] = load(folder / RESULTS)["rows"]
    write_sheet(rows, rows[0]["prompt"], rows[0]["seed"], folder, file)


if __name__ == "__main__":
    main(sys.argv[1:])
