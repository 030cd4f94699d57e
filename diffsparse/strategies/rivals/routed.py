"""What rivals share that choose their blocks anew in each call, while summaries stand for all others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffsparse.orders.layout import Layout
from diffsparse.orders.named import RASTER, check_order
from diffsparse.site.compute import Site
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.blocks import check_share, check_square, row_density
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import BlockLists, Summaries, block_means, default_block


@dataclass(frozen=True)
class Routed(Strategy):
    """No step, no search and nothing kept between steps; works in runs of any length, dense steps or none.

    Attributes:
        sparsity: share of attention dropped, in [0, 1): blocks, the summaries of the others and what chooses them
            count.
        block: edge of a block in tokens; by default 128 on a machine with a GPU, else 64.
        order: of the tokens (`diffsparse.orders`).
    """

    sparsity: float = 0.8
    block: int = field(default_factory=default_block)
    order: str = RASTER
    is_compensated = True

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_square(self.block)
        check_order(self.order, auto=True)

    @abstractmethod
    def routing(self, tokens: int | None) -> float:
        """What choosing the blocks costs, in dense passes over `tokens` tokens."""

    def share(self, routing: float, summary: float = 0.0) -> float:
        """Of the blocks, so that with the routing and the summaries of all others 1 - sparsity is computed.

        Args:
            summary: what the summaries cost beyond one key each.
        """
        if not self.sparsity or self.block == 1:
            return 1.0
        mean = 1 / self.block
        return max((1 - self.sparsity - routing - summary - mean) / (1 - mean), 0.0)

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes."""
        routing, summary = self.routing(None if run.layout is None else run.layout.tokens), self.beyond_means(run)
        share = self.computed(self.share(routing, summary), run.layout)
        density = share + (1 - share) / self.block + summary
        return run.each(lambda step: Step("sparse", density, routing, 1.0))

    def beyond_means(self, run: Outline) -> float:
        """What the summaries of a run cost beyond one key each, in dense passes."""
        return 0.0

    def computed(self, share: float, layout: Layout | None) -> float:
        """Share of the blocks computed where `share` is wanted; by default as many in each row, text first."""
        return row_density(1 - share, self.block, layout)

    def lists(self, mask: Tensor, site: Site) -> BlockLists:
        """The lists of the True blocks, bool [B, H, nQ, nK]."""
        n = site.layout.tokens
        return BlockLists.from_mask(mask, q_block=self.block, kv_block=self.block, q_len=n, kv_len=n)


def mean_scores(q: Tensor, means: Summaries, block: int, site: Site) -> Tensor:
    """Scores of the mean queries against the mean keys, float32 or better [B, H, nQ, nK]; -inf where no key is real."""
    queries = block_means(q.to(means.key.dtype), block, site.key_mask)
    scores = queries @ means.key.mT * site.scale_of(q)
    return scores.masked_fill(means.log_count[:, :, None].isneginf(), -torch.inf)
