"""Sparse products in eight bits, of any strategy."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.site.compute import Site
from diffsparse.strategies.base import Strategy, Wrapper, as_strategy, is_attending
from diffsparse_kernels import PRECISIONS


@dataclass(frozen=True)
class Rounded(Wrapper):
    """Any block-sparse strategy with its sparse products in eight bits; on the command line `tangent+int8`.

    Summaries of dropped blocks, searches, dense steps and exact rows are not rounded, nor is a product whose plan has
    its own number of bits (`PARO`). Windows that cut through tiles (`GNA`) can't be.

    Attributes:
        strategy: whatever runs; its sparse products are rounded.
        precision: "int8" rounds queries and keys, one scale for each block, after the mean key is taken away
            (SageAttention, arXiv 2410.02367); "int8-int8" and "int8-fp8" weights and values too, "fp8" all of them to
            floating point. `block_sparse_attention` says what has a kernel; elsewhere it is emulated, with the same
            rounding and no faster than without, and the report says so ("int8 emulated").

    Raises:
        ConfigError: no such precision, or the strategy is none, or rounded already.
    """

    strategy: Strategy
    precision: str = "int8"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision wants one of {', '.join(PRECISIONS)}; got {self.precision!r:.60}")
        if not is_attending(self.strategy) or isinstance(self.strategy, Rounded):
            raise ConfigError(f"wanted a strategy that is not rounded yet; got {self.strategy!r}")
        object.__setattr__(self, "strategy", as_strategy(self.strategy))
        super().__post_init__()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The strategy's attention over q, k, v [B, H, N, D], each sparse product rounded."""
        return super().attend(q, k, v, replace(site, precision=self.precision))

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Dense attention over q, k, v [B, H, N, D]; what the strategy compares with it is rounded."""
        return super().observe(q, k, v, replace(site, precision=self.precision))
