"""The command line: one table, subcommand -> where its function lives, imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from diffsparse.errors import DiffsparseError

RICH = find_spec("rich") is not None  # typer's newest releases take it for granted
_MARKUP: Any = "rich" if RICH else None
_SETTINGS = {"help_option_names": ["-h", "--help"]}
# click's ClickException, through a name that typer has: its newest releases bring a click of their own along
_REFUSALS: Any = typer.BadParameter.__mro__[2]

# name -> (module:function, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("diffsparse_pipelines.generate:generate", "Generate a video or an image from a prompt."),
    "evaluate": ("diffsparse_eval.evaluate:evaluate", "Compare strategies with dense attention: fidelity and speed."),
    "calibrate": ("diffsparse_pipelines.calibrate:calibrate", "Search a plan offline, for strategies that run on one."),
    "hunt": ("diffsparse_pipelines.hunt:hunt", "Search heads whose perturbation raises an objective (HeadHunter)."),
    "simulate": ("diffsparse_pipelines.simulate:simulate", "Tell what windowed attention can save, without running."),
    "inspect": ("diffsparse_eval.inspect:inspect", "Draw attention, chosen blocks, orders and recall by head."),
    "bench": ("diffsparse_eval.bench:bench", "Time the attention kernels beside torch's, in one process."),
    "doctor": ("diffsparse_eval.doctor:doctor", "Show versions, devices, and which backends run here."),
}


class _LazyGroup(TyperGroup):
    """Knows its subcommands by name and help; imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, (load(name) if name else None), rest

    def invoke(self, ctx: Any) -> Any:
        """Ctrl-C ends in one line: what is kept and how to go on, as the command has noted (`files.if_stopped`)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            kept = getattr(stop, "__notes__", None) or ["nothing was written"]
            print(f"stopped: {'; '.join(kept)}", file=sys.stderr)
            sys.exit(130)


def load(name: str) -> Any:
    """The command behind a row of the table."""
    module, function = COMMANDS[name][0].split(":")
    single = typer.Typer(add_completion=False, rich_markup_mode=_MARKUP, context_settings=_SETTINGS)
    single.command(name)(getattr(import_module(module), function))
    return typer.main.get_command(single)


def _group() -> Any:
    app = typer.Typer(cls=_LazyGroup, rich_markup_mode=_MARKUP, context_settings=_SETTINGS)

    @app.callback(invoke_without_command=True)
    def diffsparse(
        ctx: typer.Context,
        version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    ) -> None:
        """Training-free sparse attention for diffusion transformers."""
        if ctx.invoked_subcommand is None:
            typer.echo(ctx.get_help())

    for name, (_, summary) in COMMANDS.items():
        app.command(name, help=summary)(lambda: None)
    return typer.main.get_command(app)


def _version(asked: bool) -> None:
    if asked:
        from diffsparse import __version__

        typer.echo(f"diffsparse {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input, also what the parser refuses, ends with one line and exit code 2."""
    try:
        code = _group().main(args=arguments, prog_name="diffsparse", standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except DiffsparseError as error:
        _refuse(str(error))
    except _REFUSALS as error:
        _refuse(error.format_message())
    except Exception as error:
        if not _lacks_memory(error):
            raise
        _refuse(f"out of memory ({error}); lower --height, --width or --frames, or try --offload or --vae-tiling")
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _lacks_memory(error: Exception) -> bool:
    """Of Python, of a GPU, or of torch on a CPU, which raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("out of memory", "not enough memory", "can't allocate memory")
    )
