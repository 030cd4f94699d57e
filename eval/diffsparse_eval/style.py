"""How all pictures look: one colour and one marker a method, names at the ends of lines, on light and on dark paper."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from diffsparse.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 7.5  # inches: 720 px on a page, where the type below is 16 px high
TYPE = 12.0  # points


@dataclass(frozen=True)
class Theme:
    """The colours of a paper; figures are transparent and are to lie on it.

    name: "light" or "dark", as files end in.
    ink: of text and outlines. soft: of what matters less. faint: of grids and of cells where nothing is.
    accent, second, third: of what is computed, of what stands for the rest, and of what was kept from before.
    """

    name: str
    paper: str
    ink: str
    soft: str
    faint: str
    accent: str
    second: str
    third: str


LIGHT = Theme("light", "#ffffff", "#1c1f26", "#5a616e", "#e3e6eb", "#0b5cad", "#e07b18", "#8a3fa0")
DARK = Theme("dark", "#1e2129", "#eceff4", "#a9b1bf", "#3a404d", "#62b0ff", "#ffa14f", "#d795ea")
THEMES = (LIGHT, DARK)


class Look(NamedTuple):
    """Colour on light and on dark paper, and marker."""

    light: str
    dark: str
    marker: str


LOOKS = {
    "digest": Look("#0b5cad", "#62b0ff", "o"),
    "tangent": Look("#d1570a", "#ffa14f", "s"),
    "paro": Look("#8a3fa0", "#d795ea", "D"),
    "adaspa": Look("#00795a", "#3fd0a0", "^"),
    "sparse-vdit": Look("#8f6b00", "#e0bd45", "P"),
    "gna": Look("#0088a3", "#5fd3e8", "X"),
    "random": Look("#666c77", "#a3abb8", "v"),
    "dense": Look("#1c1f26", "#eceff4", "h"),
    "svg-ear": Look("#7a3b1d", "#d69a74", "*"),
    "sol": Look("#b3202c", "#ff8079", "<"),
    "dit-fast": Look("#486b17", "#a5cf6b", "p"),
    "pisa": Look("#4b3fb5", "#a99dff", ">"),
    "cache alone": Look("#8f6b00", "#e0bd45", "^"),
    "sparse alone": Look("#0b5cad", "#62b0ff", "o"),
    "stack": Look("#b3205f", "#ff7fb2", "D"),
}
_OTHERS = (Look("#3c5a78", "#9cbbd9", "H"), Look("#7d4a6a", "#d4a0c0", "d"), Look("#5f5f2a", "#c4c47e", "8"))
_VARIANT = re.compile(r"(?:^[\w/-]+| )\+([a-z][\w-]*)")  # not `modes=diagonal+stripe`
_DASHES = {"means": (4, 2), "first-order": (6, 2, 1, 2), "tail": (1, 1.5)}


class Line(TypedDict):
    """How matplotlib draws a line."""

    color: str
    marker: str
    markersize: float
    markerfacecolor: str
    linestyle: Any


def colour(name: str, theme: Theme) -> str:
    """Of a method or a kind."""
    return _on(look(name), theme)


def _on(look: Look, theme: Theme) -> str:
    return look.light if theme.name == "light" else look.dark


def look(label: str) -> Look:
    """Of a label such as `adaspa 0.8 +means`, `taylor-seer:interval=2/digest 0.8` or `stack`: that of its method."""
    if label in LOOKS:
        return LOOKS[label]
    name = re.split(r"[ :+]", label.rpartition("/")[2], maxsplit=1)[0]
    return LOOKS.get(name, _OTHERS[sum(map(ord, name)) % len(_OTHERS)])


def _is_open(label: str) -> bool:
    """Whether a label is that of a variant, whose markers are open."""
    return _VARIANT.search(label) is not None


def line(label: str, theme: Theme = LIGHT, worn: Look | None = None) -> Line:
    """Colour, marker and dash of a method; variants of it are dashed and open, those under a step cache are dashed.

    Args:
        label: of a method or a kind.
        theme: the paper.
        worn: another colour and marker than the method's own.
    """
    worn = worn or look(label)
    variant, own = _VARIANT.search(label), _on(worn, theme)
    dashes = _DASHES.get(variant[1], (4, 2)) if variant else (3, 1, 1, 1) if "/" in label else None
    return {
        "color": own,
        "marker": worn.marker,
        "markersize": 7.0,
        "markerfacecolor": theme.paper if variant else own,
        "linestyle": (0, dashes) if dashes else "-",
    }


def lines(labels: Sequence[str], theme: Theme = LIGHT) -> dict[str, Line]:
    """The lines of one plot, each with a colour and a marker that no other has; of variants, no other variant.

    The shortest label of a method has its look, the first step cache alone and the first stack have those of their
    kinds. The others get what is left; where nothing is, the look of their method or kind.
    """
    alone = [label for label in labels if "/" not in label]
    firsts = {(look(label), _is_open(label)): label for label in sorted(alone, key=len, reverse=True)}.values()
    found: dict[str, Line] = {}
    for label in sorted(labels, key=lambda label: label not in firsts):
        kind = "" if "/" not in label else "cache alone" if label.endswith("/dense") else "stack"
        wanted = look(kind or label)
        beside = [found[each] for each in found if _is_open(each) == _is_open(label)]
        taken = {part for each in beside for part in (each["color"], each["marker"])}
        free = (each for each in (wanted, *_OTHERS, *LOOKS.values()) if not taken & {_on(each, theme), each.marker})
        found[label] = line(label, theme, next(free, wanted))
    return {label: found[label] for label in labels}


@contextmanager
def drawn(theme: Theme) -> Iterator[None]:
    """Within: figures have this paper's colours and this type, and SVG files are the same each time."""
    ink = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: dict[str, Any] = {
        **dict.fromkeys(ink, theme.ink),
        "axes.edgecolor": theme.soft,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": TYPE + 1,
        "axes.titleweight": "bold",
        "figure.facecolor": "none",
        "font.family": "DejaVu Sans",
        "font.size": TYPE,
        "grid.color": theme.faint,
        "image.composite_image": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "diffsparse",
    }
    with matplotlib.rc_context(settings):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a PNG on white paper, or an SVG that is transparent, whole or not at all.

    Raises:
        OutputFileError: it can't be written.
    """
    with whole(path) as temporary:
        if path.suffix == ".svg":
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(temporary, format="png", dpi=130, facecolor=LIGHT.paper)


class End(NamedTuple):
    """Where a line ends, and what is written beside it."""

    x: float
    y: float
    text: str
    colour: str


def label_ends(axes: Axes, ends: Sequence[End], *, gap: float = TYPE * 1.25, reach: float = 14) -> None:
    """Write names to the right of the axes, as near to the ends of their lines as they stand without touching.

    The axes want their limits and their place in the figure before.

    Args:
        axes: where the lines are.
        ends: in any order.
        gap: points between the middles of two names.
        reach: points from the edge of the axes to the names.
    """
    ends = sorted(ends, key=lambda end: end.y)
    wide, high = (edge * 72 / axes.figure.dpi for edge in (axes.bbox.width, axes.bbox.height))
    places = axes.transAxes.inverted().transform(axes.transData.transform([(end.x, end.y) for end in ends]))[:, 1]
    for end, height in zip(ends, apart(places * high, gap, high), strict=True):
        axes.annotate(
            end.text,
            (end.x, end.y),
            (1 + reach / wide, height / high),
            textcoords="axes fraction",
            va="center",
            color=end.colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.8,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 6,
            },
        )


def apart(places: np.ndarray, gap: float, most: float) -> np.ndarray:
    """Ascending places moved as little as can be, so that neighbours are `gap` apart and all lie from 0 to `most`."""
    steps = np.arange(len(places)) * gap
    groups: list[list[float]] = []  # places less steps, pooled where they would fall: the nearest that never fall
    for place in places - steps:
        groups.append([float(place)])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    level = np.array([np.mean(group) for group in groups for _ in group])
    found: np.ndarray = level.clip(0, max(most - steps[-1], 0)) + steps
    return found
