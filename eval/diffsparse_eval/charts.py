"""Pictures of attention: block maps of each head, recall and orders by layer and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from diffsparse.insight.inspection import LayerView
from diffsparse.orders.named import RASTER
from diffsparse_eval.rows import InspectionFacts
from diffsparse_eval.style import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_INK, _PAPER, _SKIPPED = LIGHT.ink, LIGHT.paper, LIGHT.faint
_ORDERS = ("#4477aa", "#c8702a", "#228833", "#7b5aa6", "#d1495b", "#2a8c9e", "#7a7a7a", "#8a7a1f", "#6b4a2b")
_LEGIBLE = 30, 12  # layers and heads up to which texts are written into the cells
_COLUMN = 6  # heads one below the other
_LOWEST, _HIGHEST = 0.03, 30.0  # block mass in units of uniform attention


def maps(view: LayerView, facts: InspectionFacts) -> Figure:
    """Three maps for each head: mass in raster order, in the best order, and the blocks that the strategy computes.

    Heads stand one below the other, six in a column.
    """
    heads, each = len(view.best), 2 if view.own is None else 3
    rows, groups = min(heads, _COLUMN), -(-heads // _COLUMN)
    edge = 2.3 if groups == 1 else 1.7
    figure = Figure(figsize=(edge * each * groups + 1.3, (edge + 0.35) * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, each * groups, squeeze=False)
    for place in axes.flat:
        place.set_visible(False)
    for head in range(heads):
        group, row = divmod(head, _COLUMN)
        _head(list(axes[row, group * each : (group + 1) * each]), view, head)
    colours = ScalarMappable(LogNorm(_LOWEST, _HIGHEST), "magma")
    bar = figure.colorbar(colours, ax=axes, shrink=min(1.0, 0.5 + 0.5 / rows), aspect=30, ticks=(0.1, 1, 10))
    bar.ax.set_yticklabels(("0.1", "1", "10"), fontsize=8)
    bar.set_label("softmax mass of a block; uniform attention = 1", fontsize=8)
    _title(figure, f"layer {view.number}, {view.layer}", facts)
    return figure


def _head(axes: Sequence[Axes], view: LayerView, head: int) -> None:
    best = int(view.recall[:, head].argmax())
    _map(axes[0], view.mass[view.orders.index(RASTER), head], f"raster order\nrecall {view.raster[head]:.2f}")
    _map(axes[1], view.mass[best, head], f"best order, {view.best[head]}\nrecall {view.recall[best, head]:.2f}")
    axes[0].set_ylabel(f"head {head}", fontsize=9, color=_INK)
    if view.own is not None and view.kept is not None and view.chosen is not None and view.density is not None:
        title = f"computed {view.density[head]:.0%}, in {view.own_orders[head]}\nrecall {view.chosen[head]:.2f}"
        _map(axes[2], view.own[head], title, view.kept[head])


def _map(axes: Axes, mass: ArrayLike, title: str, kept: ArrayLike | None = None) -> None:
    """Key blocks from left to right, query blocks downwards; blocks that were dropped are grey."""
    mass = np.asarray(mass).clip(_LOWEST, _HIGHEST)
    aspect = mass.shape[1] / mass.shape[0]  # as many tokens along both sides
    axes.imshow(mass, norm=LogNorm(_LOWEST, _HIGHEST), cmap="magma", aspect=aspect)
    if kept is not None:
        kept = np.asarray(kept)
        veil = np.zeros((*kept.shape, 4))
        veil[..., :3] = to_rgb(_SKIPPED)
        veil[..., 3] = 1 - kept
        axes.imshow(veil, aspect=aspect)
    axes.set(xticks=[], yticks=[], visible=True)
    axes.spines[:].set(linewidth=0.5, color=_SKIPPED)
    axes.set_title(title, fontsize=8, color=_INK)


def recall(views: list[LayerView], facts: InspectionFacts) -> Figure:
    """Recall by layer and head: of the best blocks in raster and best order, and of the strategy's own blocks."""
    panels = {"best blocks, raster order": [view.raster for view in views]}
    panels["best blocks, best order"] = [view.recall.amax(0) for view in views]
    chosen = [view.chosen for view in views if view.chosen is not None]
    if len(chosen) == len(views):
        panels[f"computed by {facts['label']}"] = chosen
    figure = Figure(figsize=_grid_size(views, len(panels)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, (title, values) in zip(axes, panels.items(), strict=True):
        table = _table([np.asarray(x, dtype=float) for x in values])
        picture = panel.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        _write(panel, [[f"{x:.2f}" for x in row] for row in table], lambda x: _INK if x > 0.6 else _PAPER, table)
        panel.set_title(f"{title}\nmean {np.nanmean(table):.3f}", fontsize=9, color=_INK)
    _axes(axes, views)
    bar = figure.colorbar(picture, ax=axes, aspect=30)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(f"recall at {facts['sparsity']:.0%} sparsity", fontsize=8)
    _title(figure, "softmax mass that is kept", facts)
    return figure


def orders(views: list[LayerView], facts: InspectionFacts) -> Figure:
    """The best order of each head, and the strategy's own."""
    names = list(dict.fromkeys(name for view in views for name in (*view.orders, *view.own_orders)))
    panels = {"order of most recall": [view.best for view in views]}
    panels[f"order of {facts['label']}"] = [view.own_orders for view in views]
    figure = Figure(figsize=_grid_size(views, 2), layout="constrained")
    axes = figure.subplots(1, 2, squeeze=False, sharey=True)[0]
    colours = ListedColormap([_ORDERS[i % len(_ORDERS)] for i in range(len(names))])
    for panel, (title, picked) in zip(axes, panels.items(), strict=True):
        table = _table([np.array([names.index(name) for name in heads], dtype=float) for heads in picked])
        panel.imshow(table, cmap=colours, norm=BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names)), aspect="auto")
        _write(panel, [list(heads) for heads in picked], lambda _: _PAPER, table)
        panel.set_title(title, fontsize=9, color=_INK)
    _axes(axes, views)
    counts = [sum(view.best.count(name) for view in views) for name in names]
    handles = [
        Patch(color=colours(i), label=f"{name}  x{n}") for i, (name, n) in enumerate(zip(names, counts, strict=True))
    ]
    figure.legend(
        handles=handles,
        loc="outside right center",
        frameon=False,
        fontsize=8,
        title="order, heads it is best for",
        title_fontsize=8,
    )
    _title(figure, "token orders", facts)
    return figure


