"""`diffsparse simulate`: what windows can save on a grid, or what a run takes on a device, without running anything."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from diffsparse.errors import ConfigError, UnknownNameError, closest
from diffsparse_pipelines import values
from diffsparse_pipelines.commands import checks
from diffsparse_pipelines.commands.options import (
    KNOWN,
    Dilation,
    Frames,
    Height,
    SamplingOptions,
    Sparsity,
    Width,
    Window,
)
from diffsparse_pipelines.values import Cells

if TYPE_CHECKING:
    from diffsparse.insight.device import Device
    from diffsparse.strategies.gna.bounds import Bounds
    from diffsparse_pipelines.commands.forecasts import Columns, Foretold, Row

_MOST_CELLS, _MOST_TOKENS = 1024, 2**21
_GRID, _WINDOWS, _TILES, _RUNS = "Size and sampling", "Strategy", "Tiles", "Whole runs"


@dataclass(frozen=True)
class GridOptions:
    """A grid of tokens: given, or that of a known model at a size."""

    epilog: ClassVar[str] = KNOWN
    grid: Annotated[
        str | None,
        typer.Option(help="Tokens: frames x rows x columns.", show_default="the model's", rich_help_panel=_GRID),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="A known name, whose grid is taken.", show_default="tiny", rich_help_panel=_GRID, callback=checks.text
        ),
    ] = None
    height: Height = None
    width: Width = None
    frames: Frames = None

    @property
    def cells(self) -> Cells:
        """Tokens along frames, rows and columns.

        Raises:
            UnknownNameError: no such model. ConfigError: a size that it can't make, or a grid too large to simulate.
        """
        from diffsparse_pipelines import families

        size = SamplingOptions(height=self.height, width=self.width, frames=self.frames).arguments()
        _exclude("--model", self.model is not None, "--grid", self.grid is not None)
        _exclude("--height, --width or --frames", bool(size), "--grid", self.grid is not None)
        grid = values.cells(self.grid, "--grid", 1) or families.grid(self.model or "tiny", size)
        if max(grid) > _MOST_CELLS or math.prod(grid) > _MOST_TOKENS:  # each cell of an axis is tried
            raise ConfigError(
                f"a grid of {_text(grid)} tokens is too large to simulate: wanted at most {_MOST_CELLS} along an axis, "
                f"and {_MOST_TOKENS} in all"
            )
        return grid


@dataclass(frozen=True)
class WindowOptions:
    """Windows of attention, and the tiles in which a kernel computes them."""

    window: Window = None
    sparsity: Sparsity = None
    stride: Annotated[
        str | None,
        typer.Option(
            help="One or several, separated by commas.", show_default="the tile's edges", rich_help_panel=_WINDOWS
        ),
    ] = None
    dilation: Dilation = None
    block: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a tile; its edges are chosen to fit the windows.",
            show_default="64",
            rich_help_panel=_TILES,
            callback=checks.whole(1, values.MOST_BLOCK),
        ),
    ] = None
    q_tile: Annotated[
        str | None, typer.Option(help="Edges of a tile of queries.", show_default="chosen", rich_help_panel=_TILES)
    ] = None
    kv_tile: Annotated[
        str | None, typer.Option(help="Edges of a tile of keys.", show_default="the queries'", rich_help_panel=_TILES)
    ] = None

    def bounds(self, grid: Cells) -> list[Bounds]:
        """What the windows can save at most on a grid, for each stride.

        Raises:
            ConfigError: options that exclude each other, or windows that don't fit the grid.
        """
        from diffsparse.strategies import with_knobs
        from diffsparse.strategies.gna.bounds import bounds_of
        from diffsparse.strategies.gna.strategy import GNA

        keys, queries = values.cells(self.kv_tile, "--kv-tile", 1), values.cells(self.q_tile, "--q-tile", 1)
        listed = [None] if self.stride is None else self.stride.split(",")
        strides = [values.cells(part, "--stride", 1) for part in listed]
        knobs = {
            "window": values.cells(self.window, "--window", 0),
            "dilation": values.cells(self.dilation, "--dilation", 1),
            "sparsity": self.sparsity,
            "block": self.block or 64,
        }
        chosen = [with_knobs(GNA, {**knobs, "stride": stride}) for stride in strides]
        return [bounds_of(strategy.tiling(grid, queries), keys) for strategy in chosen]


@dataclass(frozen=True)
class RunOptions:
    """Whole runs on a device, in place of windows."""

    device: Annotated[
        str | None,
        typer.Option(help="Tell the time of runs on it: h100, h100-unfused.", rich_help_panel=_RUNS),
    ] = None
    strategy: Annotated[
        str | None,
        typer.Option(
            help="Names separated by commas.",
            show_default="digest,tangent,adaspa",
            rich_help_panel=_RUNS,
            callback=checks.text,
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps.",
            show_default="model's",
            rich_help_panel=_RUNS,
            callback=checks.whole(1, values.MOST_STEPS),
        ),
    ] = None
    dense_first: Annotated[
        str | None,
        typer.Option(
            help="Dense steps at the start, one or several, separated by commas.",
            show_default="0.2,0.1",
            rich_help_panel=_RUNS,
        ),
    ] = None

    pieces: Annotated[
        bool,
        typer.Option(
            "--pieces", help="Show what each step does, and the rates that it rests on, too.", rich_help_panel=_RUNS
        ),
    ] = False

    @property
    def chosen(self) -> Device:
        """The device.

        Raises:
            UnknownNameError: no such device.
        """
        from diffsparse.insight.device import DEVICES

        name = self.device or ""
        if name not in DEVICES:
            raise UnknownNameError(f"no device is called {name!r}; known: {closest(name, DEVICES)}")
        return DEVICES[name]

    def foretold(self, grid: GridOptions, windows: WindowOptions) -> list[Foretold]:
        """The runs.

        Raises:
            ConfigError, UnknownNameError: an option that doesn't fit.
        """
        from diffsparse.schedule import Schedule
        from diffsparse_pipelines import families
        from diffsparse_pipelines.commands import forecasts

        if grid.model is None:
            raise ConfigError("--device wants --model, the name of a known one")
        few = families.few_steps(grid.model, self.steps or families.defaults(grid.model).get("num_inference_steps"))
        sparsity = few.sparsity if few and windows.sparsity is None else windows.sparsity
        knobs = {"sparsity": sparsity, **({} if windows.block is None else {"block": windows.block})}
        names = values.names(self.strategy or "digest,tangent,adaspa")
        strategies = forecasts.on_device(names, self.chosen, **knobs)
        schedules = [Schedule(first) for first in values.amounts(self.dense_first or "0.2,0.1", "--dense-first")]
        size = SamplingOptions(self.steps, grid.height, grid.width, grid.frames).arguments()
        return forecasts.foretell(grid.model, size, self.chosen, strategies, schedules)


_GRIDS, _WINDOWED, _RUN = GridOptions(), WindowOptions(), RunOptions()


def simulate(
    grid: GridOptions = _GRIDS,
    windows: WindowOptions = _WINDOWED,
    run: RunOptions = _RUN,
    share: Annotated[
        float | None,
        typer.Option(
            help="Of a dense step that attention takes, in [0, 1]: adds the end-to-end bounds.",
            callback=checks.number(most=1),
        ),
    ] = None,
    dense: Annotated[
        float | None,
        typer.Option(help="Share of the steps that stay dense.", show_default="0", callback=checks.number(most=1)),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how much faster windowed attention (GNA) can be at most: by FLOPs, by tiles, end to end. Text is left out.

    As in the paper's table: diffsparse simulate --grid 30x48x80 --window 18x24x24 --stride 1x1x1,16x8x8
    --q-tile 4x8x8 --kv-tile 2x8x8 --share 0.607

    With --device: what whole runs of other strategies take there, text included, from rates that were measured or are
    assumed, as the last table of --pieces says: diffsparse simulate --model hunyuan-video --device h100

    Args:
        grid: the grid of tokens.
        windows: windows and tiles.
        run: whole runs on a device instead.
        share: of a dense step that attention takes; None leaves out the end-to-end bounds.
        dense: share of the steps that stay dense.
        as_json: print JSON instead of a table.

    Raises:
        ConfigError, UnknownNameError: an option that doesn't fit.
    """
    if run.device is not None:
        return _show_runs(run, grid, windows, {"--share": share, "--dense": dense}, as_json)
    _exclude_runs(run)
    _exclude("--sparsity", windows.sparsity is not None, "--window", windows.window is not None)
    _exclude("--block", windows.block is not None, "--q-tile", windows.q_tile is not None)
    if dense is not None and share is None:
        raise ConfigError("--dense wants --share, the part of a dense step that attention takes")
    cells = grid.cells
    rows = [
        {"grid": cells, **asdict(bounds), **_end_to_end(bounds, share, dense or 0.0)}
        for bounds in windows.bounds(cells)
    ]
    if as_json:
        typer.echo(json.dumps({"rows": rows}, indent=1))
    else:
        _show(rows)


