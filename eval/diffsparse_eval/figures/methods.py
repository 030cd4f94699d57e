"""Concept figures, one a method: real block maps of the embedded model, and patterns on small grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgba
from matplotlib.figure import Figure
from torch import Tensor

from diffsparse import GNA, AdaSpa, Digest, Layout, Random, Tangent
from diffsparse.guidance.perturb import KINDS
from diffsparse.insight.inspection import best_recall, order_masses
from diffsparse.insight.replay import Pair
from diffsparse.orders.named import AXES, RASTER, permutation
from diffsparse.seam.call import Call
from diffsparse.strategies import parse
from diffsparse.strategies.blocks import keep_count
from diffsparse.strategies.residual import LowRank
from diffsparse.strategies.sparse_vdit.strategy import MODES, MULTI_DIAGONAL, head_lists, head_orders
from diffsparse_eval.figures import seen
from diffsparse_eval.figures.drawings import box, canvas
from diffsparse_eval.style import TYPE, WIDTH, Theme
from diffsparse_kernels import PRECISIONS, Summaries, attention, select_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCKY, _BANDED, _STRIPED = (3, 1), (4, 1), (2, 1)  # layer and head whose maps show a method's idea well
_PIXELS = 6  # a block's edge in the file, so that no viewer blurs it
_MANY = 100  # cells of an edge that need no more than two pixels each
_LEAST, _MOST = 0.03, 30.0  # block mass in units of uniform attention
_SPARSITY = 0.8
_PERTURBATIONS = ("identity", "uniform", "query-mean")


# --- shared -------------------------------------------------------------------------------------------------------


def row(titles: Sequence[str], *, gap: float = 0.3, below: float = 0.6, lines: int = 1) -> tuple[Figure, list[Axes]]:
    """Square panels side by side, each with its title above; `below` is left free under them, in inches."""
    count, left, above = len(titles), 0.3, 0.12 + 0.24 * lines
    edge = (WIDTH - left - 0.05 - gap * (count - 1)) / count
    height = edge + above + below
    figure = Figure(figsize=(WIDTH, height))
    axes = []
    for i, title in enumerate(titles):
        place = ((left + i * (edge + gap)) / WIDTH, below / height, edge / WIDTH, edge / height)
        axes.append(figure.add_axes(place))
        axes[-1].set_title(title, pad=7, linespacing=1.15, fontsize=TYPE, weight="bold")
        axes[-1].set(xticks=[], yticks=[])
    axes[0].set_ylabel("queries", labelpad=5)
    axes[0].set_xlabel("keys", labelpad=3)
    return figure, axes


def picture(axes: Axes, colours: np.ndarray, theme: Theme) -> None:
    """Cells [rows, columns, 4], key blocks from left to right, query blocks downwards."""
    pixels = _PIXELS if len(colours) < _MANY else 2
    axes.imshow(np.kron(colours, np.ones((pixels, pixels, 1))), interpolation="none", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=theme.soft, linewidth=1)


def heat(values: Tensor, theme: Theme, colour: str, norm: Any = None) -> np.ndarray:
    """Colours [rows, columns, 4] of positive values, from the paper's to the strongest."""
    ends = ("#f2f4f7", "#05203f") if theme.name == "light" else ("#262b35", "#f2f8ff")
    colours = LinearSegmentedColormap.from_list("heat", [ends[0], colour, ends[1]])
    found: np.ndarray = colours((norm or LogNorm(_LEAST, _MOST, clip=True))(values.numpy()))
    return found


def cells(mask: Tensor, colour: str, theme: Theme) -> np.ndarray:
    """Colours [rows, columns, 4]: `colour` where the mask is True."""
    found = np.empty((*mask.shape, 4))
    found[:] = to_rgba(theme.faint)
    found[mask.numpy()] = to_rgba(colour)
    return found


