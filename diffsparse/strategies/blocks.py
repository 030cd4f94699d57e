"""What block strategies share: their knobs' limits, and how a sparsity becomes a number of blocks."""

from __future__ import annotations

import sys
from fractions import Fraction
from functools import lru_cache

from diffsparse.errors import ConfigError
from diffsparse.orders.layout import Layout
from diffsparse.schedule import exact, nearest
from diffsparse_kernels import Block, edges

MOST_BLOCK = 4096  # tokens: a larger one is attention over all of them, at the price of padding


def check_share(name: str, value: float) -> None:
    """Raise ConfigError unless `value` lies in [0, 1)."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ConfigError(f"{name} wants a number in [0, 1), the share of blocks to drop; got {value!r}")


def check_block(block: Block) -> None:
    """Raise ConfigError unless `block` is a positive whole number of tokens, and none beyond all use, or two of them.

    Of two, those of queries and of keys, one divides the other: each larger block is then a run of whole smaller ones,
    so that no border of one kind cuts what an order of the tokens, or the end of the text, has put into the other.
    """
    pair = edges(block)
    if len(pair) != 2 or not all(type(edge) is int and 1 <= edge <= MOST_BLOCK for edge in pair):
        raise ConfigError(
            f"block wants a number of tokens from 1 to {MOST_BLOCK}, such as 64 or 128, or two of them, of queries and "
            f"of keys, such as (128, 64); got {block!r}"
        )
    if max(pair) % min(pair):
        raise ConfigError(
            f"block wants queries and keys of which one divides the other, such as (128, 64), so that each larger "
            f"block is a run of whole smaller ones; got {block!r}"
        )


def check_square(block: Block) -> None:
    """Raise ConfigError unless `block` is one number: some methods have the same blocks for queries and for keys."""
    check_block(block)
    if isinstance(block, tuple):
        raise ConfigError(
            f"block wants one number of tokens here, such as {min(block)}: windows and plans are of square "
            f"blocks; got {block!r}"
        )


def check_count(name: str, value: int) -> None:
    """Raise ConfigError unless `value` is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} wants a whole number of at least 1; got {value!r}")


def check_number(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is a finite number of at least 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
        raise ConfigError(f"{name} wants a finite number of at least 0; got {value!r}")


def keep_count(sparsity: float | Fraction, blocks: int) -> int:
    """Key blocks that a query row keeps at `sparsity`: rounded to the nearest, at least one."""
    return max(1, nearest((1 - exact(sparsity)) * blocks))


def row_density(sparsity: float, block: Block, layout: Layout | None) -> float:
    """Share of blocks computed if each row keeps `keep_count` of those that may be dropped, and exact rows all."""
    if layout is None:
        return 1 - sparsity
    rows, (columns, sinks) = _rows(layout, block), _columns(layout, block)
    return rows + (1 - rows) * min(sinks + keep_count(sparsity, columns - sinks), columns) / columns


def with_text(density: float, block: Block, layout: Layout | None) -> float:
    """Share of blocks computed if it is `density` of those that may be dropped; exact rows and keys are beside it."""
    if layout is None:
        return density
    rows, (columns, sinks) = _rows(layout, block), _columns(layout, block)
    return 1 - (1 - density) * (1 - rows) * (1 - sinks / columns)


def rows_of_text(block: Block, layout: Layout) -> float:
    """Share of the query blocks that are computed whole."""
    return _rows(layout, block)


@lru_cache(maxsize=64)
def _rows(layout: Layout, block: Block) -> float:
    """Share of the query blocks asked for that are computed whole."""
    q_block = edges(block)[0]
    return int(layout.exact_rows(q_block).sum()) / int(layout.asked_blocks(q_block).sum())


@lru_cache(maxsize=64)
def _columns(layout: Layout, block: Block) -> tuple[int, int]:
    """Key blocks, and those of them that are never dropped."""
    kv_block = edges(block)[1]
    return layout.blocks(kv_block), int(layout.exact_keys(kv_block).sum())