def _exclude_runs(run: RunOptions) -> None:
    """Refuse what is of whole runs alone."""
    options = {"--strategy": run.strategy, "--steps": run.steps, "--dense-first": run.dense_first}
    for option, value in {**options, "--pieces": run.pieces or None}.items():
        if value is not None:
            raise ConfigError(f"{option} wants --device, on which runs are told")


def _exclude(option: str, given: bool, other: str, other_given: bool) -> None:
    """Refuse two options that say the same."""
    if given and other_given:
        raise ConfigError(f"simulate takes no {option} beside {other}; leave one of the two out")


def _end_to_end(bounds: Bounds, share: float | None, dense: float) -> dict[str, float]:
    from diffsparse.insight.cost import end_to_end

    if share is None:
        return {}
    return {
        "end_to_end_flop_bound": end_to_end(share, bounds.flop_bound, dense),
        "end_to_end_tile_bound": end_to_end(share, bounds.tile_bound, dense),
    }


def _show_runs(
    run: RunOptions, grid: GridOptions, windows: WindowOptions, shares: dict[str, float | None], as_json: bool
) -> None:
    from diffsparse_pipelines.commands.forecasts import rates

    useless = {"--grid": grid.grid, "--window": windows.window, "--stride": windows.stride, **shares}
    useless |= {"--dilation": windows.dilation, "--q-tile": windows.q_tile, "--kv-tile": windows.kv_tile}
    for option, value in useless.items():
        _exclude(option, value is not None, "--device", True)
    found = run.foretold(grid, windows)
    if as_json:
        rows, pieces = [each.row() for each in found], [piece for each in found for piece in each.pieces()]
        told = {"run": found[0].made._asdict(), "rows": rows, "pieces": pieces, "rates": rates(run.chosen)}
        typer.echo(json.dumps(told, indent=1))
    else:
        _show_foretold(found, run, grid.model or "")


