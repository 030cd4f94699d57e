"""What a step cache, sparse attention and both together are worth: `python -m diffsparse_eval.stack RESULTS...`.

Results are what `diffsparse evaluate --strategy CACHE/STRATEGY,...` writes, of any model on any machine (`make stack`
does it for the embedded one). Writes `stack.md` and `stack.png` beside the first of them; without any, those of the
project's own, `eval/results/stack-*.json`, and its docs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffsparse.errors import InputFileError
from diffsparse.files import write_text
from diffsparse_eval import charts
from diffsparse_eval.experiment import RESULTS, load
from diffsparse_eval.metrics import mean_and_interval
from diffsparse_eval.report import groups
from diffsparse_eval.rows import ResultRow
from diffsparse_pipelines.tables import markdown_table, spliced, spread

SHARES = (0.5, 0.7, 0.85)  # of attention in a dense step, for which speed is counted
TARGETS = (2.1, 2.5, 3.0)
_IDENTICAL = 100.0  # dB
_ROOT = Path(__file__).parents[2]
_BEGIN, _END = "<!-- stack: made by make stack-tables -->", "<!-- /stack -->"
_KINDS = ("cache alone", "sparse alone", "stack")


class Point(NamedTuple):
    """One setting.

    label: of the setting.
    kind: "cache alone", "sparse alone" or "stack".
    psnr_db: by prompt and seed.
    speedups: measured, likewise: by processor time on a CPU, else by the clock.
    executed, work: shares of steps that reach attention, and of a dense run's attention that is computed.
    """

    label: str
    kind: str
    psnr_db: list[float]
    speedups: list[float]
    executed: float
    work: float

    @property
    def measured(self) -> float:
        """Mean speed-up."""
        return mean(self.speedups)

    def counted(self, share: float) -> float:
        """Speed-up where attention takes `share` of a dense step and nothing but operations takes time."""
        return 1 / (share * self.work + (1 - share) * self.executed)


Speed = Callable[[Point], float]


class Margin(NamedTuple):
    """What the stack gains over a cache alone at that cache's speed, prompt by prompt.

    target: speed that was asked for.
    cache: the cache setting nearest to it.
    speedup: of that setting.
    cache_db, stack_db: mean PSNR at it.
    gain_db, half: mean of the difference, and half of its 95 % interval.
    """

    target: float
    cache: str
    speedup: float
    cache_db: float
    stack_db: float
    gain_db: float
    half: float | None


def points(rows: list[ResultRow]) -> list[Point]:
    """The settings of some rows, without dense."""
    found = []
    for label, group in groups(rows).items():
        name = group[0]["strategy"]
        ran = sorted(group, key=lambda row: (row["prompt"], row["seed"]))
        if name.startswith("dense") or name.endswith("+heads") or all(row["psnr_db"] is None for row in ran):
            continue
        kind = "sparse alone" if "/" not in name else "cache alone" if name.endswith("/dense") else "stack"
        speeds = [row.get("cpu_speedup") or row["speedup"] if _on_cpu(row) else row["speedup"] for row in ran]
        shares = ([row[key] for row in ran] for key in ("executed", "work"))
        found.append(
            Point(
                label,
                kind,
                [_IDENTICAL if row["psnr_db"] is None else row["psnr_db"] for row in ran],
                speeds,
                *map(mean, shares),
            )
        )
    return found


def _on_cpu(row: ResultRow) -> bool:
    return "threads" in row["device"]


def margins(settings: list[Point], speed: Speed, targets: Iterable[float] = TARGETS) -> list[Margin]:
    """At each speed: the cache alone that is nearest to it, and the stack at that cache's speed, interpolated.

    Only settings with no better one at their speed count ("best"), and none beyond the fastest stack. Where all of them
    are faster than the cache, it is the slowest that is meant.
    """
    caches, stacks = (best((p for p in settings if p.kind == kind), speed) for kind in ("cache alone", "stack"))
    found = []
    for target in targets:
        cache = min(caches, key=lambda point: abs(speed(point) - target), default=None)
        if cache is None or not stacks or speed(cache) > speed(stacks[-1]):
            continue
        gains = np.array(_between(stacks, speed, speed(cache))) - np.array(cache.psnr_db)
        gain, half = mean_and_interval([float(each) for each in gains])
        there = mean(cache.psnr_db)
        found.append(Margin(target, cache.label, speed(cache), there, there + gain, gain, half))
    return found


def best(settings: Iterable[Point], speed: Speed) -> list[Point]:
    """Those with no other that is faster and closer to dense, the slowest first."""
    kept: list[Point] = []
    for point in sorted(settings, key=speed, reverse=True):
        if not kept or mean(point.psnr_db) > mean(kept[-1].psnr_db):
            kept.append(point)
    return kept[::-1]


def _between(stacks: list[Point], speed: Speed, at: float) -> list[float]:
    """PSNR of each prompt at a speed between those of settings."""
    by_prompt = zip(*(point.psnr_db for point in stacks), strict=True)
    return [float(np.interp(at, [speed(point) for point in stacks], values)) for values in by_prompt]


def table(settings: list[Point]) -> str:
    """All settings, the slowest first."""
    headings = [
        "setting",
        "PSNR dB",
        "speed-up",
        "steps left",
        "attention left",
        *(f"counted at {s:g}" for s in SHARES),
    ]
    lines = []
    for point in sorted(settings, key=lambda point: point.measured):
        cells = [spread(point.psnr_db, ".1f"), spread(point.speedups, ".2f") + "x"]
        cells += [f"{point.executed:.2f}", f"{point.work:.3f}"]
        lines.append([point.label, *cells, *(f"{point.counted(share):.2f}x" for share in SHARES)])
    return markdown_table(headings, lines)


def margin_table(settings: list[Point]) -> str:
    """What the stack gains at the speeds of caches, measured and counted."""
    ways: list[tuple[str, Speed]] = [("measured", lambda point: point.measured)]
    ways += [(f"counted at {share:g}", partial(Point.counted, share=share)) for share in SHARES]
    headings = ["speed", "cache alone", "its speed-up", "its dB", "stack's dB", "gain"]
    lines = [_margin_line(name, each) for name, speed in ways for each in margins(settings, speed)]
    return markdown_table(headings, lines)


def _margin_line(name: str, each: Margin) -> list[str]:
    gain = f"{each.gain_db:+.1f}" + ("" if each.half is None else f" ± {each.half:.1f}")
    numbers = [f"{each.speedup:.2f}x", f"{each.cache_db:.1f}", f"{each.stack_db:.1f}"]
    return [f"{each.target:g}x {name}", each.cache.removesuffix("/dense"), *numbers, gain]


def chart(by_guidance: dict[str, list[Point]]) -> Figure:
    """PSNR over measured speed-up: caches alone, sparse attention alone, and both; a panel for each file.

    A line goes through the settings of its kind that no other beats in both; those that one beats are faint.
    """
    figure = Figure(figsize=(5.6 * len(by_guidance), 4.6), layout="constrained")
    axes = figure.subplots(1, len(by_guidance), sharey=True, squeeze=False)[0]
    for panel, (title, settings) in zip(axes, by_guidance.items(), strict=True):
        for number, kind in enumerate(_KINDS):
            _draw(panel, [point for point in settings if point.kind == kind], kind, number)
        panel.set_title(title, fontsize=12)
        panel.set_xlabel("speed-up of the whole run", fontsize=12)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("PSNR to the dense video, dB", fontsize=12)
    axes[0].legend(frameon=False, fontsize=12, loc="lower left")
    return figure


def _draw(panel: Axes, settings: list[Point], kind: str, number: int) -> None:
    style, kept = charts.line(number), best(settings, lambda point: point.measured)
    rest = [point for point in settings if point not in kept]
    spread = [mean_and_interval(point.psnr_db) for point in kept]
    middles, halves = [middle for middle, _ in spread], [half or 0.0 for _, half in spread]
    panel.errorbar([p.measured for p in kept], middles, halves, label=kind, capsize=2, linewidth=1.8, **style)
    x, y = [point.measured for point in rest], [mean(point.psnr_db) for point in rest]
    panel.plot(x, y, linestyle="none", marker=style["marker"], color=style["color"], markersize=4, alpha=0.3)


def read(path: Path) -> list[ResultRow]:
    """The rows of a `results.json`.

    Raises:
        InputFileError: it can't be read.
    """
    try:
        rows: list[ResultRow] = load(path)["rows"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputFileError(f"can't read {path}: wanted a results.json of diffsparse evaluate; {error!r}") from error
    return rows


def text(files: dict[str, list[Point]]) -> str:
    """What is gained at the speeds of caches, and all settings, for each of some files."""
    parts = (f"### {name.capitalize()}\n\n{margin_table(found)}\n\n{table(found)}\n" for name, found in files.items())
    return "\n".join(parts)


def _title(path: Path) -> str:
    """The name of the file, or that of its folder where all are called the same."""
    name = path.resolve().parent.name if path.name == RESULTS else path.stem
    return name.removeprefix("stack-").replace("-", " ")


def tables(paths: list[Path]) -> str:
    """The tables of some files, whose chart is written beside the first."""
    files = {_title(path): points(read(path)) for path in paths}
    charts.save(chart(files), paths[0].parent / "stack.png")
    return text(files)


def main(names: list[str]) -> None:
    """Write tables and chart of some results beside the first of them, or the project's own into its docs."""
    paths, page = [Path(name) for name in names], _ROOT / "docs/stack.md"
    if paths:
        write_text(f"## Step cache, sparse attention, and both\n\n{tables(paths)}", paths[0].parent / "stack.md")
    elif page.is_file():
        made = tables(sorted((_ROOT / "eval/results").glob("stack-*.json")))
        write_text(spliced(page.read_text(), _BEGIN, made.rstrip("\n"), _END), page)
    else:
        print("error: the docs are made in a checkout of the project; wanted some results.json", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
