"""Checks of single options, for `typer.Option(callback=)`: each gives back a value that may stand, None included.

Those of numbers are asked, too, about a text that is none: the parser leaves it to them to say what is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import typer

from diffsparse.errors import ConfigError


def whole(least: int, most: int) -> Callable[[typer.CallbackParam, int | str | None], int | None]:
    """A whole number in [least, most], or None."""

    def check(param: typer.CallbackParam, value: int | str | None) -> int | None:
        if isinstance(value, str) or (value is not None and not least <= value <= most):
            raise ConfigError(f"{param.opts[0]} wants a whole number from {least} to {most}; got {value!r}")
        return value

    return check


def number(
    least: float = 0.0, most: float = math.inf, below: float = math.inf
) -> Callable[[typer.CallbackParam, float | str | None], float | None]:
    """A finite number in [least, most], under `below`, or None."""
    limits = f"in [{least:g}, {below:g})" if below < math.inf else f"in [{least:g}, {most:g}]"
    wanted = f"number {limits}" if min(most, below) < math.inf else f"finite number of at least {least:g}"

    def holds(value: float) -> bool:
        return math.isfinite(value) and least <= value <= most and value < below

    def check(param: typer.CallbackParam, value: float | str | None) -> float | None:
        if isinstance(value, str) or (value is not None and not holds(value)):
            raise ConfigError(f"{param.opts[0]} wants a {wanted}; got {value!r}")
        return value

    return check


def text(param: typer.CallbackParam, value: str | None) -> str | None:
    """A text that is not empty."""
    if value is not None and not value.strip():
        raise ConfigError(f"{param.opts[0]} wants a value; got an empty text")
    return value


def file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """The name of a file or folder; an empty one would be the working folder."""
    if value is not None and value == Path():
        raise ConfigError(f"{param.opts[0]} wants the name of a file or folder; got an empty one")
    return value


def number_format(param: typer.CallbackParam, value: str) -> str:
    """One of the number formats in which models run."""
    from diffsparse_pipelines.families import DTYPES

    if value not in DTYPES:
        raise ConfigError(f"{param.opts[0]} wants one of {', '.join(DTYPES)}; got {value!r}")
    return value
