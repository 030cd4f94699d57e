"""What a step cache, sparse attention and both together are worth: `python -m diffsparse_eval.stack RESULTS...`.

Results are what `diffsparse evaluate --strategy CACHE/STRATEGY,...` writes, of any model on any machine (`make stack`
does it for the embedded one). Writes `stack.md` and `stack.png` beside the first of them; without any, those of the
project's own, `eval/results/stack-*.json`, and its docs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffsparse.errors import InputFileError
from diffsparse.files import reason, write_text
from diffsparse_eval import style
from diffsparse_eval.experiment import RESULTS, WANTED, load
from diffsparse_eval.report import groups
from diffsparse_eval.rows import ResultRow
from diffsparse_pipelines.tables import markdown_table, mean_and_interval, spliced, spread

SHARES = (0.5, 0.7, 0.85)  # of attention in a dense step, for which speed is counted
TARGETS = (2.1, 2.5, 3.0)
_OFFSETS = (  # points
    *((9, 9, "left"), (0, 16, "center"), (-9, -22, "right"), (0, -30, "center"), (-9, -45, "right")),
    (8, 26, "left"),
)
_IDENTICAL = 100.0  # dB
_ROOT = Path(__file__).parents[2]
_PAGE, _README = _ROOT / "docs/stack.md", _ROOT / "README.md"
_BEGIN, _END = "<!-- stack: made by make stack-tables -->", "<!-- /stack -->"
BALANCED = "taylor-seer:interval=3:warm_up=0.45/tangent 0.8"  # what `accelerate` puts on by default
_KINDS = ("cache alone", "sparse alone", "stack")


class Point(NamedTuple):
    """One setting.

    Attributes:
        label: of the setting.
        kind: "cache alone", "sparse alone" or "stack".
        psnr_db: by prompt and seed.
        speedups: measured, likewise: by processor time on a CPU, else by the clock.
        executed: share of the steps that reach attention.
        work: share of a dense run's attention that is computed.
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

    Attributes:
        target: speed that was asked for.
        cache: the cache setting nearest to it.
        speedup: of that setting.
        cache_db: mean PSNR of the cache alone at it.
        stack_db: mean PSNR of the stack at it.
        gain_db: mean of the difference.
        half: half of the 95 % interval of that difference.
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


def measured(point: Point) -> float:
    """Speed as it was timed."""
    return point.measured


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


def _between(settings: list[Point], speed: Speed, at: float) -> list[float]:
    """PSNR of each prompt at a speed between those of settings."""
    by_prompt = zip(*(point.psnr_db for point in settings), strict=True)
    return [float(np.interp(at, [speed(point) for point in settings], values)) for values in by_prompt]


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
    for point in sorted(settings, key=measured):
        cells = [spread(point.psnr_db, ".1f"), spread(point.speedups, ".2f") + "x"]
        cells += [f"{point.executed:.2f}", f"{point.work:.3f}"]
        lines.append([point.label, *cells, *(f"{point.counted(share):.2f}x" for share in SHARES)])
    return markdown_table(headings, lines)


def margin_table(settings: list[Point]) -> str:
    """What the stack gains at the speeds of caches, measured and counted."""
    ways: list[tuple[str, Speed]] = [("measured", measured)]
    ways += [(f"counted at {share:g}", partial(Point.counted, share=share)) for share in SHARES]
    headings = ["speed", "cache alone", "its speed-up", "its dB", "stack's dB", "gain"]
    lines = [_margin_line(name, each) for name, speed in ways for each in margins(settings, speed)]
    return markdown_table(headings, lines)


def _margin_line(name: str, each: Margin) -> list[str]:
    gain = f"{each.gain_db:+.1f}" + ("" if each.half is None else f" ± {each.half:.1f}")
    numbers = [f"{each.speedup:.2f}x", f"{each.cache_db:.1f}", f"{each.stack_db:.1f}"]
    return [f"{each.target:g}x {name}", each.cache.removesuffix("/dense"), *numbers, gain]


def headline(settings_of: dict[str, list[Point]]) -> str:
    """What `accelerate(pipe, "balanced")` gives, and step caches alone at its speed; a line for each of some files."""
    headings = ["", "speed-up", '`accelerate(pipe, "balanced")`', "step cache alone, as fast"]
    lines = []
    for name, settings in settings_of.items():
        ours = next(point for point in settings if point.label == BALANCED)
        caches = best((point for point in settings if point.kind == "cache alone"), measured)
        alone = mean(_between(caches, measured, ours.measured))
        lines.append([name, f"{ours.measured:.2f}x", f"{mean(ours.psnr_db):.1f} dB", f"{alone:.1f} dB"])
    return markdown_table(headings, lines)


