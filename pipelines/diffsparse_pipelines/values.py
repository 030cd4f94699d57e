"""How texts of the command line become values, and the largest numbers that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsparse.errors import ConfigError

if TYPE_CHECKING:
    from diffsparse_kernels import Block

MOST = 1_000_000  # pixels, frames: whether the machine can hold them is checked elsewhere
MOST_STEPS = 10_000
MOST_COUNT = 10_000  # of rounds, images, sampled steps, groups, ...
MOST_BLOCK = 4096  # tokens of a block
MOST_SEED = 2**64 - 1  # what a generator of torch takes
_DIGITS = 64  # more than any of these has

Cells = tuple[int, int, int]


def amount(text: str, option: str) -> int | float:
    """A number of steps ("3") or a fraction ("0.2").

    Raises:
        ConfigError: neither.
    """
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ConfigError(f"{option} wants a number such as 3 or a fraction such as 0.2; got {text!r}") from None


def amounts(text: str, option: str) -> tuple[int | float, ...]:
    """Numbers or fractions, separated by commas; an empty text is an empty tuple."""
    return tuple(amount(part, option) for part in names(text))


def shares(text: str, option: str) -> tuple[float, ...]:
    """One or more numbers in [0, 1), separated by commas.

    Raises:
        ConfigError: none, or something else.
    """
    try:
        found = tuple(float(part) for part in names(text))
    except ValueError:
        found = ()
    if not found or not all(0 <= share < 1 for share in found):
        raise ConfigError(f"{option} wants numbers in [0, 1), separated by commas, such as 0.5,0.8; got {text!r}")
    return found


def wholes(text: str, option: str, least: int, most: int) -> tuple[int, ...]:
    """One or more whole numbers in [least, most], separated by commas.

    Raises:
        ConfigError: none, or something else.
    """
    parts = names(text)
    if not parts or not all(_is_whole(part, least, most) for part in parts):
        raise ConfigError(f"{option} wants whole numbers from {least} to {most}, separated by commas; got {text!r}")
    return tuple(map(int, parts))


def blocks(text: str, option: str) -> tuple[Block, ...]:
    """One or more blocks, separated by commas: tokens ("64"), or queries x keys ("128x64").

    Raises:
        ConfigError: none, or something else.
    """
    return tuple(_block(part, option) for part in names(text) or ("",))


def block(text: str | None, option: str) -> Block | None:
    """One of these; None if nothing is given.

    Raises:
        ConfigError: anything else.
    """
    return None if text is None else _block(text, option)


def layers(text: str, option: str) -> tuple[int, ...]:
    """Numbers of layers, separated by commas; negative ones count from the end, and an empty text is an empty tuple.

    Raises:
        ConfigError: something else.
    """
    found = amounts(text, option)
    if not all(isinstance(layer, int) for layer in found):
        raise ConfigError(f"{option} wants whole numbers separated by commas; got {text!r}")
    return tuple(int(layer) for layer in found)


def cells(text: str | None, option: str, least: int) -> Cells | None:
    """Frames, rows and columns ("8x16x16"), each from `least` to a million; None if nothing is given.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split("x")]
    if len(parts) != 3 or not all(_is_whole(part, least, MOST) for part in parts):
        raise ConfigError(
            f"{option} wants frames x rows x columns such as 8x16x16, each from {least} to {MOST}; got {text!r}"
        )
    frames, rows, columns = map(int, parts)
    return frames, rows, columns


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _block(text: str, option: str) -> Block:
    edges = [part.strip() for part in text.split("x")]
    if len(edges) > 2 or not all(_is_whole(edge, 1, MOST_BLOCK) for edge in edges):
        raise ConfigError(
            f"{option} wants a whole number from 1 to {MOST_BLOCK}, or queries x keys such as 128x64; got {text!r}"
        )
    queries, keys = int(edges[0]), int(edges[-1])
    return queries if queries == keys else (queries, keys)


def _is_whole(text: str, least: int, most: int) -> bool:
    """Whether a text is a whole number in [least, most]; Python reads no number of thousands of digits."""
    return text.isdecimal() and len(text) <= _DIGITS and least <= int(text) <= most