def key(figure: Figure, parts: Sequence[tuple[str, str]], theme: Theme, y: float = 0.14, wide: float = WIDTH) -> None:
    """Coloured squares and what they mean, `y` inches above the lower edge, centred in `wide` inches."""
    width, height = figure.get_size_inches()
    widths = [0.24 + 0.096 * len(text) for text, _ in parts]
    x = (wide - sum(widths) - 0.25 * (len(parts) - 1)) / 2
    for (text, colour), own in zip(parts, widths, strict=True):
        figure.text(x / width, y / height, "\u25a0", color=colour, fontsize=TYPE + 3, va="center")
        figure.text((x + 0.24) / width, y / height, text, color=theme.ink, va="center")
        x += own + 0.25


def _mass(at: tuple[int, int]) -> Tensor:
    """Block mass of a head in raster order, [nQ, nK]."""
    layer, head = at
    q, k, _ = seen.qkv(seen.recorded()[layer].second)
    return seen.mass(q, k)[head]


# --- the methods --------------------------------------------------------------------------------------------------


def adaspa(theme: Theme) -> Figure:
    """Block mass of a head in the last dense step, the fifth that holds most, and the same blocks one step later."""
    layer, head = _BLOCKY
    pair = seen.recorded()[layer]
    before = seen.mass(*seen.qkv(pair.first)[:2])[head]
    kept = seen.choices(AdaSpa(_SPARSITY, block=seen.BLOCK), pair)[-1].mask[head]
    figure, axes = row(
        ["dense step:\nmass of each block", "the heaviest blocks\nof each row", "later steps:\nonly these"], lines=2
    )
    picture(axes[0], heat(before, theme, theme.accent), theme)
    picture(axes[1], cells(kept, theme.accent, theme), theme)
    later = heat(_mass(_BLOCKY), theme, theme.accent)
    later[~kept.numpy()] = to_rgba(theme.faint)
    picture(axes[2], later, theme)
    key(figure, [("computed, with its mass", theme.accent), ("dropped", theme.faint)], theme)
    return figure


def random(theme: Theme) -> Figure:
    """As many blocks by lot as a search takes: what a search is worth."""
    layer, head = _BLOCKY
    pair = seen.recorded()[layer]
    figure, axes = row(["mass of each block", "searched (AdaSpa)", "by lot (Random)"])
    picture(axes[0], heat(_mass(_BLOCKY), theme, theme.accent), theme)
    for panel, strategy in zip(
        axes[1:], (AdaSpa(_SPARSITY, block=seen.BLOCK), Random(_SPARSITY, block=seen.BLOCK)), strict=True
    ):
        picture(panel, cells(seen.choices(strategy, pair)[-1].mask[head], theme.accent, theme), theme)
    key(figure, [("computed", theme.accent), ("dropped", theme.faint)], theme)
    return figure


def tangent(theme: Theme) -> Figure:
    """Mass of the blocks of a head, the error that their summaries would make, and what is done with each."""
    layer, head = _BANDED
    pair = seen.recorded()[layer]
    made = seen.choices(Tangent(_SPARSITY, block=seen.BLOCK), pair)[-1]
    assert isinstance(made.blocks.summary, Summaries)
    error = seen.site(pair.second).summary_error(made.q, made.blocks.summary, seen.BLOCK)[0, head]
    figure, axes = row(["mass of each block", "error of its summary", "what is done with it"])
    picture(axes[0], heat(seen.mass(made.q, made.k)[head], theme, theme.accent), theme)
    low, high = np.quantile(error.numpy(), (0.1, 0.999))
    picture(axes[1], heat(error, theme, theme.second, LogNorm(low, high, clip=True)), theme)
    done = cells(made.mask[head], theme.accent, theme)
    done[~made.mask[head].numpy()] = _mixed(theme.second, theme.paper, 0.35)
    picture(axes[2], done, theme)
    for place in np.linspace(10, _PIXELS * len(error) - 10, 9):
        axes[2].axhline(place, color=theme.third, linewidth=1.6)
    parts = [("computed", theme.accent), ("stands as its summary", _mixed(theme.second, theme.paper, 0.5))]
    key(figure, [*parts, ("exact rows, for the fit", theme.third)], theme)
    return figure


def _mixed(colour: str, paper: str, share: float) -> Any:
    return tuple(share * a + (1 - share) * b for a, b in zip(to_rgba(colour), to_rgba(paper), strict=True))


