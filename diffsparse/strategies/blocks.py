"""What block strategies share: their knobs' limits, and how a sparsity becomes a number of blocks."""

from __future__ import annotations

import math
from fractions import Fraction

from diffsparse.errors import ConfigError
from diffsparse.orders.layout import Layout
from diffsparse.schedule import exact, nearest

MOST_BLOCK = 4096  # tokens: a larger one is attention over all of them, at the price of padding


def check_share(name: str, value: float) -> None:
    """Raise ConfigError unless `value` lies in [0, 1)."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ConfigError(f"{name} wants a number in [0, 1), the share of blocks to drop; got {value!r}")


def check_block(block: int) -> None:
    """Raise ConfigError unless `block` is a positive whole number of tokens, and none beyond all use."""
    if not isinstance(block, int) or isinstance(block, bool) or not 1 <= block <= MOST_BLOCK:
        raise ConfigError(f"block wants a number of tokens from 1 to {MOST_BLOCK}, such as 64 or 128; got {block!r}")


def check_count(name: str, value: int) -> None:
    """Raise ConfigError unless `value` is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} wants a whole number of at least 1; got {value!r}")


def check_number(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is a finite number of at least 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} wants a number of at least 0; got {value!r}")


def keep_count(sparsity: float | Fraction, blocks: int) -> int:
    """Key blocks that a query row keeps at `sparsity`: rounded to the nearest, at least one."""
    return max(1, nearest((1 - exact(sparsity)) * blocks))


def row_density(sparsity: float, block: int, layout: Layout | None) -> float:
    """Share of blocks computed if each row keeps `keep_count` of them, those with text first, and rows of text all."""
    if layout is None:
        return 1 - sparsity
    blocks, text = layout.blocks(block), _text(layout, block)
    return (text * blocks + (blocks - text) * max(keep_count(sparsity, blocks), text)) / blocks**2


def with_text(density: float, block: int, layout: Layout | None) -> float:
    """Share of blocks computed where a share `density` is chosen without regard to text, whose blocks are kept too."""
    if layout is None:
        return density
    return 1 - (1 - density) * (1 - _text(layout, block) / layout.blocks(block)) ** 2


def _text(layout: Layout, block: int) -> int:
    return int(layout.text_blocks(block).sum())
