"""The command line: one table, subcommand -> where its function lives, imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffsparse.errors import DiffsparseError

RICH = find_spec("rich") is not None  # typer's newest releases take it for granted
_MARKUP: Any = "rich" if RICH else None

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
    single = typer.Typer(add_completion=False, rich_markup_mode=_MARKUP)
    single.command(name)(getattr(import_module(module), function))
    return typer.main.get_command(single)


def _group() -> Any:
    app = typer.Typer(cls=_LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=_MARKUP)

    @app.callback()
    def diffsparse(
        version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    ) -> None:
        """Training-free sparse attention for diffusion transformers."""

    for name, (_, summary) in COMMANDS.items():
        app.command(name, help=summary)(lambda: None)
    return typer.main.get_command(app)


def _version(asked: bool) -> None:
    if asked:
        from diffsparse import __version__

        typer.echo(f"diffsparse {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input ends with one line and exit code 2."""
    try:
        _group().main(args=arguments, prog_name="diffsparse")
    except DiffsparseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