def chart(by_guidance: dict[str, list[Point]], theme: style.Theme = style.LIGHT) -> Figure:
    """PSNR over measured speed-up: caches alone, sparse attention alone, and both; a panel for each file.

    A line goes through the settings of its kind that no other beats in both; those that one beats are faint.
    """
    with style.drawn(theme):
        width, height = max(style.WIDTH, 3.75 * len(by_guidance)), 4.4
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(1, len(by_guidance), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(0.66 / width, 0.62 / height, 1 - 0.12 / width, 1 - 0.4 / height, 0.06)
        for panel, (title, settings) in zip(axes, by_guidance.items(), strict=True):
            for kind in _KINDS:
                _draw(panel, [point for point in settings if point.kind == kind], kind, theme)
            panel.set_title(title)
            panel.set_xlabel("speed-up of the whole run")
            panel.margins(x=0.08, y=0.12)
            panel.grid()
        axes[0].set_ylabel("PSNR to the dense video, dB")
        for panel, settings in zip(axes, by_guidance.values(), strict=True):
            for kind in _KINDS:
                _name(panel, settings, kind, theme)
        return figure


def _draw(panel: Axes, settings: list[Point], kind: str, theme: style.Theme) -> None:
    look, kept = style.line(kind, theme), best(settings, measured)
    rest = [point for point in settings if point not in kept]
    spread = [mean_and_interval(point.psnr_db) for point in kept]
    middles, halves = [middle for middle, _ in spread], [half or 0.0 for _, half in spread]
    panel.errorbar([p.measured for p in kept], middles, halves, capsize=2, linewidth=2.2, **look)
    x, y = [point.measured for point in rest], [mean(point.psnr_db) for point in rest]
    panel.plot(x, y, linestyle="none", marker=look["marker"], color=look["color"], markersize=4, alpha=0.35)


def _name(panel: Axes, settings: list[Point], kind: str, theme: style.Theme) -> None:
    """The kind beside a point of its line, at the first place where it covers nothing that is drawn."""
    panel.set(xlim=panel.get_xlim(), ylim=panel.get_ylim())
    drawn = panel.transData.transform([place for each in _KINDS for place in _along(settings, each)])
    others = [text.get_window_extent() for text in panel.texts]
    for x, y, side in _OFFSETS:
        for point in best((p for p in settings if p.kind == kind), measured)[::-1]:
            text = panel.annotate(
                kind,
                (point.measured, mean(point.psnr_db)),
                (x, y),
                textcoords="offset points",
                ha=side,
                color=style.colour(kind, theme),
                weight="bold",
            )
            box = text.get_window_extent().padded(4)
            if (
                not (box.count_contains(drawn) or box.count_overlaps(others))
                and panel.bbox.count_contains(box.corners()) == 4
            ):
                return
            text.remove()


def _along(settings: list[Point], kind: str) -> list[tuple[float, float]]:
    """Places of a kind's points, their intervals, and the line through the best of them."""
    own = [point for point in settings if point.kind == kind]
    kept = best(own, measured)
    found = [(point.measured, mean(point.psnr_db)) for point in own]
    for point in kept:
        middle, half = mean_and_interval(point.psnr_db)
        found += [(point.measured, float(y)) for y in np.linspace(middle - (half or 0), middle + (half or 0), 20)]
    if kept:
        x, y = [point.measured for point in kept], [mean(point.psnr_db) for point in kept]
        found += [(float(at), float(np.interp(at, x, y))) for at in np.linspace(x[0], x[-1], 200)]
    return found


def read(path: Path) -> list[ResultRow]:
    """The rows of a `results.json`.

    Raises:
        InputFileError: it can't be read.
    """
    try:
        rows: list[ResultRow] = load(path)["rows"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputFileError(f"can't read {path}: {reason(error)}; {WANTED}") from error
    return rows


def text(files: dict[str, list[Point]]) -> str:
    """What is gained at the speeds of caches, and all settings, for each of some files."""
    parts = (f"### {name.capitalize()}\n\n{margin_table(found)}\n\n{table(found)}\n" for name, found in files.items())
    return "\n".join(parts)


def _title(path: Path) -> str:
    """The name of the file, or that of its folder where all are called the same."""
    name = path.resolve().parent.name if path.name == RESULTS else path.stem
    return name.removeprefix("stack-").replace("-", " ")


def files(paths: list[Path]) -> dict[str, list[Point]]:
    """The settings of some files, by their titles."""
    return {_title(path): points(read(path)) for path in paths}


@cache
def own() -> dict[str, list[Point]]:
    """Those of the project's own rows, which are read once for all charts and tables."""
    return files(sorted((_ROOT / "eval/results").glob("stack-*.json")))


def pages() -> dict[Path, str]:
    """The text that README.md and docs/stack.md should have."""
    made = {_README: headline(own()), _PAGE: text(own()).rstrip("\n")}
    return {page: spliced(page.read_text(), _BEGIN, part, _END) for page, part in made.items()}


def main(names: list[str]) -> None:
    """Write tables and chart of some results beside the first of them, or the project's own tables into its docs."""
    paths = [Path(name) for name in names]
    if paths:
        found, folder = files(paths), paths[0].parent
        style.save(chart(found), folder / "stack.png")
        write_text(f"## Step cache, sparse attention, and both\n\n{text(found)}", folder / "stack.md")
    elif _PAGE.is_file():
        for page, written in pages().items():
            write_text(written, page)
    else:
        print("error: the docs are made in a checkout of the project; wanted some results.json", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
