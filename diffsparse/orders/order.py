"""Token orders: which token stands where, so that tokens that attend to each other share blocks. Text never moves."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.layout import Layout, kept
from diffsparse_kernels import spread

RASTER = "FHW"
AUTO = "auto"
AXES = tuple("".join(axes) for axes in itertools.permutations(RASTER))
_SAMPLE = 32  # blocks that tell which order suits a head
_TILE = re.compile(r"tile(\d{1,6})x(\d{1,6})x(\d{1,6})", re.ASCII)


def check_order(order: str, *, auto: bool = False) -> None:
    """Raise ConfigError unless `order` names one.

    Names: the six orders of the axes, slowest first ("FHW" is raster order; PAROAttention, arXiv 2506.16054, section
    4.1); "tile4x8x8", boxes of frames x rows x columns one after the other; "hilbert", a space-filling curve.

    auto: let "auto" pass too: each head in the one of `candidates` that `most_alike` finds when a run first asks.
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


def in_order(strategy: Any, method: Callable[..., Tensor], qkv: tuple[Tensor, ...], site: Any) -> Tensor:
    """Call `method(q, k, v, site)` with the tokens in the strategy's order, and put its output back in raster order."""
    order = getattr(strategy, "order", RASTER)
    if order == RASTER:
        return method(*qkv, site)
    if order == AUTO:
        orders = _own_orders(qkv, site, strategy.block)
    else:
        orders = HeadOrders(*(x[None] for x in permutation_on(order, site.layout, qkv[0].device)))
    return orders.undo(method(*(orders.apply(x) for x in qkv), _moved(site, orders)))


def _moved(site: Any, orders: HeadOrders) -> Any:
    """The same place with its key mask over moved tokens. Its dense attention, which has masks of its own, is not."""
    if site.key_mask is None:
        return site
    keys = orders.keys(site.key_mask)
    return replace(site, key_mask=keys, _dense=lambda *qkv: orders.apply(site._dense(*map(orders.undo, qkv))))


def _own_orders(qkv: tuple[Tensor, ...], site: Any, block: int) -> HeadOrders:
    """The order of each head of each sample that was found when the run first asked."""
    names = candidates(site.layout, block)
    if "orders" not in site.memory:
        site.memory["orders"] = most_alike(qkv, names, site.layout, block, site.key_mask)
    return HeadOrders.of(names, site.memory["orders"], site.layout, qkv[0].device, move_text=False)


def found_orders(site: Any, block: int) -> tuple[str, ...]:
    """By name, what "auto" found for each head of a site that was called; of its first sample where samples differ."""
    names = candidates(site.layout, block)
    return tuple(names[int(i)] for i in site.memory["orders"][0])


def candidates(layout: Layout, block: int) -> tuple[str, ...]:
    """What "auto" picks from: boxes of up to `block` tokens, as near to cubes as the grid allows, and the axes."""
    edges, extents = [1, 1, 1], (layout.frames, layout.height, layout.width)
    while 2 * math.prod(edges) <= block:
        growing = [axis for axis in (2, 1, 0) if edges[axis] < extents[axis]]
        if not growing:
            break
        edges[min(growing, key=edges.__getitem__)] *= 2
    return ("tile{}x{}x{}".format(*edges), *AXES)


def most_alike(
    qkv: tuple[Tensor, ...], names: tuple[str, ...], layout: Layout, block: int, key_mask: Tensor | None = None
) -> Tensor:
    """For each head of each sample the order that puts the most similar tokens into a block.

    That is where the product of three mean square distances is least: of the queries, the keys and the values of a
    block to their mean. Looks at a few blocks of the video, evenly spread.

    Args:
        qkv: three of [B, H, N, D] in raster order.
        key_mask: bool [B, N], the tokens that count.

    Returns:
        int64 [B, H], places in `names`.
    """
    block, device = min(block, layout.video), qkv[0].device
    whole = layout.video // block
    first = torch.linspace(0, whole - 1, min(whole, _SAMPLE)).long() * block + layout.text_before
    places = (first[:, None] + torch.arange(block)).flatten()
    products = []
    for name in names:
        tokens = permutation(name, layout)[0][places].to(device, non_blocking=True)
        seen = None if key_mask is None else key_mask.index_select(1, tokens)
        distances = [spread(x.index_select(2, tokens), block, seen).square().mean(2) for x in qkv]  # [B, H] each
        products.append(torch.stack(distances).prod(0))
    return torch.stack(products).argmin(0)


