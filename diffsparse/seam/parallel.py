"""Ranks that share one sequence: under Ulysses each has some of the heads, and their numbers are those of all ranks."""

from __future__ import annotations

import torch

from diffsparse.errors import UnsupportedModelError
from diffsparse.seam.models import ModelSpec
from diffsparse.site.shard import WHOLE, Shard


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
