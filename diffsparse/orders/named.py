"""Token orders by name: pairs of inverse permutations of the tokens on the grid. Text never moves."""

from __future__ import annotations

import itertools
import re
from functools import lru_cache

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.hilbert import place_on_curve
from diffsparse.orders.layout import Layout, kept

RASTER = "FHW"
AUTO = "auto"
AXES = tuple("".join(axes) for axes in itertools.permutations(RASTER))
_TILE = re.compile(r"tile(\d{1,6})x(\d{1,6})x(\d{1,6})", re.ASCII)


def check_order(order: str, *, auto: bool = False) -> None:
    """Raise ConfigError unless `order` names one.

    Names: the six orders of the axes, slowest first ("FHW" is raster order; PAROAttention, arXiv 2506.16054, section
    4.1); "tile4x8x8", boxes of frames x rows x columns one after the other; "hilbert", a space-filling curve.

    Args:
        auto: let "auto" pass too: each head's own, found in the first call of a run (`orders.choice`).
    """
    tile = _TILE.fullmatch(order) if isinstance(order, str) else None
    if order in AXES or order == "hilbert" or (tile and all(int(edge) for edge in tile.groups())):
        return
    if auto and order == AUTO:
        return
    names = f"{', '.join(AXES)}, tileFxHxW such as tile4x8x8, {'hilbert, or auto' if auto else 'or hilbert'}"
    raise ConfigError(f"order wants one of {names}; got {order!r}")


@lru_cache(maxsize=64)
@kept
def permutation(order: str, layout: Layout) -> tuple[Tensor, Tensor]:
    """The order as a pair of inverses, int64 [N] each, on the CPU.

    Returns:
        `forward`, the raster places of the tokens in their new order, and `back`, which undoes it:
        `x[forward][back]` is x.

    Raises:
        ConfigError: no such order.
    """
    check_order(order)
    axes = (torch.arange(n) for n in (layout.frames, layout.height, layout.width))
    cells = torch.cartesian_prod(*axes).view(-1, 3)  # [video, 3], raster order
    video = _rank(_key(order, cells))
    tokens = torch.arange(layout.tokens)
    inside = slice(layout.text_before, layout.text_before + layout.video)
    tokens[inside] = video + layout.text_before
    return tokens, tokens.argsort()


@lru_cache(maxsize=8)
@kept
def permutation_on(order: str, layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """`permutation`, kept on a device."""
    forward, back = permutation(order, layout)
    return forward.to(device), back.to(device)


def _rank(keys: list[Tensor]) -> Tensor:
    """Stable sort by several keys, the first being the slowest: places in the new order."""
    found = torch.arange(len(keys[0]))
    for key in reversed(keys):
        found = found[key[found].argsort(stable=True)]
    return found


def _key(order: str, cells: Tensor) -> list[Tensor]:
    if order == "hilbert":
        return [place_on_curve(cells)]
    tile = _TILE.fullmatch(order)
    if tile:
        edges = torch.tensor([int(edge) for edge in tile.groups()])
        outer, inner = cells // edges, cells % edges
        return [*outer.unbind(1), *inner.unbind(1)]
    return [cells[:, RASTER.index(axis)] for axis in order]
