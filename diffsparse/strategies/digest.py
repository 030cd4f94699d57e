"""Digest: blocks where their means fail, and the means of all the others. Ours, beyond the papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsparse.order import check_order
from diffsparse.site import Site
from diffsparse.strategies.online import OnlineSearch
from diffsparse_kernels import select_heads


@dataclass(frozen=True)
class Digest(OnlineSearch):
    """Compute the blocks that a summary would get wrong, and summarise the rest. Nothing is calibrated.

    1. Tokens stand in tiles of the grid, so that a block holds neighbours, which are much alike.
    2. A block of n keys that is not computed counts as n keys at its mean, in the same softmax, with its mean value.
    3. exp is convex: the means never have more mass than the block. What they lack, mass - means' mass, is what a block
       must be computed for, and not its mass: a heavy block of equal weights is summed up exactly.
    4. One threshold for all heads and rows of a layer spends the blocks where they tell most; every row keeps its best.

    Searches are AdaSpa's: in the last dense step, and later on its log-sum-exp (`OnlineSearch` tells of the knobs).

    order: of the tokens (`diffsparse.order`); tiles that fill a block are best. For images try "tile1x8x8".

    Blocks that hold text are always computed. Memory between steps is AdaSpa's.
    """

    order: str = "tile4x4x4"

    means: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order)

    def choose(self, mass: Tensor, q: Tensor, k: Tensor, site: Site) -> Tensor:
        """The blocks of the layer whose means lack the most mass, bool [B, H, nQ, nK]."""
        lacking = (mass - site.means_mass(q, k, site.memory["lse"], self.block)).clamp(min=0)
        mask = select_heads(lacking.flatten(1, 2)[:, None], 1 - self.sparsity).view_as(lacking)
        sink = site.layout.text_sink(self.block, q.device)
        return mask if sink is None else mask | sink
