"""GNA: windows that slide or jump over the grid, Generalized Neighborhood Attention (arXiv 2504.16922)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.layout import Layout, kept
from diffsparse.orders.per_head import HeadOrders
from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.blocks import check_share, check_square
from diffsparse.strategies.gna.windows import Cells, Flags, Tiling, fit, fit_sparsity, tiles_of
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import BlockLists, Boxes, default_block

_EVERYWHERE = 2**31 - 1  # the upper end of a box that hides nothing


@dataclass(frozen=True)
class GNA(Strategy):
    """Generalized Neighborhood Attention (arXiv 2504.16922): each query sees a window of the grid around it.

    Tokens are moved into tiles of frames x rows x columns, one block each, so that a window is few blocks; blocks that
    windows cut through are masked token by token, and where they cut none, nothing is. Which tokens see each other is
    NATTEN's rule: near a border the window moves inwards instead of shrinking, and one of even size reaches one cell
    further towards the start. Text sees everything and is seen by everything. Nothing is searched. Reference images
    count as further frames of the image that is made, whatever their size.

    Tiles that the grid does not fill are computed whole; the density of the report counts that.

    Attributes:
        window: frames, rows and columns that a query sees; 0 is the whole axis, and so is more than it has. None:
            windows with the grid's proportions whose share of computed blocks comes nearest to 1 - sparsity.
        stride: neighbouring queries, along each axis, that share a window (1 slides, the window's size is blocked
            attention). None: the edges of a tile, which wastes least.
        dilation: distance between the cells that see each other, along each axis.
        causal: along which axes a query sees no cell behind its own.
        sparsity: share of the grid's blocks to drop, in [0, 1), where no window is given; None where one is.
        block: tokens of a tile; by default 128 on a machine with a GPU, else 64. Its edges are those of least work for
            these windows and this grid (`windows.fit`).

    Raises:
        ConfigError: a value out of its range, or a stride longer than its window.
    """

    window: Cells | None = None
    stride: Cells | None = None
    dilation: Cells = (1, 1, 1)
    causal: Flags = (False, False, False)
    sparsity: float | None = 0.8
    block: int = field(default_factory=default_block)
    needs_grid = True

    def __post_init__(self) -> None:
        check_square(self.block)
        for name, least in (("window", 0), ("stride", 1), ("dilation", 1)):
            _check_cells(name, getattr(self, name), least)
        if not isinstance(self.causal, tuple) or [type(flag) for flag in self.causal] != [bool] * 3:
            raise ConfigError(f"causal wants True or False for frames, rows and columns; got {self.causal!r}")
        if self.window is None:
            check_share("sparsity", self.sparsity)  # type: ignore[arg-type]
            return
        object.__setattr__(self, "sparsity", None)
        if self.stride and any(0 < size < step for size, step in zip(self.window, self.stride, strict=True)):
            raise ConfigError(
                f"stride wants at most the window's {self.window}, or queries would not see themselves; "
                f"got {self.stride}"
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Attention of q, k, v [B, H, N, D] within the windows."""
        if "tiled" not in site.memory:
            site.memory["tiled"] = _tiled(self, site.layout, q.shape[1], q.device)
        tiled: Tiled = site.memory["tiled"]
        if tiled.share >= 1:
            return site.dense(q, k, v, reason="windows that touch every block")
        return site.sparse(q, k, v, Blocks(tiled.lists, tiled.orders, tiled.boxes))

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes: by the tiles that the windows touch, so it wants the layout."""
        if run.layout is None:
            return run.constant(None)
        return run.constant(_tiled(self, run.layout, 1, torch.device("cpu")).share)

    def tiling(self, grid: Cells, tile: Cells | None = None) -> Tiling:
        """Windows and tiles on a grid.

        Args:
            grid: tokens along frames, rows and columns.
            tile: edges of a tile, instead of the best fit.
        """
        return _tiling(self, grid, tile)


@dataclass(frozen=True, eq=False)
class Tiled:
    """The tokens tile by tile, text last, and who sees whom; without boxes, all tokens of listed blocks do.

    Attributes:
        share: of what dense attention over the unmoved tokens computes.
    """

    lists: BlockLists
    orders: HeadOrders
    boxes: Boxes | None
    share: float


@lru_cache(maxsize=64)
def _tiling(gna: GNA, grid: Cells, tile: Cells | None) -> Tiling:
    tiles = (tile,) if tile else tiles_of(gna.block)
    if gna.window is None:
        return fit_sparsity(grid, gna.sparsity or 0.0, gna.stride, gna.dilation, gna.causal, tiles)
    return fit(grid, gna.window, gna.stride, gna.dilation, gna.causal, tiles)


# All layers, branches and steps of a run share one; it goes when the last of them forgets it.
_TILED: WeakValueDictionary[tuple[GNA, Layout, int, torch.device], Tiled] = WeakValueDictionary()


def _tiled(gna: GNA, layout: Layout, heads: int, device: torch.device) -> Tiled:
    key = gna, layout, heads, device
    found = _TILED.get(key)
    if found is None:
        found = _TILED[key] = _arrange(*key)
    return found


@kept
def _arrange(gna: GNA, layout: Layout, heads: int, device: torch.device) -> Tiled:
    """Made on the CPU, where the longest list is known without waiting."""
    cells = layout.cells()
    tiling = gna.tiling((layout.frames, layout.height, layout.width))
    if layout.references:  # in tiles of the image alone, or holes would lie in tiles of both
        frames, height, width = cells.shape
        tiling = gna.tiling((frames, height, width), tiling.tile)
    forward, back, filled = _orders(tiling, cells, layout.tokens)
    tokens = len(forward)
    text = -(-tokens // gna.block) - math.prod(tiling.counts)
    mask = F.pad(_block_mask(tiling), (0, text, 0, text), value=True)[None, None]
    if layout.references and filled is not None:  # tiles without a token, where images differ in size
        some = F.pad(filled, (0, -tokens % gna.block)).view(-1, gna.block).any(-1)
        mask = mask & some[:, None] & some
    one = BlockLists.from_mask(mask, q_block=gna.block, kv_block=gna.block, q_len=tokens, kv_len=tokens)
    idx, cnt = (x.to(device).expand(1, heads, *x.shape[2:]).contiguous() for x in (one.idx, one.cnt))
    return Tiled(
        replace(one, idx=idx, cnt=cnt),
        HeadOrders.shared(forward.to(device), back.to(device), None if filled is None else filled.to(device)),
        Boxes(*(x.to(device) for x in _boxes(tiling, tokens))) if tiling.cuts else None,
        float(one.density()) * tokens**2 / layout.tokens**2,
    )


def _orders(tiling: Tiling, cells: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tile after tile, then what is not in `cells`: int64 [M], its inverse [N], and where there is one, bool [M]."""
    frame, row, column = _spread([torch.tensor(axis.cells) for axis in tiling.axes], tiling, gap=-1)
    video = cells[frame, row, column].masked_fill((frame < 0) | (row < 0) | (column < 0), -1)
    text = torch.ones(tokens, dtype=torch.bool)
    text[cells[cells >= 0]] = False
    forward = torch.cat([video, text.nonzero()[:, 0]])
    filled = forward >= 0
    forward = forward.clamp(min=0)
    back = torch.empty(tokens, dtype=torch.int64)
    back[forward[filled]] = filled.nonzero()[:, 0]
    return forward, back, None if filled.all() else filled


