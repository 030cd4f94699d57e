"""Which prompts and seeds a command runs over."""

from __future__ import annotations

from pathlib import Path

from diffsparse.errors import ConfigError, InputFileError
from diffsparse.files import reason
from diffsparse_pipelines import families, values

MOST = 1000  # captions of the embedded models: more than there are different ones, the rest repeats
_DIGITS = 64  # read of a number: Python refuses one of thousands
PROMPTS = Path(__file__).with_name("prompts.txt")


def read_prompts(wanted: str, model: str, option: str = "--prompts") -> tuple[str, ...]:
    """Built-in prompts by number, or the lines of a file; lines that are empty or begin with # don't count.

    Raises:
        ConfigError: a number below one, or above what there is.
        InputFileError: a file that is missing or empty.
    """
    number = _number(wanted)
    if number is None:
        return _lines(Path(wanted))
    built_in = None if families.variant(model) else _lines(PROMPTS)
    most = MOST if built_in is None else len(built_in)
    if not 1 <= number <= most:
        raise ConfigError(f"{option} wants a file, or a number from 1 to {most}; got {wanted}")
    if built_in is not None:
        return built_in[:number]
    from diffsparse_pipelines import tiny

    return tuple(tiny.prompts(number))


def _number(text: str) -> int | None:
    """The number that a text means, -1 if it is negative; None for the name of a file."""
    digits = text.strip().lstrip("-")
    return (-1 if text.strip() != digits else int(digits[:_DIGITS])) if digits.isdecimal() else None


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(
            f"can't read the prompt file {path}: {reason(error)}; wanted a number, or a text file in UTF-8 with one "
            "prompt a line"
        ) from error
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise InputFileError(f"the prompt file {path} holds no prompt; write one a line")
    return found


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds from a comma-separated list, none twice.

    Raises:
        ConfigError: none, or something that is no whole number of 64 bits.
    """
    return tuple(dict.fromkeys(values.wholes(text, "--seeds", 0, values.MOST_SEED)))
