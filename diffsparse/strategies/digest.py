"""Digest: Tangent, and what its product missed in the last dense step. Ours, of known parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsparse.site.charge import MASS_PASS
from diffsparse.site.compute import Site
from diffsparse.strategies.blocks import check_number
from diffsparse.strategies.residual import LowRank, affordable_rank
from diffsparse.strategies.tangent import Tangent
from diffsparse.strategies.work import Outline, Step
from diffsparse_kernels import edges


@dataclass(frozen=True)
class Digest(Tangent):
    """Tangent that also learns from a dense step, where the schedule has one.

    In the last of the dense first steps the sparse product is computed too. What it misses changes slowly from step to
    step and is smooth along the tokens: it is kept as a factor of low rank for each head, N (r + 2) bytes. In the steps
    that follow, the probes see what of it still holds: their fit may start from it, and has its coefficients among its
    features. Where there are no probes, it is added as it is for half of the run.

    A dense output less a cheaper one, kept and added in later steps, is DiTFastAttn's (arXiv 2406.08552), Re-ttention's
    (2505.22918) and QuantSparse's (2509.23681), which keeps it in low rank. Ours are what it is a residual of, and that
    exact rows decide in each step, for each head, what of it is used.

    memory: GiB that may be kept, for each sample of each guidance branch; a lower rank than 4 where that is too little.

    Without a dense first step it is Tangent. Where the length of the run is unknown, only probes use what was kept.
    """

    memory: float = 1.2
    _most_rank: ClassVar[int] = 4  # on the embedded model as good as all of it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("memory", self.memory)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Dense attention over q, k, v [B, H, N, D]; keeps what the sparse product misses of it."""
        out = site.dense(q, k, v, reason="schedule")
        rank = self._rank(q, site)
        if rank and self.sparsity:
            missed = out - site.compare(q, k, v, self._blocks(q, k, v, site, None))
            site.memory["kept"] = LowRank.of(missed, rank), site.step
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Tangent's attention over q, k, v [B, H, N, D] with what was kept."""
        return site.sparse(q, k, v, self._blocks(q, k, v, site, self._kept(q, site)))

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes: as Tangent, and in the last dense step the sparse product beside the dense one."""
        steps = super().expected(run)
        if 0 < run.first <= run.steps and self.sparsity and self.memory:
            compared = (self._expected(run).density or 0.0) + MASS_PASS / edges(self.block)[1]
            steps[run.first - 1] = Step("dense", 1.0, compared)
        return steps

    def _kept(self, q: Tensor, site: Site) -> LowRank | None:
        """The residual, if it is of use: probes tell so themselves, else it is for half of the rest of the run."""
        kept: tuple[LowRank | None, int] = site.memory.get("kept", (None, 0))
        residual, since = kept
        if residual is None or self._probe_count(*q.shape[2:]):
            return residual
        half = math.ceil(((site.steps or 0) - 1 - since) / 2)
        return residual if site.step <= since + half else None

    def _rank(self, q: Tensor, site: Site) -> int:
        """As high as the memory allows."""
        head_bytes = self.memory * 2**30 / (site.layers * q.shape[1])
        rank = affordable_rank(self._most_rank, head_bytes, q.shape[2], q.shape[3])
        if rank < min(self._most_rank, q.shape[3]):
            site.record.note = (
                f"Digest keeps a residual of rank {rank}, not {self._most_rank}: that is what {self.memory:g} GiB hold"
            )
        return rank