def _block_mask(tiling: Tiling) -> Tensor:
    """bool [tiles, tiles]: a tile sees the product of the tiles that it touches along each axis."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis, edge, count in zip(tiling.axes, tiling.tile, tiling.counts, strict=True):
        along = torch.zeros(count, count, dtype=torch.bool)
        for tile, touched in enumerate(axis.touched(edge, edge)):
            for keys in touched:
                along[tile, keys.start : keys.stop] = True
        mask = torch.kron(mask, along)
    return mask


def _boxes(tiling: Tiling, tokens: int) -> Boxes:
    """Places of the keys and the range that each query sees, along three axes; text and gaps see all."""
    spans = [torch.tensor(axis.spans) for axis in tiling.axes]
    place = _spread([torch.arange(axis.length) for axis in tiling.axes], tiling, gap=0)
    low = _spread([span[:, 0] for span in spans], tiling, gap=0)
    high = _spread([span[:, 1] for span in spans], tiling, gap=_EVERYWHERE)
    text = (0, tokens - place.shape[1])
    return Boxes(F.pad(place, text, value=-1).int(), F.pad(low, text).int(), F.pad(high, text, value=_EVERYWHERE).int())


def _spread(along: list[Tensor], tiling: Tiling, gap: int) -> Tensor:
    """Values of the places of each axis, for every cell tile by tile: int64 [3, M], `gap` where a tile is not full."""
    sizes = zip(along, tiling.tile, strict=True)
    whole = torch.meshgrid(*(F.pad(x, (0, -len(x) % edge), value=gap) for x, edge in sizes), indexing="ij")
    (f, h, w), (tf, th, tw) = tiling.counts, tiling.tile
    tiles = torch.stack(whole).view(3, f, tf, h, th, w, tw).permute(0, 1, 3, 5, 2, 4, 6)
    return tiles.flatten(1)


def _check_cells(name: str, cells: Cells | None, least: int) -> None:
    if cells is None and name != "dilation":
        return
    if not isinstance(cells, tuple) or len(cells) != 3 or any(type(n) is not int or n < least for n in cells):
        raise ConfigError(
            f"{name} wants three whole numbers of at least {least}, frames x rows x columns such as (4, 8, 8); "
            f"got {cells!r}"
        )
