"""Charts of committed rows: fidelity of each method, step caches, few steps, GPUs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from diffsparse_eval import stack, style
from diffsparse_eval.gpu import table as gpu
from diffsparse_eval.style import TYPE, WIDTH, Theme
from diffsparse_pipelines import tiny
from diffsparse_pipelines.tables import mean_and_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[3] / "eval/results"
_PSNR = "PSNR to the dense video, dB"
_SOURCES = {"tiny.csv": ("dense", "digest"), "tiny-tangent.json": ("dense",), "tiny-rivals.json": ("dense", "adaspa")}
_LINES = ("digest", "tangent", "paro+means", "adaspa+tail", "paro", "sparse-vdit", "adaspa", "gna", "random")
_NAMES = {
    "digest": "Digest",
    "tangent": "Tangent",
    "adaspa": "AdaSpa",
    "paro": "PARO",
    "sparse-vdit": "Sparse-vDiT",
    "gna": "GNA",
    "dit-fast": "DiTFastAttn",
    "svg-ear": "SVG-EAR",
    "sol": "Sol-Attn",
    "pisa": "PISA",
}
_SPARSITY = 0.8
_SMOOTH = 5  # rows of the log
_MODELS = {
    "wan 1.3b 480p": "Wan 1.3B, 480p",
    "wan 14b 720p": "Wan 14B, 720p",
    "hunyuan-video 720p": "HunyuanVideo, 720p",
    "flux 1024 px": "Flux, 1024 px",
}
_DEFAULTS = {4: (1, 0.6), 8: (2, 0.7)}  # steps -> dense ones and sparsity that known few-step models take


class Score(NamedTuple):
    """PSNR in dB: its mean over prompts, and half of its 95 % interval."""

    mean: float
    half: float


@cache
def fidelity_scores() -> dict[tuple[str, float], Score]:
    """By strategy and sparsity, in 15 steps of which 3 are dense.

    Of each file without those of its methods that another file has measured anew, and without settings that are no
    defaults (orders of tokens, other blocks).
    """
    values: dict[tuple[str, float], list[float]] = {}
    for name, without in _SOURCES.items():
        for strategy, label, sparsity, psnr in _facts(name):
            if strategy not in without and "order" not in label and "block" not in label:
                values.setdefault((strategy, sparsity), []).append(psnr)
    return {setting: _score(of_one) for setting, of_one in values.items()}


def _score(values: list[float]) -> Score:
    middle, half = mean_and_interval(values)
    return Score(middle, half or 0.0)


Fact = tuple[str, str, float, float]  # strategy, label, sparsity and PSNR


def _facts(name: str) -> Iterator[Fact]:
    """Of the rows of a file that differ from the dense video."""
    text = (RESULTS / name).read_text()
    for row in csv.DictReader(text.splitlines()) if name.endswith(".csv") else json.loads(text)["rows"]:
        if row["psnr_db"]:
            yield row["strategy"], row["label"], float(row["sparsity"]), float(row["psnr_db"])


def fidelity(theme: Theme) -> Figure:
    """PSNR over sparsity for each method, on the embedded model."""
    scores = fidelity_scores()
    figure, axes = _axes(4.7, right=1.75)
    ends = []
    for name in _LINES:
        shares = sorted(share for strategy, share in scores if strategy == name)
        middles, halves = zip(*(scores[name, share] for share in shares), strict=True)
        x = [100 * share for share in shares]
        thick = 2.6 if name in ("digest", "tangent") else 1.5
        axes.errorbar(x, middles, halves, capsize=2, linewidth=thick, **style.line(name, theme))
        ends.append(style.End(x[-1], middles[-1], _named(name), style.colour(name, theme)))
    axes.set(xlabel="share of attention dropped, %", ylabel=_PSNR, xticks=(50, 70, 80, 90), ylim=(15, 62))
    axes.grid()
    style.label_ends(axes, ends)
    return figure


def everything(theme: Theme) -> Figure:
    """PSNR of all methods at 80 % sparsity, best first, on the embedded model."""
    scores = {name: score for (name, share), score in fidelity_scores().items() if share == _SPARSITY}
    names = sorted(scores, key=lambda name: scores[name].mean)
    figure, axes = _axes(0.29 * len(names) + 0.85, left=1.95)
    for place, name in enumerate(names):
        middle, half = scores[name]
        axes.errorbar(middle, place, xerr=half, capsize=2.5, linewidth=2, **style.line(name, theme))
    axes.set_yticks(range(len(names)), [_named(name) for name in names])
    for text, name in zip(axes.get_yticklabels(), names, strict=True):
        text.set_color(style.colour(name, theme))
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=f"{_PSNR}, at {_SPARSITY:.0%} sparsity", ylim=(-0.7, len(names) - 0.3))
    axes.grid()
    return figure


def _named(name: str) -> str:
    method, plus, variant = name.partition("+")
    return f"{_NAMES.get(method, method)} + {variant}" if plus else _NAMES.get(method, method)


def stacked(theme: Theme) -> Figure:
    """PSNR over speed-up: a step cache alone, sparse attention alone, both."""
    return stack.chart(stack.own(), theme)


@cache
def few_scores() -> dict[tuple[int, int], dict[float, Score]]:
    """By steps and dense ones: the score of Digest at each sparsity."""
    found: dict[tuple[int, int], dict[float, Score]] = {}
    for path in sorted(RESULTS.glob("few-*.json")):
        _, steps, _, dense, _ = path.stem.split("-")
        values: dict[float, list[float]] = {}
        for strategy, _, sparsity, psnr in _facts(path.name):
            if strategy == "digest":
                values.setdefault(sparsity, []).append(psnr)
        found[int(steps), int(dense)] = {share: _score(of_one) for share, of_one in sorted(values.items())}
    return found


def few_steps(theme: Theme) -> Figure:
    """PSNR of Digest in runs of four and eight steps, by how many of them are dense."""
    figure = Figure(figsize=(WIDTH, 4.0))
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(0.66 / WIDTH, 0.155, 1 - 1.15 / WIDTH, 0.9, 0.62)
    colours, markers = (theme.soft, theme.accent, theme.third), "vos"
    for panel, steps in zip(panels, (4, 8), strict=True):
        ends = []
        for dense in sorted(dense for of, dense in few_scores() if of == steps):
            scores = few_scores()[steps, dense]
            x, y = [100 * share for share in scores], [score.mean for score in scores.values()]
            panel.plot(x, y, color=colours[dense], marker=markers[dense], markersize=7, linewidth=2.2)
            ends.append(style.End(x[-1], y[-1], f"{dense or 'none'} dense", colours[dense]))
        dense, share = _DEFAULTS[steps]
        chosen = few_scores()[steps, dense][share].mean
        panel.plot(100 * share, chosen, "o", markersize=17, fillstyle="none", color=theme.second, markeredgewidth=2.2)
        panel.annotate("default", (100 * share, chosen), (13, 7), textcoords="offset points", color=theme.second)
        panel.set(
            title=f"{steps} steps", xlabel="share dropped, %", xticks=(50, 60, 70, 80), xlim=(48, 81), ylim=(36, 60)
        )
        panel.grid()
        style.label_ends(panel, ends, reach=8)
    panels[0].set_ylabel(_PSNR)
    return figure


def gpus(theme: Theme) -> Figure:
    """Speed-up of attention at 80 % sparsity over the fastest dense kernel, by model and card."""
    figure, axes = _axes(3.0, left=1.95, top=0.42)
    looks = {"h100": (theme.accent, "o"), "h200": (theme.second, "D")}
    for account, rows in gpu.read().items():
        colour, marker = looks[account.partition("-")[0]]
        for place, shape in enumerate(reversed(gpu.SHAPES)):
            row = gpu.fastest(rows, shape)
            if row is not None:
                axes.plot(row["speedup"], place, marker, color=colour, markersize=11, markeredgecolor=theme.paper)
    axes.axvline(1, color=theme.soft, linewidth=1.5)
    axes.text(1.04, len(gpu.SHAPES) - 0.35, "dense", color=theme.soft)
    for x, (card, (colour, marker)) in zip((3.3, 4.5), looks.items(), strict=True):
        axes.plot(x, len(gpu.SHAPES) - 0.2, marker, color=colour, markersize=11, clip_on=False)
        axes.text(x + 0.12, len(gpu.SHAPES) - 0.2, card.upper(), color=colour, va="center", weight="bold")
    axes.set_yticks(range(len(gpu.SHAPES)), [_MODELS[shape] for shape in reversed(gpu.SHAPES)])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="speed-up of attention over the fastest dense kernel", xlim=(0.8, 5.6), ylim=(-0.6, 3.6))
    axes.grid(axis="x")
    return figure


def _axes(height: float, *, left: float = 0.66, right: float = 0.2, top: float = 0.15) -> tuple[Figure, Axes]:
    """A figure of one chart, with room in inches around it."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left / WIDTH, 0.62 / height, 1 - (left + right) / WIDTH, 1 - (0.62 + top) / height))
    axes.tick_params(labelsize=TYPE)
    return figure, axes


