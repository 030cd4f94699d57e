"""The command line: a table of commands, a parser of their options, and one line for whatever goes wrong.

The parser, typer, comes with the extra "cli". Where it is missing, or another package of an extra that a command wants,
the command line ends in one line that names the extra.
"""

from __future__ import annotations

import os
import re
import sys
from typing import NoReturn

from diffsparse.cli.table import COMMANDS, EXTRAS, RICH, missing
from diffsparse.errors import DiffsparseError

__all__ = ["COMMANDS", "RICH", "main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input, also what the parser refuses, ends with one line and exit code 2."""
    # Threads that spin while they wait take a busy CPU from those they wait for: runs take 30 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from diffsparse.cli import parser

        code = parser.run(arguments)
    except DiffsparseError as error:
        _refuse(_as_typed(str(error), sys.argv[1:] if arguments is None else arguments))
    except ImportError as error:
        _refuse(_wanted(error))
    except Exception as error:
        if not _lacks_memory(error):
            raise
        _refuse(f"out of memory ({error}); lower --height, --width or --frames, or try --offload or --vae-tiling")
    sys.exit(code)


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _as_typed(message: str, arguments: list[str]) -> str:
    """A knob that begins a message, as callers in Python know it, goes by the name of its option if that was typed."""
    knob = re.match(r"(\w+)(?= ('[^']*' )?wants )", message)
    if knob is None:
        return message
    option, typed = f"--{knob[1].replace('_', '-')}", {argument.partition("=")[0] for argument in arguments}
    name = next((name for name in (option, f"{option}s") if name in typed), knob[1])  # --orders takes several
    return f"{name}{message[knob.end() :]}"


def _wanted(error: ImportError) -> str:
    """Which package is missing, and the extra that brings it; an error that is of no such package is raised again."""
    package = missing(error)
    if package is None:
        raise error
    return f"this command wants the package {package}: pip install 'diffsparse[{EXTRAS[package]}]'"


def _lacks_memory(error: Exception) -> bool:
    """Of Python, of a GPU, or of torch on a CPU, which raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("out of memory", "not enough memory", "can't allocate memory")
    )
