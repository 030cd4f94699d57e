"""Digest: blocks where their means fail, the means of all others, and the residual of both. Ours, of known parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.named import check_order
from diffsparse.schedule import exact
from diffsparse.site.charge import MASS_PASS
from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies.blocks import with_text
from diffsparse.strategies.online import OnlineSearch
from diffsparse.strategies.work import Outline
from diffsparse_kernels import block_means, edges, select_heads, spread

_LEAST = 1e-3  # of the blocks, beside the best of each row


@dataclass(frozen=True)
class Digest(OnlineSearch):
    """Compute the blocks that a summary would get wrong, summarise the rest, and keep the residual of the summary.

    1. Each head has its tokens in the order that puts the most similar ones into a block.
    2. A block of n keys that is not computed counts as n keys at its mean, in the same softmax, with its mean value.
    3. exp is convex: the means never have more mass than the block. Their shortfall, mass - means' mass, is why a block
       must be computed, and not its mass: a heavy block of equal weights is summarised exactly. The shortfall matters
       more the further the values of the block lie apart.
    4. One threshold for all heads and rows of a layer spends the blocks where the shortfall is largest; every row keeps
       its best.
    5. The residual, the dense output less that of blocks and means, changes slowly from step to step. A dense step
       that searches knows it; it is kept, and added to the outputs of the steps that follow.
    6. Half of the work goes to such dense steps, evenly spread, the other half to the blocks between them.

    Means of dropped blocks in the softmax are PISA's (arXiv 2602.01077), Sol-Attn's (2607.24027) and SVG-EAR's
    (2603.08982); SVG-EAR computes where it estimates its centroids to err most. A dense output less a cheaper one, kept
    and added in later steps, is DiTFastAttn's (2406.08552), Re-ttention's (2505.22918) and QuantSparse's (2509.23681).
    Ours are the criterion (a shortfall of mass that is known exactly and has one sign, times the spread of values),
    orders of heads that take no attention to find, a residual of what even the means miss, and one budget for all.

    sparsity: share of the attention dropped after the first search, in [0, 1): dense steps, blocks, means (each counts
        as the one key that it is) and the outputs computed to find the residual all count. The mass passes of its
        searches (half a dense pass each) come on top, as those of every strategy that searches (see `Report.work`).
    searches: where the work does not suffice for a dense step, these search on the cached log-sum-exp, as AdaSpa's do.
    order: of the tokens (`diffsparse.orders`); "auto" finds each head's own in the first search.
    memory: GiB that the residual may take, for each sample of each guidance branch: 2HND bytes a layer. Where that
        is too little, means over as few neighbouring tokens as fit are kept, over a block at most, which helps less.

    Blocks that hold text are always computed. Where the length of the run is unknown, no residual is added and no step
    is dense again. The rest of the memory between steps is AdaSpa's.
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
        """Dense attention over q, k, v [B, H, N, D] with a search; keeps the residual of blocks and means."""
        out = super().observe(q, k, v, site)
        lifetime = self._lifetime(site.steps, site.memory["first"])
        site.memory.pop("residual", None)
        if lifetime:
            residual = (out - site.compare(q, k, v, Blocks(site.memory["lists"], summary="means"))).bfloat16()
            site.memory["residual"] = _Residual(*self._affordable(residual, site), site.step + lifetime)
        return out

    def product(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Blocks and means, and their residual of the last dense step unless that is long ago."""
        kept: _Residual | None = site.memory.get("residual")
        if kept is not None and site.step > kept.until:
            kept = None
            del site.memory["residual"]
        residual = None if kept is None else kept.rows_of(q.shape[2])
        return site.sparse(q, k, v, Blocks(site.memory["lists"], summary="means", residual=residual))

    def choose(self, mass: Tensor, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The blocks of the layer with the largest shortfall of their means, bool [B, H, nQ, nK]."""
        shortfall = (mass - site.means_mass(q, k, site.memory["lse"], self.block)).clamp(min=0)
        q_block, _ = edges(self.block)
        rows = (q.shape[2] - q_block * torch.arange(mass.shape[2], device=q.device)).clamp(max=q_block)
        shortfall *= rows[:, None] / mass.sum(-1, keepdim=True).clamp(min=1e-30)  # 1, but for the drift of the LSE
        shortfall *= spread(v, self._keys, site.key_mask)[:, :, None]
        share = self._share(self.density(site.steps, site.memory["first"]))
        shortfall = site.shard.all_heads(shortfall)  # one threshold for the heads of all ranks
        mask = site.shard.own(select_heads(shortfall.flatten(1, 2)[:, None], share).view_as(shortfall), 1)
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
            share = with_text(max(share, 1 / run.layout.blocks(self._keys)), self.block, run.layout)  # a row its best
        return share + (1 - share) / self._keys

    def _beside(self, run: Outline) -> tuple[float, float]:
        """Masses of blocks and of means; and in dense searches the product that gives the residual."""
        masses = MASS_PASS * (1 + 1 / self._keys)
        compared = self._sparse_density(run) if self._lifetime(run.steps, run.search or 0) else 0.0
        return masses + compared, masses

    def _affordable(self, residual: Tensor, site: Site) -> tuple[Tensor, int]:
        """Means over groups of as few tokens as the memory allows, and how many those are."""
        wanted = site.layers * residual[0].nbytes / 2**30
        group = math.ceil(min(wanted / self.memory, self._keys)) if self.memory else self._keys
        if group <= 1:
            return residual, 1
        site.record.note = (
            f"Digest keeps its residual as means over {group} tokens: all of it wants {wanted:.1f} GiB a sample"
        )
        return block_means(residual, group), group

    def _dense_steps(self, steps: int | None, first: int) -> int:
        """How many, after the first search."""
        return int((1 - exact(self.sparsity)) * _left(steps, first) / 2) if self.sparsity else 0

    def _lifetime(self, steps: int | None, first: int) -> int:
        """How many steps later the residual is still added: until the next dense one, or for half of the run."""
        return -(-_left(steps, first) // max(2, self._dense_steps(steps, first) + 1))

    def _share(self, density: float) -> float:
        """Of the blocks, so that with one key for each of the others `density` is computed."""
        mean = 1 / self._keys
        return max((density - mean) / (1 - mean), _LEAST) if self._keys > 1 else 1.0

    @property
    def _keys(self) -> int:
        """Keys of a block, which a mean stands for."""
        return edges(self.block)[1]


def _left(steps: int | None, first: int) -> int:
    """Steps of the run after the first search; 0 if its length is unknown."""
    return 0 if steps is None else max(steps - 1 - first, 0)


@dataclass(frozen=True)
class _Residual:
    """What blocks and means left out: bfloat16 [B, H, N / group, D], means over groups of consecutive tokens."""

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
