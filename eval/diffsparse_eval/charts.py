"""Pictures of attention: block maps of each head, recall and orders by layer and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from diffsparse.files import whole
from diffsparse.inspection import LayerView

_INK, _PAPER, _SKIPPED = "#222222", "white", "#d9d9d9"
_PALETTE = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb", "#44aa99", "#882255")
_LOWEST, _HIGHEST = 0.03, 30.0  # block mass in units of uniform attention


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor=_PAPER)


def maps(view: LayerView, facts: dict[str, Any]) -> Figure:
    """One row for each head: its mass in raster order, in the best order, and the blocks that the strategy computes."""
    heads, columns = len(view.best), 2 if view.own is None else 3
    figure = Figure(figsize=(2.35 * columns + 1.3, 2.45 * heads + 1.1), layout="constrained")
    axes = figure.subplots(heads, columns, squeeze=False)
    for head, row in enumerate(axes):
        best = view.recall[:, head].argmax()
        _map(row[0], view.mass[view.orders.index("FHW"), head], f"raster order\nrecall {view.raster[head]:.2f}")
        _map(row[1], view.mass[best, head], f"best order, {view.best[head]}\nrecall {view.recall[best, head]:.2f}")
        row[0].set_ylabel(f"head {head}", fontsize=10, color=_INK)
        if view.own is not None and view.kept is not None and view.chosen is not None and view.density is not None:
            title = f"computed {view.density[head]:.0%}, in {view.own_orders[head]}\nrecall {view.chosen[head]:.2f}"
            _map(row[2], view.own[head], title, view.kept[head])
    colours = ScalarMappable(LogNorm(_LOWEST, _HIGHEST), "magma")
    figure.colorbar(colours, ax=axes, shrink=min(1.0, 0.5 + 0.5 / heads), label="softmax mass of a block, uniform = 1")
    _title(figure, f"layer {view.number}, {view.layer}", facts)
    return figure


def _map(axes: Any, mass: Any, title: str, kept: Any = None) -> None:
    """Key blocks from left to right, query blocks downwards; blocks that were dropped are grey."""
    axes.imshow(np.asarray(mass).clip(_LOWEST, _HIGHEST), norm=LogNorm(_LOWEST, _HIGHEST), cmap="magma")
    if kept is not None:
        veil = np.zeros((*kept.shape, 4))
        veil[..., :3] = int(_SKIPPED[1:3], 16) / 255
        veil[..., 3] = 1 - np.asarray(kept)
        axes.imshow(veil)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=_INK)


def recall(views: list[LayerView], facts: dict[str, Any]) -> Figure:
    """Recall by layer and head: raster order, best order, and what the strategy's blocks hold."""
    panels = {"best blocks, raster order": [view.raster for view in views]}
    panels["best blocks, best order"] = [view.recall.amax(0) for view in views]
    if all(view.chosen is not None for view in views):
        panels[f"computed by {facts['strategy'].split('(')[0]}"] = [view.chosen for view in views]  # type: ignore[misc]
    figure = Figure(figsize=_grid_size(views, len(panels)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, (title, values) in zip(axes, panels.items(), strict=True):
        table = _table([np.asarray(x, dtype=float) for x in values])
        picture = panel.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        _numbers(panel, table)
        panel.set_title(f"{title}\nmean {np.nanmean(table):.3f}", fontsize=9, color=_INK)
    _axes(axes, views)
    figure.colorbar(picture, ax=axes, label=f"recall at {facts['sparsity']:.0%} sparsity")
    _title(figure, "softmax mass that is kept", facts)
    return figure


def orders(views: list[LayerView], facts: dict[str, Any]) -> Figure:
    """The best order of each head, and the strategy's own."""
    names = list(dict.fromkeys(name for view in views for name in (*view.orders, *view.own_orders)))
    panels = {"order of most recall": [view.best for view in views]}
    panels[f"order of {facts['strategy'].split('(')[0]}"] = [view.own_orders for view in views]
    figure = Figure(figsize=_grid_size(views, 2), layout="constrained")
    axes = figure.subplots(1, 2, squeeze=False, sharey=True)[0]
    colours = ListedColormap([_PALETTE[i % len(_PALETTE)] for i in range(len(names))])
    for panel, (title, picked) in zip(axes, panels.items(), strict=True):
        table = _table([np.array([names.index(name) for name in heads], dtype=float) for heads in picked])
        panel.imshow(table, cmap=colours, norm=BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names)), aspect="auto")
        panel.set_title(title, fontsize=9, color=_INK)
    _axes(axes, views)
    counts = [sum(view.best.count(name) for view in views) for name in names]
    handles = [
        Patch(color=colours(i), label=f"{name}  x{n}") for i, (name, n) in enumerate(zip(names, counts, strict=True))
    ]
    figure.legend(
        handles=handles, loc="outside right center", frameon=False, fontsize=8, title="order, heads it is best for"
    )
    _title(figure, "token orders", facts)
    return figure


def _grid_size(views: list[LayerView], panels: int) -> tuple[float, float]:
    heads = max(len(view.best) for view in views)
    return max(2.4, 0.34 * heads) * panels + 2.2, max(2.2, 0.3 * len(views)) + 1.2


def _table(rows: list[np.ndarray]) -> np.ndarray:
    """[layers, heads], NaN where a layer has fewer heads than others."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def _numbers(axes: Any, table: np.ndarray) -> None:
    if table.size > 160:  # cells would be too small to read
        return
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            colour = _INK if value > 0.6 else _PAPER
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _axes(axes: Any, views: list[LayerView]) -> None:
    for panel in axes:
        panel.set_xlabel("head", fontsize=9)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.tick_params(length=0, labelsize=8)
    step = -(-len(views) // 30)
    axes[0].set_yticks(range(0, len(views), step), [f"{v.number}  {v.layer}" for v in views[::step]], fontsize=8)


def _title(figure: Figure, text: str, facts: dict[str, Any]) -> None:
    figure.suptitle(f"{facts['model']}: {text}", fontsize=11, color=_INK)
    figure.supxlabel(f"{facts['layout']}, steps {', '.join(map(str, facts['looks']))}", fontsize=7, color="#666666")
