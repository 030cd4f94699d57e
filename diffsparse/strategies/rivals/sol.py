"""Sol-Attn (arXiv 2607.24027): blocks whose mean score stands out of its row, and the means of all others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.layout import Layout
from diffsparse.schedule import exact, nearest
from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies.rivals.routed import Routed, mean_scores
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import select_rows, summarise

_LEAST_VARIANCE = 1e-6  # of the scores of a row, so that equal ones do not stand out by rounding


@dataclass(frozen=True)
class SolAttn(Routed):
    """Compute what stands out, let means stand for the rest, in one softmax (arXiv 2607.24027).

    The blocks are chosen anew in each call.

    1. Each block of n queries has its mean, each block of n keys its mean key, mean value and n.
    2. z is how many standard deviations the score of mean query and mean key lies above the mean of its row.
    3. Blocks with z > tau are computed, and those on the diagonal and next to it.
    4. All others count as n keys at their mean, in the same softmax.

    Blocks that hold text are computed, as they do in what they call the sink. Left out: dense layers (`Schedule` has
    them), the eight bits of their kernel, their cheaper estimate of the deviation from the variance of each channel.
    Ours: the tau that meets a sparsity. Work beside blocks and means: the scores of means, 1 / 2n^2.

    Attributes:
        sparsity: share of attention dropped, in [0, 1): blocks, the summaries of the others and what chooses them
            count.
        tau: as published (1 keeps about a sixth of the blocks, 2 a fortieth); the sparsity is then ignored. None is the
            tau that meets the sparsity, one for all heads and rows of a layer.
        block: edge of a block in tokens; by default 128 on a machine with a GPU, else 64.
        order: theirs is raster; "auto" gives it the orders of heads that `Digest` has.

    Raises:
        ConfigError: a value out of its range.
    """

    tau: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not (isinstance(self.tau, int | float) and math.isfinite(self.tau)):
            raise ConfigError(f"tau wants a number of standard deviations such as 1.0, or None; got {self.tau!r}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Blocks and means over q, k, v [B, H, N, D]."""
        means = summarise(k, v, self.block, scale=site.scale, key_mask=site.key_mask, by="means")
        z = _above_the_row(mean_scores(q, means, self.block, site))
        site.record.beside += self.routing(q.shape[2])
        return site.sparse(q, k, v, Blocks(self.lists(self._choose(z, site), site), summary=means))

    def routing(self, tokens: int | None) -> float:
        """Scores of mean queries and mean keys: one product of attention's two, 1 / n^2 as large."""
        return 0.5 / self.block**2

    def computed(self, share: float, layout: Layout | None) -> float:
        """The wanted share, or the diagonal and text where these are more."""
        return share if layout is None else max(share, float(self._always(layout, "cpu").float().mean()))

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes; a given tau leaves that to the run."""
        steps = super().expected(run)
        return steps if self.tau is None else run.each(lambda step: Step("sparse", None, self.routing(None), 1.0))

    def _choose(self, z: Tensor, site: Site) -> Tensor:
        """bool [B, H, nQ, nK]."""
        always = self._always(site.layout, z.device)
        if self.tau is not None:
            return (z > self.tau) | always
        z = site.shard.all_heads(z)  # one tau for the heads of all ranks
        keep = nearest(exact(self.share(self.routing(None))) * z[0].numel())
        layer = select_rows(z.flatten(1)[:, None], keep, always.expand_as(z).flatten(1)[:, None])
        return site.shard.own(layer.view_as(z), 1)

    def _always(self, layout: Layout, device: torch.device | str) -> Tensor:
        """Near the diagonal, and text: bool [nQ, nK]."""
        place = torch.arange(layout.blocks(self.block), device=device)
        near, sink = (place[:, None] - place).abs() <= 1, layout.sink(self.block, device)
        return near if sink is None else near | sink


def _above_the_row(scores: Tensor) -> Tensor:
    """How many standard deviations each score [..., nQ, nK] lies above the mean of its row; -inf counts for nothing."""
    real = scores.isfinite()
    count = real.sum(-1, keepdim=True).clamp(min=1)
    apart = scores - scores.masked_fill(~real, 0).sum(-1, keepdim=True) / count
    variance = apart.square().masked_fill(~real, 0).sum(-1, keepdim=True) / count
    return apart / (variance + _LEAST_VARIANCE).sqrt()
