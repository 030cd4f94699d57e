"""Concept figures of the whole: one call, the steps of a run, what a cache adds, the packages and their rooms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from diffsparse import AdaSpa, Digest, Schedule, Tangent
from diffsparse.seam.accelerate import SPEEDS
from diffsparse.seam.caching import first_steps
from diffsparse_eval import stack
from diffsparse_eval.style import WIDTH, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS, LONG = 15, 50
SETTING = "taylor-seer:interval=3:warm_up=0.45"  # the cache of "balanced"
_ROOT = Path(__file__).parents[3]
_PACKAGES = {
    "diffsparse_eval": ("eval/diffsparse_eval", "fidelity, speed, reports, figures"),
    "diffsparse_pipelines": ("pipelines/diffsparse_pipelines", "known models, the embedded one, commands"),
    "diffsparse": ("diffsparse", "the library; knows Diffusers"),
    "diffsparse_kernels": ("kernels/diffsparse_kernels", "block-sparse products; knows torch and Triton alone"),
}
_ROOMS = {
    "seam": "adopts processors",
    "strategies": "choose the blocks",
    "site": "memory, compute",
    "orders": "order of tokens",
    "plans": "saved searches",
    "guidance": "perturbed heads",
    "insight": "cost, inspection",
    "cli": "names of commands",
}
_CALL = (
    ("pipeline call", "pipe(prompt)"),
    ("processor", "the model's own code"),
    ("q, k, v", "[B, H, N, D], after rotary"),
    ("place", "layer, step, branch, grid"),
    ("order", "similar tokens together"),
    ("strategy", "which key blocks"),
    ("kernel", "only these, one softmax"),
    ("tokens back", "raster order again"),
    ("output", "the model goes on"),
)
_OURS = ("place", "order", "strategy", "kernel", "tokens back")


# --- shared -------------------------------------------------------------------------------------------------------


def canvas(height: float) -> tuple[Figure, Axes]:
    """A figure of the page's width whose coordinates are inches."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, theme: Theme, edge: str = "") -> None:
    """A filled box with round corners."""
    style = f"round,pad=0,rounding_size={min(0.08, height / 4)}"
    patch = FancyBboxPatch((x, y), width, height, style, facecolor=colour, edgecolor=edge or theme.soft, linewidth=1.2)
    axes.add_patch(patch)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], theme: Theme) -> None:
    """From one place to another."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=theme.soft, linewidth=1.8))


# --- the figures --------------------------------------------------------------------------------------------------


def one_call(theme: Theme) -> Figure:
    """One attention call on its way, in three lines: to us, through us, back."""
    figure, axes = canvas(4.25)
    wide, high, gap = 2.26, 0.85, 0.3
    for i, (name, what) in enumerate(_CALL):
        line, place = divmod(i, 3)
        x, y = 0.06 + place * (wide + gap), 3.32 - line * 1.28
        ours = theme.accent if name in _OURS else ""
        box(axes, x, y, wide, high, theme.faint, theme, ours)
        axes.text(x + wide / 2, y + 0.57, name, ha="center", va="center", weight="bold", color=ours or theme.ink)
        axes.text(x + wide / 2, y + 0.26, what, ha="center", va="center")
        if place < 2:
            arrow(axes, (x + wide + 0.02, y + high / 2), (x + wide + gap - 0.02, y + high / 2), theme)
        elif line < 2:
            _turn(axes, y, high, theme)
    _row_of_keys(
        axes, 0.28, [(theme.accent, "diffsparse"), (theme.soft, "the model and its pipeline, as they are")], theme
    )
    return figure


def _turn(axes: Axes, y: float, high: float, theme: Theme) -> None:
    """From the end of a line of boxes to the start of the next."""
    right, left, middle = WIDTH - 1.2, 1.15, y - 0.215
    axes.plot([right, right, left, left], [y, middle, middle, middle - 0.05], color=theme.soft, linewidth=1.8)
    arrow(axes, (left, middle), (left, y - 1.28 + high), theme)


def executed(steps: int = STEPS) -> list[int]:
    """The steps of a run that the cache of "balanced" leaves: all of its warm-up, then every third."""
    knobs = dict(SPEEDS["balanced"].cache.knobs)
    first, interval = first_steps(float(str(knobs["warm_up"])), steps), int(str(knobs["interval"]))
    return [step for step in range(steps) if step < first or (step - first - 1) % interval == 0]


def schedule(theme: Theme) -> Figure:
    """What each step of a run is, under two strategies, a step cache on top, and in a long run."""
    figure, axes = canvas(3.95)
    left = executed()
    under = ["cached" if i not in left else kind for i, kind in enumerate(Tangent().kinds(Schedule(), STEPS))]
    lines: dict[str, Sequence[str]] = {
        "Digest(0.8), 15 steps": _taught(Digest().kinds(Schedule(), STEPS)),
        "AdaSpa(0.8), 15 steps": AdaSpa().kinds(Schedule(), STEPS),
        'accelerate "balanced", 15 steps: Tangent(0.8) under a step cache': under,
        "Digest(0.8), 50 steps: renewed": _taught(Digest().kinds(Schedule(), LONG)),
    }
    looks = {
        "dense": (theme.ink, "dense"),
        "taught": (theme.third, "searches or learns"),
        "sparse": (theme.accent, "sparse"),
        "cached": (theme.faint, "from the cache"),
    }
    for i, (name, kinds) in enumerate(lines.items()):
        y, wide = 3.18 - 0.85 * i, (WIDTH - 0.1) / len(kinds)
        axes.text(0.05, y + 0.46, name, va="bottom", weight="bold")
        for step, kind in enumerate(kinds):
            colour, _ = looks[_KINDS.get(kind, kind)]
            _patch(axes, 0.05 + step * wide, y, wide * 0.88, 0.38, colour, theme)
    _row_of_keys(axes, 0.16, list(looks.values()), theme)
    return figure


_KINDS = {"search": "taught", "refresh": "taught"}


def _taught(kinds: Sequence[str]) -> list[str]:
    """The dense steps that a strategy learns from: those before a sparse one."""
    after = [*kinds[1:], "dense"]
    return ["taught" if kind == "dense" and then != "dense" else kind for kind, then in zip(kinds, after, strict=True)]


def _patch(axes: Axes, x: float, y: float, wide: float, high: float, colour: str, theme: Theme) -> None:
    axes.add_patch(Rectangle((x, y), wide, high, facecolor=colour, edgecolor=theme.soft, linewidth=0.8))


def _row_of_keys(axes: Axes, y: float, parts: Sequence[tuple[str, str]], theme: Theme) -> None:
    x = 0.05
    for colour, text in parts:
        _patch(axes, x, y - 0.08, 0.17, 0.17, colour, theme)
        axes.text(x + 0.24, y, text, va="center")
        x += 0.45 + 0.101 * len(text)


@cache
def stack_numbers() -> tuple[float, dict[str, stack.Point]]:
    """Attention's share of a dense step, and the settings, of the committed rows without guidance."""
    rows = stack.read(_ROOT / "eval/results/stack-guidance-1.json")
    share = mean(row["attention_share"] or 0.0 for row in rows if row["strategy"] == "dense")
    return share, {point.label: point for point in stack.points(rows)}


