"""Digest: blocks where their means fail, the means of all the others, and what both miss. Ours, of known parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.named import check_order
from diffsparse.schedule import exact
from diffsparse.site.compute import Blocks, Site
from diffsparse.site.record import MASS_PASS
from diffsparse.strategies.blocks import with_text
from diffsparse.strategies.online import OnlineSearch
from diffsparse.strategies.work import Outline
from diffsparse_kernels import block_means, select_heads, spread

_LEAST = 1e-3  # of the blocks, beside the best of each row


@dataclass(frozen=True)
class Digest(OnlineSearch):
    """Compute the blocks that a summary would get wrong, summarise the rest, and remember what the summary misses.

    1. Each head has its tokens in the order that puts the most similar ones into a block.
    2. A block of n keys that is not computed counts as n keys at its mean, in the same softmax, with its mean value.
    3. exp is convex: the means never have more mass than the block. What they lack, mass - means' mass, is what a block
       must be computed for, and not its mass: a heavy block of equal weights is summed up exactly. It tells the more,
       the further the values of the block lie apart.
    4. One threshold for all heads and rows of a layer spends the blocks where they tell most; every row keeps its best.
    5. What is missing still, the dense output less that of blocks and means, changes slowly from step to step. A dense
       step that searches knows it; it is kept, and added to the outputs of the steps that follow.
    6. Half of the work goes to such dense steps, evenly spread, the other half to the blocks between them.

    Means of dropped blocks in the softmax are PISA's (arXiv 2602.01077), Sol-Attn's (2607.24027) and SVG-EAR's
    (2603.08982); SVG-EAR computes where it estimates its centroids to err most. A dense output less a cheaper one, kept
    and added in later steps, is DiTFastAttn's (2406.08552), Re-ttention's (2505.22918) and QuantSparse's (2509.23681).
    Ours are the criterion (a shortfall of mass that is known exactly and has one sign, times the spread of values),
    orders of heads that take no attention to find, a residual of what even the means miss, and one budget for all.

    sparsity: share of the attention dropped after the first search, in [0, 1): dense steps, blocks, means (each counts
        as the one key that it is) and the outputs computed to know what is missing all count. The mass passes of its
        searches (half a dense pass each) come on top, as those of every strategy that searches; `Report.work` tells.
    searches: where the work does not suffice for a dense step, these search on the cached log-sum-exp, as AdaSpa's do.
    order: of the tokens (`diffsparse.orders`); "auto" finds each head's own in the first search.
    memory: GiB that what is missing may take, for each sample of each guidance branch: 2HND bytes a layer. Where that
        is too little, means over as few neighbouring tokens as fit are kept, over a block at most, which helps less.

    Blocks that hold text are always computed. Where nobody knows the length of the run, nothing missing is added and no
    step is dense again. The rest of the memory between steps is AdaSpa's.
    """

    searches: tuple[int | float, ...] = (0.4,)
    order: str = "auto"
    memory: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order, auto=True)
        if not isinstance(self.memory, int | float) or not self.memory >= 0:
            raise ConfigError(f"memory wants a number of GiB, at least 0; got {self.memory!r}")

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Dense attention over q, k, v [B, H, N, D] with a search; keeps what the chosen blocks and means miss."""
        out = super().observe(q, k, v, site)
        lasts = self._lasts(site.steps, site.memory["first"])
        site.memory.pop("missing", None)
        if lasts:
            missing = (out - site.compare(q, k, v, Blocks(site.memory["lists"], means=True))).bfloat16()
            site.memory["missing"] = _Missing(*self._affordable(missing, site), site.step + lasts)
        return out

    def product(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Blocks and means, and what such missed in the last dense step unless that is long ago."""
        missing: _Missing | None = site.memory.get("missing")
        if missing is not None and site.step > missing.until:
            missing = None
            del site.memory["missing"]
        residual = None if missing is None else missing.rows_of(q.shape[2])
        return site.sparse(q, k, v, Blocks(site.memory["lists"], means=True, residual=residual))

    def choose(self, mass: Tensor, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The blocks of the layer whose means lack the most, bool [B, H, nQ, nK]."""
        lacking = (mass - site.means_mass(q, k, site.memory["lse"], self.block)).clamp(min=0)
        rows = (q.shape[2] - self.block * torch.arange(mass.shape[2], device=q.device)).clamp(max=self.block)
        lacking *= rows[:, None] / mass.sum(-1, keepdim=True).clamp(min=1e-30)  # 1, but for the drift of the LSE
        lacking *= spread(v, self.block, site.key_mask)[:, :, None]
        share = self._share(self.density(site.steps, site.memory["first"]))
        lacking = site.shard.all_heads(lacking)  # one threshold for the heads of all ranks
        mask = site.shard.own(select_heads(lacking.flatten(1, 2)[:, None], share).view_as(lacking), 1)
        sink = site.layout.text_sink(self.block, q.device)
        return mask if sink is None else mask | sink

    def search_steps(self, steps: int | None, first: int = 0) -> dict[int, bool]:
        """Dense steps where the work suffices for some, else AdaSpa's later searches."""
        again = self._dense_steps(steps, first)
        if not again:
            return super().search_steps(steps, first)
        leg = Fraction(_left(steps, first) + 1, again + 1)
        return {first + math.ceil(i * leg - Fraction(1, 2)): True for i in range(1, again + 1)}  # of halves the earlier

    def density(self, steps: int | None, first: int = 0) -> float:
        """Of blocks and means in sparse steps, so that together with the dense ones 1 - sparsity is computed."""
        left = _left(steps, first)
        if not left or not self.sparsity:
            return 1 - self.sparsity
        dense = self._dense_steps(steps, first)
        return ((1 - self.sparsity) * left - dense) / (left + 1)  # each search computes it once more

    def _sparse_density(self, run: Outline) -> float:
        share = self._share(self.density(run.steps, run.search or 0))
        if run.layout is not None:
            share = with_text(max(share, 1 / run.layout.blocks(self.block)), self.block, run.layout)  # a row its best
        return share + (1 - share) / self.block

    def _beside(self, run: Outline) -> tuple[float, float]:
        """Masses of blocks and of means; and in dense searches the product that tells what is missing."""
        masses = MASS_PASS * (1 + 1 / self.block)
        compared = self._sparse_density(run) if self._lasts(run.steps, run.search or 0) else 0.0
        return masses + compared, masses

    def _affordable(self, missing: Tensor, site: Site) -> tuple[Tensor, int]:
        """Means over groups of as few tokens as the memory allows, and how many those are."""
        wanted = site.layers * missing[0].nbytes / 2**30
        group = math.ceil(min(wanted / self.memory, self.block)) if self.memory else self.block
        if group <= 1:
            return missing, 1
        site.record.note = (
            f"Digest keeps what is missing as means over {group} tokens: all of it wants {wanted:.1f} GiB a sample"
        )
        return block_means(missing, group), group

    def _dense_steps(self, steps: int | None, first: int) -> int:
        """How many, after the first search."""
        return int((1 - exact(self.sparsity)) * _left(steps, first) / 2) if self.sparsity else 0

    def _lasts(self, steps: int | None, first: int) -> int:
        """How many steps later what is missing is still added: until the next dense one, or for half of the run."""
        return -(-_left(steps, first) // max(2, self._dense_steps(steps, first) + 1))

    def _share(self, density: float) -> float:
        """Of the blocks, so that with one key for each of the others `density` is computed."""
        mean = 1 / self.block
        return max((density - mean) / (1 - mean), _LEAST) if self.block > 1 else 1.0


def _left(steps: int | None, first: int) -> int:
    """Steps of the run after the first search; 0 if nobody knows its length."""
    return 0 if steps is None else max(steps - 1 - first, 0)


@dataclass(frozen=True)
class _Missing:
    """What blocks and means missed: bfloat16 [B, H, N / group, D], means over groups of tokens in a row."""

    rows: Tensor
    group: int
    until: int  # the last step at which it is added

    def rows_of(self, tokens: int) -> Tensor:
        """[B, H, tokens, D]."""
        return self.rows if self.group == 1 else self.rows.repeat_interleave(self.group, 2)[:, :, :tokens]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.rows.nbytes
