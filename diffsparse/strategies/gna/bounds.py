"""What windows can save at most, known before anything runs (arXiv 2504.16922, section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffsparse.strategies.gna.windows import Cells, Tiling


@dataclass(frozen=True)
class Bounds:
    """Bounds of windows in tiles, as a speed-up over dense attention at the same rate of FLOPs.

    Attributes:
        sparsity: share of all pairs of tokens that windows hide.
        flop_bound: 1 / (1 - sparsity).
        density: share of the pairs of tokens that are computed, whole tiles at a time, tiles that the grid does not
            fill included: what a report calls density.
        tile_bound: all key tiles over those of the busiest query tile, the paper's simulator: tiles of unlike work wait
            for the slowest.
    """

    window: Cells
    stride: Cells
    q_tile: Cells
    kv_tile: Cells
    sparsity: float
    density: float
    flop_bound: float
    tile_bound: float


def bounds_of(tiling: Tiling, kv_tile: Cells | None = None) -> Bounds:
    """The bounds of a tiling; `kv_tile` if tiles of keys are unlike those of queries."""
    kv_tile = kv_tile or tiling.tile
    seen = pairs = busiest = tiles = 1
    for axis, edge, key_edge in zip(tiling.axes, tiling.tile, kv_tile, strict=True):
        touched = [sum(map(len, keys)) for keys in axis.touched(edge, key_edge)]
        seen *= sum(last - first + 1 for first, last in axis.spans)
        pairs *= sum(touched)
        busiest *= max(touched)
        tiles *= -(-axis.length // key_edge)
    whole = math.prod(axis.length for axis in tiling.axes) ** 2
    frames, rows, columns = (min(axis.stride, size) for axis, size in zip(tiling.axes, tiling.window, strict=True))
    return Bounds(
        window=tiling.window,
        stride=(frames, rows, columns),
        q_tile=tiling.tile,
        kv_tile=kv_tile,
        sparsity=1 - seen / whole,
        density=pairs * math.prod(tiling.tile) * math.prod(kv_tile) / whole,
        flop_bound=whole / seen,
        tile_bound=tiles / busiest,
    )
