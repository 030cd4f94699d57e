"""DiTFastAttn (arXiv 2406.08552): attention in a window, and what it missed when all was last computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.layout import Layout
from diffsparse.orders.named import RASTER, check_order
from diffsparse.schedule import exact
from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.blocks import check_count, check_share, check_square, keep_count, row_density
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import BlockLists, default_block, select_rows


@dataclass(frozen=True)
class DiTFastAttn(Strategy):
    """Window attention with residual sharing, their "WA-RS" (arXiv 2406.08552).

    1. A query attends to the keys nearest to it in the sequence.
    2. A step in which all attention is computed keeps its residual: the full output less that of the window.
    3. Steps between add the residual to the output of the window.

    Left out: outputs shared by steps or by guidance branches (step caches and `evaluate` have these), and the search
    that gives each layer and step its method; full steps come evenly instead. Ours: the window is of blocks, and is not
    cut off at the ends of the sequence; text is in every window and sees everything. Kept between steps: the residual,
    2HND bytes a layer in bfloat16. Work beside full steps: their windows, computed to find the residual.

    Attributes:
        sparsity: share of attention dropped over a period, in [0, 1). Half of the work goes to full steps, unless
            `window` or `period` say otherwise.
        window: share of the keys that a query sees (theirs is 1/8); None is what the full steps leave.
        period: from one full step to the next, in steps; None is 2 / (1 - sparsity).
        block: edge of a block in tokens; by default 128 on a machine with a GPU, else 64.
        order: of the tokens (`diffsparse.orders`); theirs is raster.

    Raises:
        ConfigError: a value out of its range.
    """

    sparsity: float = 0.8
    window: float | None = None
    period: int | None = None
    block: int = field(default_factory=default_block)
    order: str = RASTER
    is_compensated = True

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_square(self.block)
        check_order(self.order, auto=True)
        if self.window is not None and not (isinstance(self.window, int | float) and 0 < self.window <= 1):
            raise ConfigError(f"window wants a share of the keys in (0, 1], or None; got {self.window!r}")
        if self.period is not None:
            check_count("period", self.period)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Full attention over q, k, v [B, H, N, D]; keeps what its window misses."""
        if "lists" not in site.memory:
            site.memory["lists"] = self._window(q, site.layout)
        out = site.dense(q, k, v, reason="residual")
        residual = out - site.compare(q, k, v, Blocks(site.memory["lists"]))
        site.memory.update(residual=residual, full=site.executed)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The window over q, k, v [B, H, N, D] and the latest residual."""
        if "full" not in site.memory or site.executed >= site.memory["full"] + self.every:
            return self.observe(q, k, v, site)
        return site.sparse(q, k, v, Blocks(site.memory["lists"], correct=site.memory["residual"].add))

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes."""
        if run.search is None:
            return run.constant(1.0)
        first, density = run.search, row_density(1 - self.share, self.block, run.layout)
        full = Step("tail", 1.0, density)
        steps = run.each(lambda step: Step("sparse", density) if (step - first) % self.every else full)
        steps[first] = full
        return steps

    @property
    def every(self) -> int:
        """Steps from one full step to the next."""
        return math.ceil(2 / (1 - exact(self.sparsity))) if self.period is None else self.period

    @property
    def share(self) -> float:
        """Of the keys, in a window: each step of a period computes one, the full step too."""
        if self.window is not None or not self.sparsity:
            return self.window or 1.0
        return max(float(1 - exact(self.sparsity)) - 1 / self.every, 0.0)

    def _window(self, q: Tensor, layout: Layout) -> BlockLists:
        """The key blocks nearest to each query block, text first."""
        place, n = torch.arange(layout.blocks(self.block), device=q.device), layout.tokens
        near = -(place[:, None] - place).abs().float()
        mask = select_rows(near, keep_count(1 - self.share, len(place)), layout.sink(self.block, q.device))
        mask = mask.expand(1, q.shape[1], -1, -1)
        return BlockLists.from_mask(mask, q_block=self.block, kv_block=self.block, q_len=n, kv_len=n)
