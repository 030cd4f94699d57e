"""`diffsparse simulate`: what windows can save on a grid, without running anything."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsparse.errors import ConfigError
from diffsparse_pipelines import options

if TYPE_CHECKING:
    from diffsparse.strategies.gna.windows import Cells, Tiling

_MOST_CELLS, _MOST_TOKENS = 1024, 2**21
_GRID, _WINDOWS, _TILES = "Size and sampling", "Strategy", "Tiles"


def simulate(
    grid: Annotated[
        str | None,
        typer.Option(help="Tokens: frames x rows x columns.", show_default="the model's", rich_help_panel=_GRID),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A known name, whose grid is taken.", show_default="tiny", rich_help_panel=_GRID, callback=options.text
        ),
    ] = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.NumFrames = None,
    window: options.Window = None,
    sparsity: options.Sparsity = None,
    stride: Annotated[
        str | None,
        typer.Option(
            help="One or several, separated by commas.", show_default="the tile's edges", rich_help_panel=_WINDOWS
        ),
    ] = None,
    dilation: options.Dilation = None,
    block: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a tile; its edges are chosen to fit the windows.",
            show_default="64",
            rich_help_panel=_TILES,
            callback=options.whole(1, options.MOST_BLOCK),
        ),
    ] = None,
    q_tile: Annotated[
        str | None, typer.Option(help="Edges of a tile of queries.", show_default="chosen", rich_help_panel=_TILES)
    ] = None,
    kv_tile: Annotated[
        str | None, typer.Option(help="Edges of a tile of keys.", show_default="the queries'", rich_help_panel=_TILES)
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            help="Of a dense step that attention takes, in [0, 1]: adds the end-to-end bounds.",
            callback=options.number(most=1),
        ),
    ] = None,
    dense: Annotated[
        float | None,
        typer.Option(help="Share of the steps that stay dense.", show_default="0", callback=options.number(most=1)),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell how much faster windowed attention (GNA) can be at most: by FLOPs, by tiles, end to end. Text is left out.

    As in the paper's table: diffsparse simulate --grid 30x48x80 --window 18x24x24 --stride 1x1x1,16x8x8
    --q-tile 4x8x8 --kv-tile 2x8x8 --share 0.607
    """
    from diffsparse.strategies.gna.bounds import bounds_of

    for beside, (option, given) in {
        "--window": ("--sparsity", window is not None and sparsity is not None),
        "--q-tile": ("--block", q_tile is not None and block is not None),
        "--grid": ("--model", grid is not None and model is not None),
        "--grid ": ("--height, --width or --frames", grid is not None and not {height, width, frames} <= {None}),
    }.items():
        if given:
            raise ConfigError(f"simulate takes no {option} beside {beside.strip()}; leave one of the two out")
    if dense is not None and share is None:
        raise ConfigError("--dense wants --share, the part of a dense step that attention takes")
    size = options.sampling(None, height, width, frames, None, None)
    cells = options.cells(grid, "--grid", 1) or _grid(model or "tiny", size)
    _check_grid(cells)
    keys, queries = options.cells(kv_tile, "--kv-tile", 1), options.cells(q_tile, "--q-tile", 1)
    strides = [options.cells(part, "--stride", 1) for part in (stride.split(",") if stride is not None else [None])]
    knobs = {
        "window": options.cells(window, "--window", 0),
        "dilation": options.cells(dilation, "--dilation", 1),
        "sparsity": sparsity,
        "block": block or 64,
    }
    rows = []
    for jump in strides:
        bounds = bounds_of(_tiling(cells, {**knobs, "stride": jump}, queries), keys)
        rows.append({"grid": cells, **asdict(bounds), **_end_to_end(bounds, share, dense or 0.0)})
    _show(rows, as_json)


def _grid(model: str, size: dict[str, Any]) -> Cells:
    from diffsparse_pipelines import families

    return families.grid(model, size)


def _check_grid(grid: Cells) -> None:
    """Refuse grids whose windows would take minutes to try: all of them are, and along each axis cell by cell."""
    if max(grid) > _MOST_CELLS or math.prod(grid) > _MOST_TOKENS:
        raise ConfigError(
            f"a grid of {_cell(grid)} tokens is too large to simulate: wanted at most {_MOST_CELLS} along an axis, and "
            f"{_MOST_TOKENS} in all"
        )


def _tiling(grid: Cells, knobs: dict[str, Any], tile: Cells | None) -> Tiling:
    from diffsparse.strategies.gna.strategy import GNA

    return GNA(**{name: value for name, value in knobs.items() if value is not None}).tiling(grid, tile)


def _end_to_end(bounds: Any, share: float | None, dense: float) -> dict[str, float]:
    from diffsparse.insight.cost import end_to_end

    if share is None:
        return {}
    return {
        "end_to_end_flop_bound": end_to_end(share, bounds.flop_bound, dense),
        "end_to_end_tile_bound": end_to_end(share, bounds.tile_bound, dense),
    }


# key of a row -> heading
_COLUMNS = {
    "window": "window",
    "stride": "stride",
    "q_tile": "query tile",
    "kv_tile": "key tile",
    "sparsity": "sparsity",
    "density": "density",
    "flop_bound": "FLOP bound",
    "tile_bound": "tile bound",
    "end_to_end_flop_bound": "end to end (FLOP)",
    "end_to_end_tile_bound": "end to end (tile)",
}


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    from rich import box
    from rich.table import Table

    from diffsparse_pipelines.progress import terminal

    if as_json:
        typer.echo(json.dumps({"rows": rows}, indent=1))
        return
    title = f"{_cell(rows[0]['grid'])} tokens: speed-up of attention at most"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
    for name in _COLUMNS:
        if name in rows[0]:
            table.add_column(_COLUMNS[name], justify="right")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in _COLUMNS if name in row))
    terminal().print(table)


def _cell(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:.3f}"
