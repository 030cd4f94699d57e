"""What stand-ins for dropped blocks cost, by their multiplications, in passes of dense attention."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from diffsparse_kernels import Block, Summary, edges

Share = TypeVar("Share", float, Tensor)

MASS_PASS = 0.5  # a second pass over the keys that sums the mass of blocks: one product of attention's two


def summary_work(
    by: Summary | None, dropped: Share, block: Block, tokens: int, head_dim: int, mixed: bool = True
) -> Share:
    """What the summaries of a share of dropped blocks add to a product over `tokens` tokens.

    A mean counts as the one key that it is. First order adds, whatever is dropped, two products as long as the
    tokens (statistics of keys and values, and the slope applied to the queries), each D / 2N, and one over pairs of
    blocks, which mixes the slopes: D / (2 q_block kv_block), unless all blocks have one. That is what the method needs;
    that a device makes statistics again rather than keep slopes is not counted.
    """
    if by is None:
        return 0 * dropped
    q_block, kv_block = edges(block)
    slopes = head_dim * (1 / tokens + mixed / (2 * q_block * kv_block)) if by == "first-order" else 0.0
    return dropped / kv_block + slopes
