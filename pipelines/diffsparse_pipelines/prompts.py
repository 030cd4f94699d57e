"""Which prompts and seeds a command runs over."""

from __future__ import annotations

from pathlib import Path

from diffsparse.errors import ConfigError, InputFileError

PROMPTS = Path(__file__).with_name("prompts.txt")


def read_prompts(wanted: str, model: str) -> tuple[str, ...]:
    """Built-in prompts by number, or the lines of a file; lines that are empty or begin with # don't count.

    Raises:
        ConfigError: a number below one, or above what there is. InputFileError: a file that is missing or empty.
    """
    if not wanted.lstrip("-").isdecimal():
        return _lines(Path(wanted))
    if model.startswith("tiny"):
        from diffsparse_pipelines import tiny

        listed = tuple(tiny.prompts(max(int(wanted), 0)))
    else:
        listed = _lines(PROMPTS)[: max(int(wanted), 0)]
    if int(wanted) < 1 or len(listed) < int(wanted):
        raise ConfigError(f"--prompts wants a file, or a number from 1 to {len(_lines(PROMPTS))}; got {wanted}")
    return listed


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"can't read the prompt file {path}: {error}") from error
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise InputFileError(f"the prompt file {path} holds no prompt; write one a line")
    return found


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds from a comma-separated list.

    Raises:
        ConfigError: none, or something that is no whole number.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds wants whole numbers separated by commas; got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))