def _grid_size(views: list[LayerView], panels: int) -> tuple[float, float]:
    heads = max(len(view.best) for view in views)
    width, height = max(2.4, 0.36 * min(heads, _LEGIBLE[1])), max(2.0, 0.3 * min(len(views), _LEGIBLE[0]))
    return width * panels + 2.2, height + 1.2


def _table(rows: list[np.ndarray]) -> np.ndarray:
    """[layers, heads], NaN where a layer has fewer heads than others."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def _write(axes: Axes, texts: list[list[str]], colour: Callable[[float], str], table: np.ndarray) -> None:
    """Texts in the cells, where there is room to read them."""
    if table.shape[0] > _LEGIBLE[0] or table.shape[1] > _LEGIBLE[1]:
        return
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            text = texts[row][column]
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour(value))


def _axes(axes: Sequence[Axes], views: list[LayerView]) -> None:
    for panel in axes:
        panel.set_xlabel("head", fontsize=9)
        panel.locator_params(axis="x", integer=True)
        panel.tick_params(length=0, labelsize=8)
        panel.spines[:].set_visible(False)
        for place in np.arange(0.5, len(views) - 1):
            panel.axhline(place, color=_PAPER, linewidth=0.8)
        for place in np.arange(0.5, max(len(view.best) for view in views) - 1):
            panel.axvline(place, color=_PAPER, linewidth=0.8)
    step = -(-len(views) // 30)
    axes[0].set_yticks(range(0, len(views), step), [f"{v.number}  {v.layer}" for v in views[::step]], fontsize=8)


def _title(figure: Figure, text: str, facts: InspectionFacts) -> None:
    figure.suptitle(f"{facts['model']}, {facts['label']}: {text}", fontsize=11, color=_INK)
    steps = ", ".join(map(str, facts["looks"]))
    figure.supxlabel(f"{facts['layout']} in blocks of {facts['block']}, steps {steps}", fontsize=7, color=LIGHT.soft)