def digest(theme: Theme) -> Figure:
    """What the sparse product misses in the dense step, what of it is kept, and what is missed one step later."""
    layer, head = _BANDED
    pair = seen.recorded()[layer]
    first, later = (seen.choices(Tangent(_SPARSITY, block=seen.BLOCK), Pair(call, call))[-1].missed for call in pair)
    low = LowRank.of(first[None], Digest._most_rank)
    kept = ((low.codes.float() * low.scale.float()) @ low.basis)[0]
    texts = (
        "last dense step: dense output less sparse output",
        "kept from it: rank 4, added in the steps that follow",
        "one step later: dense output less sparse output",
    )
    height = 4.2
    figure = Figure(figsize=(WIDTH, height))
    for i, (missed, text) in enumerate(zip((first, kept, later), texts, strict=True)):
        axes = figure.add_axes((0.42 / WIDTH, (2.96 - 1.3 * i) / height, 1 - 0.5 / WIDTH, 0.9 / height))
        axes.set_title(text, loc="left", pad=5, fontsize=TYPE, color=theme.third if i == 1 else theme.ink)
        axes.imshow(_strip(missed[head], theme), interpolation="none", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=theme.third if i == 1 else theme.soft, linewidth=2.5 if i == 1 else 1)
        axes.set_ylabel("channels", labelpad=5)
    axes.set_xlabel("tokens", labelpad=4)
    return figure


