"""`diffsparse simulate`: what windows can save on a grid, without running anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsparse_pipelines import options

if TYPE_CHECKING:
    from diffsparse.windows import Cells, Tiling

_GRID, _WINDOWS, _TILES = "Size and sampling", "Strategy", "Tiles"


def simulate(
    grid: Annotated[
        str, typer.Option(help="Tokens: frames x rows x columns.", show_default="the model's", rich_help_panel=_GRID)
    ] = "",
    model: Annotated[str, typer.Option(help="A known name, whose grid is taken.", rich_help_panel=_GRID)] = "tiny",
    height: options.Height = None,
    width: options.Width = None,
    frames: options.NumFrames = None,
    window: options.Window = "",
    sparsity: Annotated[
        float, typer.Option(help="Share of blocks to drop, if no window is given.", rich_help_panel=_WINDOWS)
    ] = 0.8,
    stride: Annotated[
        str,
        typer.Option(
            help="One or several, separated by commas.", show_default="the tile's edges", rich_help_panel=_WINDOWS
        ),
    ] = "",
    dilation: options.Dilation = "1x1x1",
    block: Annotated[
        int, typer.Option(help="Tokens of a tile; its edges are chosen to fit the windows.", rich_help_panel=_TILES)
    ] = 64,
    q_tile: Annotated[
        str, typer.Option(help="Edges of a tile of queries.", show_default="chosen", rich_help_panel=_TILES)
    ] = "",
    kv_tile: Annotated[
        str, typer.Option(help="Edges of a tile of keys.", show_default="the queries'", rich_help_panel=_TILES)
    ] = "",
    share: Annotated[
        float | None, typer.Option(help="Of a dense step that attention takes, in [0, 1]: adds the end-to-end bounds.")
    ] = None,
    dense: Annotated[float, typer.Option(help="Share of the steps that stay dense.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell how much faster windowed attention (GNA) can be at most: by FLOPs, by tiles, end to end. Text is left out.

    As in the paper's table: diffsparse simulate --grid 30x48x80 --window 18x24x24 --stride 1x1x1,16x8x8
    --q-tile 4x8x8 --kv-tile 2x8x8 --share 0.607
    """
    from diffsparse.simulate import simulate as bounds_of

    cells = options.cells(grid, "--grid", 1) or _grid(model, options.sampling(None, height, width, frames, None, None))
    keys, queries = options.cells(kv_tile, "--kv-tile", 1), options.cells(q_tile, "--q-tile", 1)
    strides = [options.cells(text, "--stride", 1) for text in stride.split(",")]
    knobs = {"window": options.cells(window, "--window", 0), "dilation": options.cells(dilation, "--dilation", 1)}
    rows = []
    for jump in strides:
        bounds = bounds_of(_tiling(cells, {**knobs, "stride": jump}, sparsity, block, queries), keys)
        rows.append({"grid": cells, **asdict(bounds), **_end_to_end(bounds, share, dense)})
    _show(rows, as_json)


def _grid(model: str, size: dict[str, Any]) -> Cells:
    from diffsparse_pipelines import families

    return families.grid(model, size)


def _tiling(grid: Cells, knobs: dict[str, Any], sparsity: float, block: int, tile: Cells | None) -> Tiling:
    from diffsparse.strategies.gna import GNA

    return GNA(**{k: v for k, v in knobs.items() if v}, sparsity=sparsity, block=block).tiling(grid, tile)


def _end_to_end(bounds: Any, share: float | None, dense: float) -> dict[str, float]:
    from diffsparse.simulate import end_to_end

    if share is None:
        return {}
    return {
        "end_to_end_flop_bound": end_to_end(bounds.flop_bound, share, dense),
        "end_to_end_tile_bound": end_to_end(bounds.tile_bound, share, dense),
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
