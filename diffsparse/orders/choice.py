"""Order "auto": for each head the order that puts the most similar tokens into a block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsparse.orders.layout import Layout
from diffsparse.orders.named import AXES, permutation
from diffsparse_kernels import spread

_SAMPLE = 32  # blocks that are compared to choose the order of a head


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
