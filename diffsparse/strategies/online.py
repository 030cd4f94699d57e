"""What strategies share that find their blocks while they run, as AdaSpa does (arXiv 2502.21079, section 4.2)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.schedule import check_amount, exact, nearest
from diffsparse.site.charge import MASS_PASS
from diffsparse.site.compute import Site
from diffsparse.site.timing import Reading
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.blocks import check_block, check_share, row_density
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import Block, BlockLists, default_block
from diffsparse_kernels.lists import from_bits
from diffsparse_kernels.strips import tiles

_FEW_STEPS = 10
_PAIR_BYTES = 8  # that a pair of blocks takes for a moment


@dataclass(frozen=True)
class OnlineSearch(Strategy):
    """Blocks chosen from their softmax mass in the last dense step, and again in later steps on the cached LSE.

    The first search is a dense step with a second pass over its keys that sums the softmax weights of each block
    ("fused online search"). Later ones re-use its LSE and so need one pass without values ("LSE-cached search",
    Eq. 4); a step that searches already runs sparse with what it found.

    Attributes:
        sparsity: share of blocks dropped, in [0, 1).
        searches: later searches; an int is a step counted from 0, a float a fraction of the run, both among the steps
            that no step cache skips. Runs of ten steps or fewer skip fractions: their few sparse steps don't repay one.
        block: tokens of a block, or its queries and keys; by default 128 on a machine with a GPU, else 64.
    """

    sparsity: float = 0.8
    searches: tuple[int | float, ...] = (0.6,)
    block: Block = field(default_factory=default_block)

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_block(self.block)
        if not isinstance(self.searches, tuple):
            raise ConfigError(f"searches wants a tuple of steps or fractions such as (0.6,); got {self.searches!r}")
        for search in self.searches:
            check_amount("searches", search)

    @abstractmethod
    def choose(self, mass: Tensor, q: Tensor, k: Tensor, v: Tensor, site: Site) -> BlockLists:
        """Blocks to keep, with their bits, from their mass [B, H, nQ, nK] and q, k, v [B, H, N, D]."""

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Dense attention over q, k, v [B, H, N, D] with the first search."""
        out, lse, mass = site.dense_with_mass(q, k, v, self.block)
        site.memory.setdefault("first", site.executed)
        site.memory["lse"] = lse
        self._search(mass, q, k, v, site)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Block-sparse attention over q, k, v [B, H, N, D] with the latest blocks."""
        if "lists" not in site.memory:
            return self.observe(q, k, v, site)
        later = self.search_steps(site.executed_steps, site.memory["first"])
        searched, now = site.memory["searched"], site.executed
        due = max((step for step in later if searched < step <= now), default=None)  # how many there are may change
        if due is not None:
            if later[due]:
                return self.observe(q, k, v, site)
            self._search(site.block_mass(q, k, site.memory["lse"], self.block), q, k, v, site)
        return self.product(q, k, v, site)

    def product(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Attention over q, k, v [B, H, N, D] with the blocks that were found."""
        lists, longest = (site.memory[name] for name in ("lists", "longest"))
        if (width := longest.value()) is not None:  # a device tells it late; until then the lists are as wide as can be
            site.memory["lists"] = lists = lists.trimmed(int(width))
        return site.sparse(q, k, v, lists)

    def search_steps(self, steps: int | None, first: int = 0) -> dict[int, bool]:
        """The later searches as 0-based steps of a run of `steps`, and whether such a step is dense.

        Args:
            first: step of the first search.
        """
        fractions = steps is not None and steps > _FEW_STEPS
        return {
            search if isinstance(search, int) else max(nearest(exact(search) * (steps or 0)) - 1, 0): False
            for search in self.searches
            if isinstance(search, int) or fractions
        }

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes."""
        if run.search is None:
            return run.constant(1.0)
        first, density = run.search, self._sparse_density(run)
        later, (dense, cached) = self.search_steps(run.steps, first), self._beside(run)

        def sparse(step: int) -> Step:
            if step not in later or step <= first:
                return Step("sparse", density)
            return Step("search", 1.0, dense, 1.0) if later[step] else Step("refresh", density, cached, 1.0)

        steps = run.each(sparse)
        steps[first] = Step("search", 1.0, dense, 1.0)
        return steps

    def _sparse_density(self, run: Outline) -> float:
        """What sparse steps compute."""
        return row_density(self.sparsity, self.block, run.layout)

    def _beside(self, run: Outline) -> tuple[float, float]:
        """What dense searches, and those on a cached log-sum-exp, compute beside that, in dense passes."""
        return MASS_PASS, MASS_PASS

    def _search(self, mass: Tensor, q: Tensor, k: Tensor, v: Tensor, site: Site) -> None:
        lists = self.choose(mass, q, k, v, site)
        site.record.searched(recall_of(mass, lists))
        site.memory.update(lists=lists, longest=Reading(lists.cnt.max()), searched=site.executed)


def recall_of(mass: Tensor, lists: BlockLists) -> Tensor:
    """Share of the mass [B, H, nQ, nK] that lies in the listed blocks, [B, H]; a few rows at a time."""
    total: Tensor = mass.sum((-2, -1))
    inside, bits = torch.zeros_like(total), lists.packed()
    for tile in tiles(mass, mass.shape[3] * _PAIR_BYTES):
        inside[tile[:2]] += (mass[tile] * from_bits(bits[tile], mass.shape[3])).sum((-2, -1))
    return inside / total.clamp(min=1e-30)
