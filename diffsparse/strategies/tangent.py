"""Tangent: blocks where a first-order summary fails, first-order summaries of all others, and nothing kept. Ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from diffsparse.orders.layout import Layout
from diffsparse.orders.named import AUTO, check_order
from diffsparse.site.charge import MASS_PASS, summary_work
from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.blocks import check_block, check_share, rows_of_text, with_text
from diffsparse.strategies.probes import FEWEST, Rows, mended_rows, probe_count, probe_work
from diffsparse.strategies.residual import LowRank
from diffsparse.strategies.work import Outline, Parts, Step
from diffsparse_kernels import Block, BlockLists, Correction, Summaries, Summary, best_block, edges, spread

_MOST_STATISTICS = 1 / 3  # of the work, as all that follow


@dataclass(frozen=True)
class Tangent(Strategy):
    """Compute the blocks that a first-order summary would get wrong, and summarise the rest; each step by itself.

    1. Each head has its tokens in the order that puts the most similar ones into a block.
    2. A block of n keys that is not computed counts as n keys at its mean, in the same softmax, with its mean value.
       First order adds what varies within it: scores that vary with variance s have exp(s / 2) times the mass, and the
       softmax leans to the values of the keys with the higher scores, by q H with H = scale * cov(keys, values).
       For a block of queries the matrices H of all dropped blocks are mixed into one, as its mean query weighs them,
       and no step q H gets longer than half of the values' spread. Means alone where H would take over a third of the
       work: with blocks of 64 and 64 channels, over less than 1088 tokens at 80 % sparsity, 2508 at 90, 7229 at 95.
    3. What this leaves out is known in size without the keys, from |q|, |H|, the variance of the scores and the spread
       of the values. One threshold for all heads and rows of a layer spends the blocks where that is largest; every
       row keeps its best.
    4. Some query rows, evenly spread, are computed exactly. What they miss, as an affine function of what they got, is
       fitted and added to all rows: nothing, a mean, or ridge regression, whatever predicts a probe from the others.

    No step needs to be dense or to be known by number, nothing is kept between steps, and at sparsity 0 it is dense
    attention. Blocks that hold text are always computed and their rows never corrected.

    Means of dropped blocks in the softmax are PISA's (arXiv 2602.01077), Sol-Attn's (2607.24027) and SVG-EAR's
    (2603.08982). PISA adds one global first-order matrix for each head; SVG-EAR routes by an estimate of its error.
    Ours are the matrix of each block of queries, routing by the estimated error of that very summary, one budget for
    the heads of a layer, and the fit by probes.

    Attributes:
        sparsity: share of attention that is not computed, in [0, 1): blocks and all that goes with them count by their
            multiplications (routing 1 / (2 kv_block) of a dense pass, means 1 / kv_block, statistics and slopes D / N +
            D / (2 q_block kv_block), probes n / N + D / 2N).
        block: tokens of a block, or its queries and keys; by default 128 x 64 on a machine with a GPU, else 64.
        order: of the tokens (`diffsparse.orders`); "auto" finds each head's own in its first call.
        probes: False leaves them out. There are as many as a head has channels, at least 64; fewer where they would
            take more than an eighth of the work, and none where these were less than 32.

    Raises:
        ConfigError: a value out of its range.
    """

    sparsity: float = 0.8
    block: Block = field(default_factory=best_block)
    order: str = AUTO
    probes: bool = True
    is_compensated = True
    _most_rank: ClassVar[int] = 0  # of a residual
    _most_probing: ClassVar[float] = 1 / 8  # of the work

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_block(self.block)
        check_order(self.order, auto=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Blocks, summaries and what probes add, over q, k, v [B, H, N, D]."""
        return site.sparse(q, k, v, self._blocks(q, k, v, site, None))

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes; where the sizes are not known, the work that was asked for."""
        return run.each(lambda _: self._expected(run))

    @property
    def _is_whole(self) -> bool:
        """Whether nothing is dropped: a summary of one key would be the key."""
        return not self.sparsity or edges(self.block)[1] == 1

    def _expected(self, run: Outline) -> Step:
        if self._is_whole:
            return Step("sparse", 1.0)
        if run.layout is None or run.head_dim is None:
            return Step("sparse", 1 - self.sparsity, new=1.0)
        layout, dim, rank = run.layout, run.head_dim, self._most_rank
        share = self._listed(layout, dim, rank)
        by, probes = self._summary(layout.tokens, dim), self._probe_count(layout.tokens, dim)
        parts = Parts(share, by, True, self._routing() > 0, probes, rank)
        density = self._with_summaries(share, layout, dim)
        return Step("sparse", density, self._beside(layout.tokens, dim, rank), 1.0, parts)

    def _listed(self, layout: Layout, dim: int, rank: int) -> float:
        """Share of the blocks that are computed."""
        best = (1 - rows_of_text(self.block, layout)) / layout.blocks(edges(self.block)[1])  # every row its own
        return min(with_text(0.0, self.block, layout) + max(self._share(layout, dim, rank), best), 1.0)

    def _with_summaries(self, share: float, layout: Layout, dim: int) -> float:
        """Work of this share of the blocks, and of summaries of all others."""
        by = self._summary(layout.tokens, dim)
        return share + summary_work(by, 1 - share, self.block, layout.tokens, dim)

    def _blocks(
        self, q: Tensor, k: Tensor, v: Tensor, site: Site, residual: LowRank | None, bits: Tensor | None = None
    ) -> Blocks:
        """The blocks of this call, summaries of all others, and what is added to the output.

        Args:
            residual: of the same product in an earlier step.
            bits: the blocks of that step, of `BlockLists.packed`; None chooses them anew.
        """
        (q_block, kv_block), (tokens, dim) = edges(self.block), q.shape[2:]
        if self._is_whole:
            every = q.new_ones(*q.shape[:2], *map(site.layout.blocks, edges(self.block)), dtype=torch.bool)
            sizes = {"q_block": q_block, "kv_block": kv_block, "q_len": tokens, "kv_len": tokens}
            return Blocks(BlockLists.from_mask(every, **sizes))
        summaries, rank = site.summarise(k, v, kv_block, self._summary(tokens, dim)), residual.rank if residual else 0
        if bits is None:
            varied = summaries if summaries.by == "first-order" else _with_bound(summaries, k, v, kv_block, site)
            error = site.summary_error(q, varied, self.block)
            lists = site.largest(error, self._share(site.layout, dim, rank), self.block)
        else:
            lists = site.unpacked(bits, self.block)
        correct = None if residual is None else lambda _: residual.correction
        site.record.beside += rank / (2 * tokens)
        if probes := self._probe_count(tokens, dim):
            rows = mended_rows(site.layout, q_block, probes, q.device)
            correct = partial(_probed, q, k, v, site, rows, residual) if len(rows.probes) >= FEWEST else None
        about = self._with_summaries(self._listed(site.layout, dim, rank), site.layout, dim)
        return Blocks(lists, summary=summaries, correct=correct, about=about)

    def _summary(self, tokens: int, dim: int) -> Summary:
        """First order, where its statistics and slopes leave most of the work to blocks."""
        fixed = summary_work("first-order", 0.0, self.block, tokens, dim)
        return "first-order" if fixed <= _MOST_STATISTICS * (1 - self.sparsity) else "means"

    def _probe_count(self, tokens: int, dim: int) -> int:
        return probe_count((1 - self.sparsity) * self._most_probing, tokens, dim) if self.probes else 0

    def _share(self, layout: Layout, dim: int, rank: int) -> float:
        """Of the blocks, beside those of text, so that with all that goes with them 1 - sparsity is computed."""
        kv_block, tokens = edges(self.block)[1], layout.tokens
        summaries = summary_work(self._summary(tokens, dim), 1.0, self.block, tokens, dim)
        rest = summaries + self._beside(tokens, dim, rank)
        share = (with_text(1 - self.sparsity, self.block, layout) - rest) / (1 - 1 / kv_block)
        return max(share - with_text(0.0, self.block, layout), 0.0)

    def _beside(self, tokens: int, dim: int, rank: int) -> float:
        """What is computed beside blocks and summaries, in dense passes: routing, probes and the residual."""
        count = self._probe_count(tokens, dim)
        return self._routing() + probe_work(count, tokens, dim) + rank / (2 * tokens)

    def _routing(self) -> float:
        return MASS_PASS / edges(self.block)[1]


def _with_bound(means: Summaries, k: Tensor, v: Tensor, block: int, site: Site) -> Summaries:
    """Means with what tells their error: of |H|, which was not made, the highest that the spreads allow."""
    keys, values = (spread(x, block, site.key_mask) for x in (k, v))
    variance = (keys * site.scale_of(k)).square() / k.shape[3]
    return means._replace(variance=variance, spread=values, steepness=variance.sqrt() * values)


def _probed(
    q: Tensor, k: Tensor, v: Tensor, site: Site, rows: Rows, residual: LowRank | None, out: Tensor
) -> Correction:
    """What a fit to exact rows adds to out [B, H, N, D]."""
    site.record.beside += probe_work(len(rows.probes), *q.shape[2:])
    exact = site.exact_rows(q.index_select(2, rows.probes), k, v)
    kept = {} if residual is None else residual._asdict()
    return site.fit_rows(exact, out, rows.probes, **kept)._replace(rows=rows.mended)
