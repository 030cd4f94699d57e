"""Windows over the token grid, and the tiles that they touch: NATTEN's rule in plain Python (arXiv 2504.16922)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

from diffsparse.schedule import exact

Cells = tuple[int, int, int]  # along frames, rows and columns
Flags = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Axis:
    """One axis of the grid, and which of its cells a query at each of them sees.

    Cells that are `dilation` apart see each other, others never do. Here they stand together: *places* count the cells
    of residue 0, then those of residue 1, and so on. A window is then an unbroken range of places whatever the
    dilation; without one, places are coordinates.

    Attributes:
        length: cells.
        window: cells that a query sees, all if it is 0 or more than there are.
        stride: neighbouring queries that share one window, no more than it holds; 1 slides it, as many as it holds
            makes it jump.
        dilation: distance between the cells that see each other.
        causal: none of the cells behind the query's own.
    """

    length: int
    window: int = 0
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """The cell at each place."""
        return tuple(cell for residue in range(self.dilation) for cell in range(residue, self.length, self.dilation))

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First and last place that the query at each place sees."""
        found: list[tuple[int, int]] = []
        for residue in range(min(self.dilation, self.length)):
            start, cells = len(found), len(range(residue, self.length, self.dilation))
            found += [(start + first, start + last) for first, last in (self._span(i, cells) for i in range(cells))]
        return tuple(found)

    def _span(self, query: int, cells: int) -> tuple[int, int]:
        """NATTEN's rule among `cells` neighbours (section 3 of the paper, and the masks of NATTEN's Flex backend)."""
        window = min(self.window or cells, cells)
        stride = min(self.stride, window)
        group = query // stride * stride
        if self.causal:
            leader = min(group + stride - 1, cells - 1)
            return max(leader - window + 1, 0), query
        left, right = window // 2, window // 2 + window % 2 - 1
        leader = min(group + stride // 2, cells - 1)
        centre = min(max(leader, left), cells - 1 - right)
        return centre - left, centre + right

    def tiles(self, edge: int) -> Iterator[tuple[tuple[int, int], ...]]:
        """The spans, `edge` places at a time; the last tile may be ragged."""
        return (self.spans[start : start + edge] for start in range(0, self.length, edge))

    def touched(self, edge: int, key_edge: int) -> list[list[range]]:
        """For each tile of `edge` queries, the tiles of `key_edge` keys of which it sees a cell: disjoint ranges."""
        return [_union((first // key_edge, last // key_edge) for first, last in tile) for tile in self.tiles(edge)]

    def cuts(self, edge: int) -> bool:
        """Whether some query sees a part only of a tile that its own tile touches."""
        for tile, touched in zip(self.tiles(edge), self.touched(edge, edge), strict=True):
            first, last = max(span[0] for span in tile), min(span[1] for span in tile)
            for keys in touched:
                if keys.start * edge < first or min(keys.stop * edge, self.length) - 1 > last:
                    return True
        return False


def _union(spans: Iterable[tuple[int, int]]) -> list[range]:
    """Ascending spans, ends included, as ranges with gaps between them."""
    found: list[range] = []
    for first, last in spans:
        if found and first <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, last + 1))
        else:
            found.append(range(first, last + 1))
    return found


@dataclass(frozen=True)
class Tiling:
    """Three axes cut into tiles of `tile` places, one block of tokens each."""

    axes: tuple[Axis, Axis, Axis]
    tile: Cells

    @classmethod
    def of(cls, grid: Cells, window: Cells, stride: Cells, dilation: Cells, causal: Flags, tile: Cells) -> Tiling:
        """The axes from their lengths, windows and so on."""
        frames, rows, columns = map(Axis, grid, window, stride, dilation, causal)
        return cls((frames, rows, columns), tile)

    @property
    def counts(self) -> Cells:
        """Tiles along each axis; the last may be ragged."""
        frames, rows, columns = (-(-axis.length // edge) for axis, edge in zip(self.axes, self.tile, strict=True))
        return frames, rows, columns

    @property
    def cost(self) -> int:
        """Pairs of tokens that are computed: those of the tiles that see something of each other, whole tiles each."""
        return math.prod(_pairs(axis, edge) * edge**2 for axis, edge in zip(self.axes, self.tile, strict=True))

    @property
    def cuts(self) -> bool:
        """Whether a window cuts through a tile, so that touched tiles have to be masked inside."""
        return any(_cuts(axis, edge) for axis, edge in zip(self.axes, self.tile, strict=True))

    @property
    def window(self) -> Cells:
        """The windows, each no more than its axis has."""
        frames, rows, columns = (max(last - first + 1 for first, last in axis.spans) for axis in self.axes)
        return frames, rows, columns


@lru_cache(maxsize=65536)
def _pairs(axis: Axis, edge: int) -> int:
    return sum(len(keys) for touched in axis.touched(edge, edge) for keys in touched)


@lru_cache(maxsize=65536)
def _cuts(axis: Axis, edge: int) -> bool:
    return axis.cuts(edge)


def fit(
    grid: Cells, window: Cells, stride: Cells | None, dilation: Cells, causal: Flags, tiles: Iterable[Cells]
) -> Tiling:
    """Out of `tiles` those of which the windows touch least; of equals those that they don't cut.

    Args:
        grid: tokens along frames, rows and columns.
        window: that a query sees, along each axis.
        stride: if None the tile's own edges, so that all queries of a tile share one window.
        dilation: distance between the cells that see each other.
        causal: along which axes a query sees no cell behind its own.
        tiles: candidates.
    """
    tilings = (Tiling.of(grid, window, stride or tile, dilation, causal, tile) for tile in tiles)
    return min(tilings, key=lambda tiling: (tiling.cost, tiling.cuts, max(tiling.tile)))


def fit_sparsity(
    grid: Cells, sparsity: float, stride: Cells | None, dilation: Cells, causal: Flags, tiles: Iterable[Cells]
) -> Tiling:
    """The windows that make the most of computing 1 - sparsity of what dense attention over the grid computes.

    Windows are tried along each axis that are an odd number of tiles, so that they fit around one, or the whole axis.
    Of those within the budget (and a twentieth) the ones win whose smallest share of an axis is largest, then those
    that see most, then those that compute least. If none is, the cheapest.
    """
    budget = Fraction(21, 20) * (1 - exact(sparsity)) * math.prod(grid) ** 2
    best, rank = None, (-math.inf, 0.0, 0, 0)
    for tile in tiles:
        for window in _whole_tiles(grid, dilation, tile):
            tiling = Tiling.of(grid, window, stride or tile, dilation, causal, tile)
            shares = [size * step / length for size, step, length in zip(window, dilation, grid, strict=True)]
            fits = min(shares) if tiling.cost <= budget else -tiling.cost
            found = fits, math.prod(shares), -tiling.cost, -max(tile)
            if found > rank:
                best, rank = tiling, found
    assert best is not None
    return best


def _whole_tiles(grid: Cells, dilation: Cells, tile: Cells) -> Iterator[Cells]:
    reach = [-(-length // step) for length, step in zip(grid, dilation, strict=True)]  # cells of one residue
    sizes = [[*range(edge, cells, 2 * edge), cells] for edge, cells in zip(tile, reach, strict=True)]
    return itertools.product(*sizes)


def tiles_of(block: int) -> tuple[Cells, ...]:
    """All edges of tiles that hold `block` tokens."""
    edges = [edge for edge in range(1, block + 1) if block % edge == 0]
    return tuple((f, h, block // (f * h)) for f in edges for h in edges if block % (f * h) == 0)