def stacked(theme: Theme) -> Figure:
    """The time of each step: what sparse attention takes from it, what a step cache does, and what both do."""
    share, points = stack_numbers()
    sparse = Tangent().sparsity
    panels = {
        "dense": (range(STEPS), 0.0, 1.0),
        "sparse attention": (range(STEPS), sparse, points["tangent 0.8"].measured),
        "step cache": (executed(), 0.0, points[f"{SETTING}/dense"].measured),
        "both": (executed(), sparse, points[f"{SETTING}/tangent 0.8"].measured),
    }
    first, _ = Schedule().bounds(STEPS)
    figure, axes = canvas(3.5)
    for i, (name, (left, dropped, speed)) in enumerate(panels.items()):
        x, y = 0.1 + 3.75 * (i % 2), 2.0 - 1.55 * (i // 2)
        axes.text(x, y + 1.14, name, weight="bold", va="bottom")
        axes.text(x + 3.5, y + 1.14, f"{speed:.2f}x" if speed != 1 else "1x", weight="bold", va="bottom", ha="right")
        for step in left:
            attention = share * (1 - dropped if step >= first else 1)
            at = x + step * 3.5 / STEPS
            axes.add_patch(Rectangle((at, y), 0.19, 1 - share, facecolor=theme.soft, linewidth=0))
            axes.add_patch(Rectangle((at, y + 1 - share), 0.19, attention, facecolor=theme.accent, linewidth=0))
        axes.plot([x, x + 3.5], [y, y], color=theme.soft, linewidth=1)
    _row_of_keys(axes, 0.16, [(theme.accent, "attention"), (theme.soft, "the rest of a step")], theme)
    return figure


def seam(theme: Theme) -> Figure:
    """The four packages, imports pointing down, and the rooms of the library."""
    figure, axes = canvas(5.2)
    y, wide = 5.15, WIDTH - 0.75
    for package, (_, what) in _PACKAGES.items():
        own = package == "diffsparse"
        high = 2.6 if own else 0.66
        y -= high
        box(axes, 0.6, y, wide, high, "none", theme, theme.accent if own else theme.soft)
        axes.text(0.75, y + high - 0.22, package, weight="bold", va="center", color=theme.accent if own else theme.ink)
        axes.text(0.75, y + high - 0.48, what, va="center")
        if own:
            _rooms(axes, y, theme)
        y -= 0.17
    arrow(axes, (0.3, 5.1), (0.3, 0.15), theme)
    axes.text(0.13, 2.6, "imports point down", rotation=90, ha="center", va="center", color=theme.soft)
    return figure


def rooms() -> dict[str, str]:
    """The rooms of the library that are packages, and what each does."""
    there = {path.parent.name for path in (_ROOT / "diffsparse").glob("*/__init__.py")}
    return {name: what for name, what in _ROOMS.items() if name in there}


def _rooms(axes: Axes, y: float, theme: Theme) -> None:
    for i, (name, what) in enumerate(rooms().items()):
        line, place = divmod(i, 2)
        x, low = 0.75 + 3.25 * place, y + 1.47 - 0.46 * line
        box(axes, x, low, 3.15, 0.4, theme.faint, theme)
        axes.text(x + 0.1, low + 0.2, name, va="center", weight="bold")
        axes.text(x + 1.25, low + 0.2, what, va="center")
