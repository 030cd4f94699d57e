"""The control: random blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.named import RASTER, check_order
from diffsparse.site.compute import Site
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.blocks import check_block, check_share, keep_count, row_density
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import Block, BlockLists, default_block, edges, select_rows


@dataclass(frozen=True)
class Random(Strategy):
    """Random key blocks, as many in each query row as the sparsity allows: what every method must beat.

    Attributes:
        sparsity: share of blocks dropped, in [0, 1). Blocks that hold text are always kept.
        seed: which blocks; they differ by layer and head, and stay the same over steps, branches and runs.
        block: tokens of a block, or its queries and keys; by default 128 on a machine with a GPU, else 64.
        order: of the tokens (`diffsparse.orders`).

    Raises:
        ConfigError: a value out of its range.
    """

    sparsity: float = 0.8
    seed: int = 0
    block: Block = field(default_factory=default_block)
    order: str = RASTER

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_block(self.block)
        check_order(self.order, auto=True)
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed wants a whole number of at least 0; got {self.seed!r}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Block-sparse attention over q, k, v [B, H, N, D]."""
        if "lists" not in site.memory:
            site.memory["lists"] = self._draw(q, site)
        return site.sparse(q, k, v, site.memory["lists"])

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes."""
        return run.constant(row_density(self.sparsity, self.block, run.layout))

    def _draw(self, q: Tensor, site: Site) -> BlockLists:
        tokens, (q_block, kv_block) = site.layout.tokens, edges(self.block)
        rows, columns = site.layout.blocks(q_block), site.layout.blocks(kv_block)
        # Drawn on the CPU, so that every device gets the same blocks.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + site.index)
        scores = torch.rand(
            1, q.shape[1] * site.shard.degree, rows, columns, generator=generator
        )  # of all ranks, so that each
        scores = site.shard.own(scores, 1).to(q.device)  # head gets its own, [1, H, nQ, nK]
        free = site.free_blocks(self.block)
        keep = keep_count(self.sparsity, free) + columns - free
        mask = select_rows(scores, keep, site.layout.sink(self.block, q.device))
        return BlockLists.from_mask(mask, q_block=q_block, kv_block=kv_block, q_len=tokens, kv_len=tokens)
