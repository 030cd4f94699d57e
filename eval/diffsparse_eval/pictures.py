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
    from diffsparse_eval.rows import ResultRow

_WIDTH = 11.0  # inches of the plot
_NAMES_WIDE, _HANDLE = 115, 7  # letters of a line of names under the plot; what a name's marker and gap take of them
_PANELS = {  # column -> (title, what it counts)
    "work": ("Fidelity over work", "work: attention computed, as a share of a dense run"),
    "speedup": ("Fidelity over speed", "speed-up of the whole run"),
}
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

    One line for each strategy, through its sparsities; the names stand under both panels, where no data is.
    """
    with style.drawn(style.LIGHT):
        style.save(tradeoff(rows), out / "tradeoff.png")


def tradeoff(rows: list[ResultRow]) -> Figure:
    """The picture that `write_tradeoff` writes."""
    lines = _lines(rows)
    looks, stacked = style.lines(list(lines)), any("/" in name for name in lines)
    names = {name: _name(name, stacked) for name in lines}
    wide = _NAMES_WIDE // (max(map(len, names.values()), default=0) + _HANDLE) or 1
    figure = Figure(figsize=(_WIDTH, 5.2 + 0.25 * -(-len(lines) // wide)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (column, (title, text)) in zip(axes, _PANELS.items(), strict=True):
        for name, points in lines.items():
            x, y, halves = zip(*sorted(itemgetter(column, "psnr_db", "half")(point) for point in points), strict=True)
            panel.errorbar(x, y, halves, label=names[name], capsize=2, linewidth=1.6, **looks[name])
        panel.set_title(title)
        panel.set_xlabel(text)
        panel.margins(0.1)
        panel.grid()
    axes[0].set_ylabel("PSNR to the dense video, dB")
    if lines:
        drawn, texts = axes[0].get_legend_handles_labels()
        handles = [each.lines[0] for each in drawn]  # without the bars
        figure.legend(handles, texts, loc="outside lower center", ncols=wide, frameon=False)
    return figure


def _lines(rows: list[ResultRow]) -> dict[str, list[dict[str, float]]]:
    """The means of each strategy's rows at each sparsity and cache, by its label without these numbers."""
    lines: dict[str, list[dict[str, float]]] = {}
    for label, group in groups(rows).items():
        differing = [row for row in group if row["psnr_db"] is not None and row["strategy"] != "dense"]
        if not differing:
            continue  # identical, as dense is
        mean, half = mean_and_interval([row["psnr_db"] or 0.0 for row in differing])
        point = {
            "work": float(np.mean([row.get("work", row["density"]) for row in differing])),
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
