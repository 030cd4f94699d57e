"""Ranks that share one sequence: under Ulysses each has some of the heads, and numbers are those of all ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shard(NamedTuple):
    """The `rank`-th of `degree` equal shares of the heads; `group` is the ranks that hold them all."""

    rank: int = 0
    degree: int = 1
    group: Any = None

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """Of something about all heads, which lie along `dim`, what is about this rank's."""
        return x if self.degree == 1 else x.chunk(self.degree, dim)[self.rank]

    def all_heads(self, x: Tensor, dim: int = 1) -> Tensor:
        """Of something about this rank's heads, along `dim`, the same about all; every rank must ask for it."""
        if self.degree == 1:
            return x
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.degree)]
        torch.distributed.all_gather(found, x.contiguous(), group=self.group)
        return torch.cat(found, dim)

    def own_numbers(self, heads: tuple[int, ...], local: int) -> tuple[int, ...]:
        """Which of this rank's `local` heads the `heads` are, that are counted over all ranks."""
        first = self.rank * local
        return tuple(head - first for head in heads if first <= head < first + local)


WHOLE = Shard()