def _show_foretold(found: list[Foretold], run: RunOptions, model: str) -> None:
    from diffsparse_pipelines.commands.forecasts import OVER_FASTEST, PIECES, RATES, RUNS, cells, rates
    from diffsparse_pipelines.progress import say, show_table

    def show(rows: list[Row], columns: Columns, alignment: str, title: str, spare: tuple[str, ...] = ()) -> None:
        show_table(cells(rows, columns), alignment, [name for name, _ in columns.values()], title, spare)

    title = f"{model} on {run.device}, by a model of time\n{found[0].made}"
    show([each.row() for each in found], RUNS, "lrrrrrrrrr", title, ("beside blocks", "searches", "attention share"))
    say(OVER_FASTEST, highlight=False, fill=True)
    if run.pieces:
        first = [each for each in found if each.schedule == found[0].schedule]
        show([piece for each in first for piece in each.pieces()], PIECES, "lllrrrr", "\na layer, one sample")
        show(rates(run.chosen), RATES, "lrll", "\nrates that it rests on")
    else:
        say("what each step does, and the rates that it rests on: --pieces", highlight=False)


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


def _show(rows: list[dict[str, Cells | float]]) -> None:
    from diffsparse_pipelines.progress import show_table

    columns = [name for name in _COLUMNS if name in rows[0]]
    show_table(
        [[_text(row[name]) for name in columns] for row in rows],
        "r" * len(columns),
        [_COLUMNS[name] for name in columns],
        f"{_text(rows[0]['grid'])} tokens: speed-up of attention at most",
        ("density",),
    )


def _text(value: Cells | float) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:.3f}"
