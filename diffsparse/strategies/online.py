"""What strategies share that find their blocks while they run, as AdaSpa does (arXiv 2502.21079, section 4.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.schedule import check_amount
from diffsparse.site import Site
from diffsparse.strategies.blocks import check_block, check_share
from diffsparse_kernels import BlockLists

_FEW_STEPS = 10


@dataclass(frozen=True)
class OnlineSearch(ABC):
    """Blocks chosen from their softmax mass in the last dense step, and again in later steps on the cached LSE.

    The first search is a dense step with a second pass over its keys that sums the softmax weights of each block
    ("fused online search"). Later ones re-use its LSE and so need one pass without values ("LSE-cached search",
    Eq. 4); a step that searches already runs sparse with what it found.

    sparsity: share of blocks dropped, in [0, 1).
    searches: later searches; an int is a step counted from 0, a float a fraction of the run. Runs of ten steps or
        fewer skip fractions: their few sparse steps don't repay one.
    block: edge of a block in tokens.
    """

    sparsity: float = 0.8
    searches: tuple[int | float, ...] = (0.6,)
    block: int = 64

    means: ClassVar[bool] = False  # whether dropped blocks stand as their means

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_block(self.block)
        if not isinstance(self.searches, tuple):
            raise ConfigError(f"searches wants a tuple of steps or fractions such as (0.6,); got {self.searches!r}")
        for search in self.searches:
            check_amount("searches", search)

    @abstractmethod
    def choose(self, mass: Tensor, q: Tensor, k: Tensor, site: Site) -> Tensor:
        """Blocks to keep, bool [B, H, nQ, nK], from their mass and q, k [B, H, N, D]."""

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Dense attention over q, k, v [B, H, N, D] with the first search."""
        out, lse = site.dense_with_lse(q, k, v)
        site.memory["lse"] = lse
        self._search(q, k, site)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Block-sparse attention over q, k, v [B, H, N, D] with the latest blocks."""
        if "lists" not in site.memory:
            return self.observe(q, k, v, site)
        if site.step in self.search_steps(site.steps) and site.memory["searched"] != site.step:
            self._search(q, k, site)
        return site.sparse(q, k, v, site.memory["lists"], means=self.means)

    def search_steps(self, steps: int | None) -> set[int]:
        """The later searches as 0-based steps of a run of `steps`."""
        fractions = steps is not None and steps > _FEW_STEPS
        return {
            search if isinstance(search, int) else max(round(search * (steps or 0)) - 1, 0)
            for search in self.searches
            if isinstance(search, int) or fractions
        }

    def _search(self, q: Tensor, k: Tensor, site: Site) -> None:
        mass = site.block_mass(q, k, site.memory["lse"], self.block)  # [B, H, nQ, nK]
        mask = self.choose(mass, q, k, site)
        site.found(recall_of(mass, mask))
        n = site.layout.tokens
        lists = BlockLists.from_mask(mask, q_block=self.block, kv_block=self.block, q_len=n, kv_len=n)
        site.memory.update(lists=lists, searched=site.step)


def recall_of(mass: Tensor, mask: Tensor) -> Tensor:
    """Share of the mass [B, H, nQ, nK] that lies inside the mask, [B, H]."""
    total: Tensor = mass.sum((-2, -1))
    inside: Tensor = (mass * mask).sum((-2, -1))
    return inside / total.clamp(min=1e-30)
