"""PISA (arXiv 2602.01077): block-wise Taylor expansion, of first order with one matrix for all blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies.blocks import keep_count
from diffsparse.strategies.rivals.routed import Routed, mean_scores
from diffsparse.strategies.work import Outline
from diffsparse_kernels import Summaries, select_rows, summarise
from diffsparse_kernels.masks import each_head, shown

_LEAST_NORM = 1e-5  # added to |H|, as in their code


@dataclass(frozen=True)
class PISA(Routed):
    """Compute the blocks of largest estimated error, expand the others around their means (arXiv 2602.01077).

    The blocks are chosen anew in each call.

    1. Each block b of n keys has its mean key, mean value, and H_b = sum of (k - mean key)^T v.
    2. Each row of blocks computes those with the largest softmax(mean q . mean key * scale + log |H_b|).
    3. All others count as n keys at their mean, in the same softmax: order zero.
    4. First order: scale * q H / N, with H = sum of H_b over all blocks, times the row's weight on the means.

    Blocks that hold text are computed in every row, as their sink is; the rows of text are computed in full. Work
    beside blocks and means: the scores of means, 1 / 2n^2; the matrices and q H, each D / 2N. Nothing is kept between
    steps.

    Attributes:
        sparsity: their density is 1 - sparsity, but for what is counted here and not there.
        block: edge of a block in tokens; by default 128 on a machine with a GPU, else 64.
        order: theirs is raster.

    Raises:
        ConfigError: a value out of its range.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Blocks and their expansion over q, k, v [B, H, N, D]."""
        tokens, dim = q.shape[2:]
        each = summarise(k, v, self.block, scale=site.scale, key_mask=site.key_mask)
        scores = mean_scores(q, each, self.block, site) + (_norms(each, site.scale_of(q)) + _LEAST_NORM).log()
        keep = keep_count(1 - self.share(self.routing(tokens), dim / tokens), scores.shape[-1])
        mask = select_rows(scores, keep, site.layout.sink(self.block, q.device))
        site.record.beside += self.routing(tokens)
        one = each._replace(
            variance=None, spread=None, steepness=None, slope=_slope_of_all(k, v, each, self.block, site)
        )
        return site.sparse(q, k, v, Blocks(self.lists(mask, site), summary=one))

    def routing(self, tokens: int | None) -> float:
        """Scores of mean queries and mean keys: one product of attention's two, 1 / n^2 as large."""
        return 0.5 / self.block**2

    def beyond_means(self, run: Outline) -> float:
        """The matrices and q H."""
        return 0.0 if run.layout is None or run.head_dim is None else run.head_dim / run.layout.tokens


def _norms(each: Summaries, scale: float) -> Tensor:
    """|H_b|, not scaled and not divided by n: [B, H, 1, nK]."""
    assert each.steepness is not None
    norms: Tensor = each.steepness * each.log_count.exp() * (each.key.shape[-1] ** 0.5 / scale)
    return norms[:, :, None]


def _slope_of_all(k: Tensor, v: Tensor, each: Summaries, block: int, site: Site) -> Tensor:
    """scale * H / N over the real keys, [B, H, 1, D, D_v]."""
    apart = k - each.key.repeat_interleave(block, 2)[:, :, : k.shape[2]]
    if site.key_mask is not None:
        apart = apart.masked_fill(~each_head(shown(site.key_mask))[..., None], 0)
    tokens = each.log_count.exp().sum(-1).clamp(min=1)[..., None, None]  # [B|1, H|1, 1, 1]
    slope: Tensor = apart.mT @ v.to(apart.dtype) * (site.scale_of(k) / tokens)
    return slope[:, :, None]
