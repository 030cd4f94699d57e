"""Ranks that share one sequence: under Ulysses each has some of the heads, and their numbers are those of all ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsparse.errors import UnsupportedModelError
from diffsparse.models import ModelSpec


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


def check_alone(models: dict[str, torch.nn.Module]) -> None:
    """Raise UnsupportedModelError unless this process sees all heads of the models, as offline searches must."""
    for model in models.values():
        if shard_of(model, ModelSpec(), ordered=False).degree > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} runs on several ranks, each with some of its heads; search on one process"
            )


def shard_of(model: torch.nn.Module, spec: ModelSpec, ordered: bool) -> Shard:
    """The share of the heads that this rank has.

    ordered: whether it matters which token is where.

    Raises:
        UnsupportedModelError: ring attention, or tokens that Ulysses puts in an order that isn't known here.
    """
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        return WHOLE
    name = type(model).__name__
    if config.ring_degree > 1:
        raise UnsupportedModelError(
            f"{name} runs with ring attention, where no rank sees all keys at once; wanted "
            f"ContextParallelConfig(ulysses_degree={config.ring_degree * config.ulysses_degree})"
        )
    if config.ulysses_anything:
        raise UnsupportedModelError(f"{name} runs with ulysses_anything: ranks have unlike shares; wanted equal ones")
    if ordered and spec.text != "none":
        raise UnsupportedModelError(
            f"under context parallelism the text and image tokens of {name} lie rank by rank among each other; wanted "
            "a model whose text is in cross-attention (Wan, LTX), or one process"
        )
    return Shard(config._ulysses_local_rank, config.ulysses_degree, config._ulysses_mesh.get_group())
