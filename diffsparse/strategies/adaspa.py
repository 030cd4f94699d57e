"""AdaSpa: adaptive block-sparse attention with online search on cached log-sum-exps (arXiv 2502.21079)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.named import RASTER, check_order
from diffsparse.schedule import exact
from diffsparse.site.compute import Site
from diffsparse.strategies.blocks import keep_count
from diffsparse.strategies.online import OnlineSearch, recall_of
from diffsparse_kernels import BlockLists


@dataclass(frozen=True)
class AdaSpa(OnlineSearch):
    """Adaptive block-sparse attention with online search on cached LSE (arXiv 2502.21079).

    At the last dense step every layer runs dense, and a second pass over its keys sums the softmax weights of each
    block (section 4.2, "fused online search"). Every query row keeps the blocks with the most mass. Later searches
    re-use the LSE of the first and so need one pass without values ("LSE-cached search", Eq. 4); the step that
    searches already runs sparse with what it found.

    The paper leaves open, and here it is decided:

    - Heads are ranked within one layer, sample and search. At most half of them are raised, so that the raised and
      the lowered never overlap.
    - Recall is the share of all mass found, not of L: with a cached LSE rows no longer sum to one. A drift of the LSE
      scales whole rows of weights, so a choice within rows, as here, hardly feels it.
    - Blocks that hold text are always kept and count towards a row's blocks. A ragged last block is an ordinary one.
      Padded text has no mass.
    - Each sample of a batch has its own blocks, and so has each guidance branch.
    - A layer that first runs late (the second expert of Wan 2.2) makes its first search there, densely.
    - Kept between steps, for each layer, branch and sample: 4HN bytes of LSE, and of blocks, nQ rows of nK, H nQ nK / 8
      and 2HnQ for each entry of the longest row; a search needs 4H nQ nK more for a moment.

    Attributes:
        sparsity: share of blocks dropped, in [0, 1).
        searches: later searches; an int is a step counted from 0, a float a fraction of the run. The default is the
            paper's step 30 of 50. Runs of ten steps or fewer skip fractions: their few sparse steps don't repay one.
        block: tokens of a block, or its queries and keys; by default 128 on a machine with a GPU, else the paper's 64.
        head_adaptive: give heads that hold their mass in few blocks a sparsity of (1+s)/2, as many of the others
            (3s-1)/2, and leave the rest at s (section 4.3). The mean is s: where others can't be lowered as far (s
            below 1/3), or those would keep less than a block, both move by less.
        recall_threshold: retained mass above which a head counts as one that can drop more.
        order: of the tokens (`diffsparse.orders`); raster order is the paper's, "auto" finds each head's own.

    Raises:
        ConfigError: a value out of its range.
    """

    head_adaptive: bool = True
    recall_threshold: float = 0.8
    order: str = RASTER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order, auto=True)
        if not isinstance(self.recall_threshold, int | float) or not 0 <= self.recall_threshold <= 1:
            raise ConfigError(f"recall_threshold wants a number in [0, 1]; got {self.recall_threshold!r}")

    def choose(self, mass: Tensor, q: Tensor, k: Tensor, v: Tensor, site: Site) -> BlockLists:
        """The blocks of each row with the most mass."""
        blocks = site.free_blocks(self.block)
        lists = site.best_of_rows(mass, keep_count(self.sparsity, blocks), self.block)
        if not self.head_adaptive:
            return lists
        recall = site.shard.all_heads(recall_of(mass, lists))
        return site.best_of_rows(mass, site.shard.own(self._keep_by_head(recall, blocks), 1), self.block)

    def _keep_by_head(self, recall: Tensor, blocks: int) -> Tensor:
        """Blocks a row for each head, int64 [B, H], from the recall [B, H] at uniform sparsity (section 4.3)."""
        s, heads = exact(self.sparsity), recall.shape[-1]
        by = max(min((1 - s) / 2, s, 1 - s - Fraction(1, blocks)), Fraction(0))  # up as far as down
        rank = recall.argsort(stable=True, dim=-1, descending=True).argsort(-1)  # 0 = highest recall
        raised = (recall > self.recall_threshold).sum(-1, keepdim=True).clamp(max=heads // 2)  # n, [B, 1]
        keep = torch.full_like(rank, keep_count(s, blocks))
        keep = keep.masked_fill(rank < raised, keep_count(s + by, blocks))
        return keep.masked_fill(rank >= heads - raised, keep_count(s - by, blocks))