def _strip(missed: Tensor, theme: Theme) -> np.ndarray:
    """What is missed [N, D] as a strip of tokens from left to right, below zero in one colour, above in another."""
    means = missed.unflatten(0, (-1, seen.BLOCK // 2)).mean(1).T  # [D, half blocks]
    limit = float(means.abs().quantile(0.985))
    colours = LinearSegmentedColormap.from_list("signed", [theme.second, theme.paper, theme.accent])
    found: np.ndarray = np.kron(colours((means / limit).clamp(-1, 1).numpy() / 2 + 0.5), np.ones((3, 4, 1)))
    return found


def paro(theme: Theme) -> Figure:
    """Block mass of a head in raster order and in the order of its own, and the fifth that is kept in each."""
    layer, head = _STRIPED
    call = seen.recorded()[layer].second
    q, k, _ = seen.qkv(call)
    _, lse = attention(q, k, k)
    masses = order_masses(q, k, lse, seen.site(call), AXES, seen.BLOCK)
    recall = [best_recall(mass, _SPARSITY)[:, head] for mass in masses]
    best = max(range(len(AXES)), key=lambda i: float(recall[i][0] / recall[i][1]))
    titles = ["raster order", "heaviest fifth", "its own order", "heaviest fifth"]
    figure, axes = row(titles, gap=0.14)
    for i, place in enumerate((AXES.index(RASTER), best)):
        mass = masses[place][0, head]
        picture(axes[2 * i], heat(mass / mass.mean(), theme, theme.accent), theme)
        kept = select_rows(mass, keep_count(_SPARSITY, mass.shape[-1]))
        colours = heat(mass / mass.mean(), theme, theme.accent)
        colours[~kept.numpy()] = to_rgba(theme.faint)
        picture(axes[2 * i + 1], colours, theme)
    key(figure, [("mass of a block", theme.accent), ("dropped", theme.faint)], theme)
    return figure


def sparse_vdit(theme: Theme) -> Figure:
    """The five patterns of a head, drawn token by token in raster order."""
    layout, block = Layout(6, 6, 6), 6
    modes, columns = torch.arange(len(MODES)), torch.zeros(len(MODES), layout.blocks(block))
    columns[:, [3, 9, 10, 17, 24, 30, 33]] = 1.0  # those that a search would have found
    lists = head_lists(modes, columns, layout, _SPARSITY, block, torch.device("cpu"))
    orders = head_orders(modes, layout, torch.device("cpu"))
    figure, axes = row(MODES, gap=0.13)
    for mode, (panel, mask) in enumerate(zip(axes, lists.to_mask()[0], strict=True)):
        tokens = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
        if mode == MODES.index("full"):
            tokens = torch.ones_like(tokens)
        back = orders.back[0, mode]
        picture(panel, cells(tokens[back][:, back] if mode == MULTI_DIAGONAL else tokens, theme.accent, theme), theme)
    key(figure, [("computed", theme.accent), ("dropped", theme.faint)], theme)
    return figure


def gna(theme: Theme) -> Figure:
    """The window of one query over frames, rows and columns, and the blocks that all windows touch."""
    layout, strategy = Layout(5, 8, 8), GNA(window=(3, 5, 5), stride=(1, 1, 1), block=16)
    query = (2, 3, 4)
    tiling = strategy.tiling((layout.frames, layout.height, layout.width))
    seen_by = [axis.spans[place] for axis, place in zip(tiling.axes, query, strict=True)]
    height = 2.75
    figure = Figure(figsize=(WIDTH, height))
    for frame in range(layout.frames):
        axes = figure.add_axes(((0.05 + 0.97 * frame) / WIDTH, 1.05 / height, 0.9 / WIDTH, 0.9 / height))
        window = torch.zeros(layout.height, layout.width, dtype=torch.bool)
        if seen_by[0][0] <= frame <= seen_by[0][1]:
            window[seen_by[1][0] : seen_by[1][1] + 1, seen_by[2][0] : seen_by[2][1] + 1] = True
        colours = cells(window, theme.accent, theme)
        if frame == query[0]:
            colours[query[1], query[2]] = to_rgba(theme.second)
        picture(axes, colours, theme)
        _lines(axes, layout.height, layout.width, theme)
        axes.set_xlabel(f"frame {frame}", labelpad=4)
    figure.text(2.45 / WIDTH, 2.17 / height, "the window of one query", ha="center", weight="bold")
    edge = 2.05
    axes = figure.add_axes(((WIDTH - edge - 0.05) / WIDTH, 0.35 / height, edge / WIDTH, edge / height))
    mask = seen.choices(strategy, seen.imagined(layout))[-1].mask[0]
    picture(axes, cells(mask, theme.accent, theme), theme)
    _lines(axes, len(mask), len(mask), theme)
    axes.set_title("blocks computed", pad=7, fontsize=TYPE)
    axes.set(xlabel="keys", ylabel="queries")
    key(figure, [("query", theme.second), ("seen by it", theme.accent)], theme, 0.4, 4.9)
    return figure


def _lines(axes: Axes, rows: int, columns: int, theme: Theme) -> None:
    """Between the cells of a picture."""
    for place in range(1, rows):
        axes.axhline(place * _PIXELS - 0.5, color=theme.paper, linewidth=0.7)
    for place in range(1, columns):
        axes.axvline(place * _PIXELS - 0.5, color=theme.paper, linewidth=0.7)


def rivals(theme: Theme) -> Figure:
    """The blocks that rebuilt peers compute of one head, and what stands for the rest."""
    layer, head = _BLOCKY
    names = {
        "sol": ("Sol-Attn", "means"),
        "pisa": ("PISA", "means and\none matrix"),
        "svg-ear": ("SVG-EAR", "means of\nclusters"),
        "dit-fast": ("DiTFastAttn", "what it missed\nin a dense step"),
    }
    figure, axes = row([title for title, _ in names.values()], gap=0.14, below=0.92)
    axes[0].set_ylabel("")
    for panel, (name, (_, rest)) in zip(axes, names.items(), strict=True):
        (strategy,) = parse(name, sparsity=_SPARSITY, block=seen.BLOCK)
        mask = seen.choices(strategy, seen.recorded()[layer])[-1].mask
        picture(panel, cells(mask[min(head, len(mask) - 1)], theme.accent, theme), theme)
        panel.set_xlabel(rest, labelpad=6)
    key(figure, [("computed", theme.accent), ("dropped; below: what stands for it", theme.faint)], theme)
    return figure


def compensated(theme: Theme) -> Figure:
    """Softmax weights of one query over some blocks of its keys, and what stands for those of dropped blocks."""
    now, before, scores, kept = _weights(*_BANDED)
    middle, varied = scores.mean(1, keepdims=True), scores.var(1, keepdims=True)
    means = np.exp(middle) + 0 * scores
    stand_ins = {
        "nothing": 0 * scores,
        "means": means,
        "first order": np.exp(middle + varied / 2) * (1 + scores - middle),
        "tail": before,
    }
    figure = Figure(figsize=(WIDTH, 4.6))
    panels = figure.subplots(len(stand_ins), 1, sharex=True, sharey=True)
    figure.subplots_adjust(1.3 / WIDTH, 0.13, 0.985, 0.97, hspace=0.16)
    for panel, (way, stands) in zip(panels, stand_ins.items(), strict=True):
        panel.stairs(np.where(kept, now, 0).ravel(), fill=True, color=theme.accent)
        panel.stairs(np.where(kept, 0, stands).ravel().clip(0), fill=True, color=theme.second)
        panel.stairs(now.ravel(), color=theme.ink, linewidth=1)
        panel.set_ylabel(way, rotation=0, ha="right", va="center", weight="bold", labelpad=10)
        panel.set(yticks=[], xticks=[], xlim=(0, now.size), ylim=(0, 1.05 * now.max()))
        for edge in range(1, len(now)):
            panel.axvline(edge * now.shape[1], color=theme.soft, linewidth=0.8, linestyle=(0, (2, 2)))
    panels[-1].set_xlabel("keys, in blocks", labelpad=4)
    parts = [("computed", theme.accent), ("stands for dropped blocks", theme.second), ("dense weights", theme.ink)]
    key(figure, parts, theme)
    return figure


def _weights(layer: int, head: int) -> tuple[np.ndarray, ...]:
    """Of some blocks of keys, [blocks, n]: a query's weights now and a step before, its scores, and which are kept."""
    pair, size, count, query = seen.recorded()[layer], 16, 6, 2096
    forward, _ = permutation("tile4x4x4", seen.site(pair.second).layout)
    rows = []
    for call in pair:
        q, k, _ = (x[0, head, forward] for x in seen.qkv(call))
        scores = q[query] @ k.T / q.shape[-1] ** 0.5
        rows.append(scores - scores.logsumexp(0))
    before, now = (row[2048 : 2048 + size * count].view(count, size).numpy() for row in rows)
    heavy = np.exp(now).sum(1)
    return np.exp(now), np.exp(before), now, (heavy >= np.sort(heavy)[-2])[:, None]


def rounded(theme: Theme) -> Figure:
    """Which numbers of a sparse product each precision rounds."""
    figure, axes = canvas(2.9)
    rows = ("queries, keys", "weights, values", "summaries", "dense steps")
    for column, (name, numbers) in enumerate(PRECISIONS.items()):
        x = 1.95 + 1.38 * column
        axes.text(x + 0.65, 2.65, name, ha="center", va="center", weight="bold")
        for i, format in enumerate((*numbers, "plain", "plain")):
            y = 1.9 - 0.58 * i
            few = format != "plain"
            box(axes, x, y, 1.3, 0.48, theme.accent if few else theme.faint, theme)
            text = format if few else "as given"
            axes.text(x + 0.65, y + 0.24, text, ha="center", va="center", color=theme.paper if few else theme.ink)
            if not column:
                axes.text(0.08, y + 0.24, rows[i], va="center")
    return figure


def guidance(theme: Theme) -> Figure:
    """A head's attention map, and what perturbations put in its place."""
    layer, head = _BLOCKY
    call = seen.recorded()[layer].second
    q, k, _ = (x[:, head : head + 1] for x in seen.qkv(call))
    layout = seen.site(call).layout
    to_blocks = torch.eye(layout.blocks(seen.BLOCK)).repeat_interleave(seen.BLOCK, 0)[: layout.tokens]
    product = Call(q, k, to_blocks[None, None])  # its output is the weight of each block of keys
    maps = {"the head": torch.nn.functional.scaled_dot_product_attention(q, k, product.value)}
    maps |= {kind: KINDS[kind](product, slice(0, layout.tokens), layout) for kind in _PERTURBATIONS}
    figure, axes = row(list(maps), gap=0.14)
    for panel, weights in zip(axes, maps.values(), strict=True):
        found = weights[0, 0].expand(layout.tokens, -1).unflatten(0, (-1, seen.BLOCK)).mean(1)
        picture(panel, heat(found / found.mean(), theme, theme.accent), theme)
    key(figure, [("more weight: stronger colour", theme.accent), ("none", theme.faint)], theme)
    return figure