def loss(theme: Theme) -> Figure:
    """Loss of the embedded model's last three stages, a panel for each kind of piece that it was trained on."""
    found, borders = _losses()
    figure = Figure(figsize=(WIDTH, 5.6))
    panels = figure.subplots(3, 3, sharex=True, sharey=True)
    figure.subplots_adjust(0.75 / WIDTH, 0.11, 1 - 0.1 / WIDTH, 0.94, 0.1, 0.32)
    for panel, (name, points) in zip(panels.flat, found.items(), strict=True):
        steps, values = np.array(points).T
        smooth = np.convolve(values, np.ones(_SMOOTH) / _SMOOTH, "valid")
        panel.plot(steps, values, ".", color=theme.soft, markersize=3)
        panel.plot(steps[_SMOOTH - 1 :], smooth, color=theme.accent, linewidth=2)
        panel.set_title(name, loc="left", pad=4, fontsize=TYPE)
        panel.set(xlim=(0, borders[-1]), ylim=(0.02, 0.26), yticks=(0.05, 0.1, 0.15, 0.2), xticks=(0, 2000, 4000))
        panel.grid(axis="y")
        for border in borders[:-1]:
            panel.axvline(border, color=theme.soft, linewidth=1, linestyle=(0, (3, 3)))
    panels[1, 0].set_ylabel("loss")
    panels[2, 1].set_xlabel("step; dashed: where stages 4 and 5 begin")
    return figure


def _losses() -> tuple[dict[str, list[tuple[int, float]]], list[int]]:
    """By kind of piece: step, counted over the stages, and loss; and the last step of each stage."""
    found: dict[str, list[tuple[int, float]]] = {}
    last: dict[int, int] = {}
    for text in (Path(tiny.__file__).parent / "card/log.jsonl").read_text().splitlines():
        row = json.loads(text)
        before = sum(count for stage, count in last.items() if stage < row["stage"])
        last[row["stage"]] = row["step"]
        for name, value in row["loss"].items():
            found.setdefault(name, []).append((before + row["step"], value))
    return dict(sorted(found.items())), np.cumsum(list(last.values())).tolist()