class HeadOrders(NamedTuple):
    """An order for each head, or for each head of each sample, and its inverse.

    forward: int64 [H, M] or [B, H, M], which token stands at each place; back: [H, N] or [B, H, N], where each token
    stands. H is 1 where all heads have the same.
    All text comes last, whatever its place, unless told otherwise: the blocks of the video are then the same for
    prompts of any length.
    M is N, or more where tiles are not full: `filled`, bool [M], then tells tokens from the copies that fill the gaps.
    """

    forward: Tensor
    back: Tensor
    filled: Tensor | None = None

    @classmethod
    def of(
        cls, names: tuple[str, ...], picked: Tensor, layout: Layout, device: torch.device, *, move_text: bool = True
    ) -> HeadOrders:
        """Head h gets the order `names[picked[h]]`; picked is int [H] or [B, H]."""
        forward, back = _tables(names, layout, device, move_text)
        picked = picked.to(device, torch.int64, non_blocking=True)
        return cls(forward[picked], back[picked])

    def apply(self, x: Tensor) -> Tensor:
        """x [B, H, N, D] -> [B, H, M, D], each head's tokens in its order; contiguous. One copy."""
        batch, heads, tokens, dim = x.shape
        sample, head = _numbers(batch, heads, x.device)
        if x.transpose(1, 2).is_contiguous():
            flat, rows = x.transpose(1, 2).reshape(-1, dim), (sample * tokens + self.forward) * heads + head
        else:
            flat, rows = x.reshape(-1, dim), (sample * heads + head) * tokens + self.forward
        return flat.index_select(0, rows.flatten()).view(batch, heads, -1, dim)

    def undo(self, x: Tensor) -> Tensor:
        """[B, H, M, D] in raster order again: [B, H, N, D], stored as [B, N, H, D], as processors want it next."""
        batch, heads, tokens, dim = x.shape
        sample, head = _numbers(batch, heads, x.device)
        rows = ((sample * heads + head) * tokens + self.back).transpose(1, 2)  # [B, N, H]
        return x.reshape(-1, dim).index_select(0, rows.flatten()).view(batch, -1, heads, dim).transpose(1, 2)

    def keys(self, mask: Tensor | None) -> Tensor | None:
        """A key mask, bool [B|1, N], as one over the moved tokens: [B|1, M], or [B, H, M] where heads differ."""
        if mask is None:
            return None if self.filled is None else self.filled[None]
        if len(self.forward) == 1 and self.forward.ndim == 2:
            moved = mask.index_select(1, self.forward[0])
        else:
            forward = self.forward.expand(len(mask), *self.forward.shape[-2:])
            moved = mask[:, None].expand(-1, forward.shape[1], -1).gather(2, forward)
        return moved if self.filled is None else moved & self.filled


def _numbers(batch: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the samples, [B, 1, 1], and of the heads, [H, 1]."""
    return torch.arange(batch, device=device)[:, None, None], torch.arange(heads, device=device)[:, None]


@lru_cache(maxsize=4)
@kept
def _tables(names: tuple[str, ...], layout: Layout, device: torch.device, move_text: bool) -> tuple[Tensor, Tensor]:
    """All orders and their inverses, int64 [orders, N] each, on the device."""
    forward = torch.stack([permutation(name, layout)[0] for name in names])
    forward = (text_last(forward, layout) if move_text else forward).to(device)
    return forward, forward.argsort()


def text_last(x: Tensor, layout: Layout) -> Tensor:
    """x [..., N] with the tokens before the video moved behind it."""
    before, rest = x.split([layout.text_before, layout.tokens - layout.text_before], -1)
    return torch.cat([rest[..., : layout.video], before, rest[..., layout.video :]], -1)


def _rank(keys: list[Tensor]) -> Tensor:
    """Stable sort by several keys, the first being the slowest: places in the new order."""
    found = torch.arange(len(keys[0]))
    for key in reversed(keys):
        found = found[key[found].argsort(stable=True)]
    return found


def _key(order: str, cells: Tensor) -> list[Tensor]:
    if order == "hilbert":
        return [_hilbert(cells)]
    tile = _TILE.fullmatch(order)
    if tile:
        edges = torch.tensor([int(edge) for edge in tile.groups()])
        outer, inner = cells // edges, cells % edges
        return [*outer.unbind(1), *inner.unbind(1)]
    return [cells[:, RASTER.index(axis)] for axis in order]


def _hilbert(cells: Tensor) -> Tensor:
    """Position of each cell [M, 3] on the Hilbert curve through the smallest cube of a power of two, int64 [M].

    Skilling, "Programming the Hilbert curve" (2004). Cells of a box that is no such cube keep the curve's order, with
    jumps where it leaves the box.
    """
    bits = max(int(cells.max()).bit_length(), 1)
    x = list(cells.unbind(1))
    for bit in range(bits - 1, 0, -1):
        high, below = 1 << bit, (1 << bit) - 1
        for i in range(3):
            set_ = (x[i] & high) > 0
            swap = (x[0] ^ x[i]) & below
            x[0] = torch.where(set_, x[0] ^ below, x[0] ^ swap)
            if i:
                x[i] = torch.where(set_, x[i], x[i] ^ swap)
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    carry = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        carry = torch.where((x[2] & (1 << bit)) > 0, carry ^ ((1 << bit) - 1), carry)
    x = [axis ^ carry for axis in x]
    place = torch.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for axis in x:
            place = (place << 1) | ((axis >> bit) & 1)
    return place
