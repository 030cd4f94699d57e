"""The parser of the command line, on typer: a command's parameters, and the fields of dataclasses, are its options."""

from __future__ import annotations

import functools
import inspect
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from diffsparse.cli.table import COMMANDS, RICH, command
from diffsparse.errors import ConfigError

_FRAMED = 80  # letters of a line from which help stands in frames
_SETTINGS = {"help_option_names": ["-h", "--help"]}
# click's ClickException, through a name that typer has: its newest releases bring a click of their own along
_REFUSALS: type[Exception] = typer.BadParameter.__mro__[2]


def run(arguments: list[str] | None) -> int:
    """Run the command line; the exit code.

    Raises:
        ConfigError: the parser refused the arguments.
    """
    try:
        code = _group().main(args=arguments, prog_name="diffsparse", standalone_mode=False)
    except typer.Abort:
        return 130
    except _REFUSALS as error:
        raise ConfigError(getattr(error, "format_message", error.__str__)()) from error
    return code if isinstance(code, int) else 0


def load(name: str) -> object:
    """The command of a row of the table, with a parser of its options."""
    single = typer.Typer(add_completion=False, rich_markup_mode=_markup(), context_settings=_SETTINGS)
    function = command(name)
    single.command(name, cls=_Command, epilog=_epilog(function))(flat(function))
    return typer.main.get_command(single)


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command as the parser wants it: one parameter for each option, all to be given by name.

    A parameter of the command that is a dataclass gives way to those of its fields that are `Annotated`, and the
    command is called with the object made of them. A field without such an annotation keeps its default.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, list[str]] = {}  # parameter of the command -> its options
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            parameters += (options := _options(hints[name]))
            groups[name] = [option.name for option in options]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command, assigned=("__name__",))
    def called(**given: object) -> None:
        made = {name: hints[name](**{key: given.pop(key) for key in options}) for name, options in groups.items()}
        command(**given, **made)

    called.__dict__["__signature__"] = inspect.Signature(parameters)
    about = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]  # what follows is for callers in Python
    called.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", about)  # the lines of a paragraph end where the terminal does
    return called


def _epilog(command: Callable[..., None]) -> str | None:
    """What stands below the options: the `epilog` of the first dataclass among the parameters that has one."""
    hints = get_type_hints(command, include_extras=True).values()
    return next((hint.epilog for hint in hints if is_dataclass(hint) and hasattr(hint, "epilog")), None)


def _markup() -> Literal["rich"] | None:
    """How help is drawn: typer's newest releases take rich for granted, whose columns cut names on narrow terminals."""
    return "rich" if RICH and shutil.get_terminal_size((80, 24)).columns >= _FRAMED else None


def _options(group: type) -> list[inspect.Parameter]:
    """The fields of a dataclass that are `Annotated`, as parameters."""
    hints, kind = get_type_hints(group, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            field.name,
            kind,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
        if get_origin(hints[field.name]) is Annotated
    ]


class _Command(TyperCommand):
    """A command that says what is wanted where a value is wrong or missing; each release of typer words less of it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            option: Any = error.param
            text = self.make_parser(ctx).parse_args(args=given)[0].get(option.name)
            if text is None:
                what = option.help.rstrip(".")
                raise ConfigError(f"{self.name} wants {option.opts[0]}; got none. Give it a value: {what}") from error
            if option.callback is not None:
                option.callback(ctx, option, text)  # its check of the value refuses the text, too
            raise


class _LazyGroup(TyperGroup):
    """Knows its subcommands by name and help; imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, (load(name) if name else None), rest

    def invoke(self, ctx: Any) -> object:
        """Ctrl-C ends in one line: what is kept and how to go on, as the command has noted (`files.if_stopped`)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            kept = getattr(stop, "__notes__", None) or ["nothing was written"]
            print(f"stopped: {'; '.join(kept)}", file=sys.stderr)
            sys.exit(130)


def _group() -> TyperGroup:
    app = typer.Typer(cls=_LazyGroup, rich_markup_mode=_markup(), context_settings=_SETTINGS)

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
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def _version(asked: bool) -> None:
    if asked:
        from diffsparse import __version__

        typer.echo(f"diffsparse {__version__}")
        raise typer.Exit
