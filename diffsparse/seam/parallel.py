"""Models whose sequence is split over ranks: under Ulysses each rank computes some of the heads."""

from __future__ import annotations

from torch.nn import Module

from diffsparse.errors import UnsupportedModelError
from diffsparse.seam.models import ModelSpec
from diffsparse.site.shard import WHOLE, Shard
from diffsparse.wrappers import class_of


def check_alone(models: dict[str, Module]) -> None:
    """Raise UnsupportedModelError unless this process sees all heads of the models, as offline searches must."""
    for model in models.values():
        if shard_of(model, ModelSpec(), ordered=False).degree > 1:
            raise UnsupportedModelError(
                f"{class_of(model).__name__} runs on several ranks, each with some of its heads; search on one process"
            )


def shard_of(model: Module, spec: ModelSpec, ordered: bool) -> Shard:
    """The share of the heads that this rank has.

    Args:
        model: the transformer.
        spec: of its class.
        ordered: whether the order of the tokens matters.

    Raises:
        UnsupportedModelError: ring attention, or tokens that Ulysses puts in an order that isn't known here.
    """
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        return WHOLE
    name = class_of(model).__name__
    if config.ring_degree > 1:
        raise UnsupportedModelError(
            f"{name} runs with ring attention, where no rank sees all keys at once; wanted "
            f"ContextParallelConfig(ulysses_degree={config.ring_degree * config.ulysses_degree})"
        )
    if config.ulysses_anything:
        raise UnsupportedModelError(
            f"{name} runs with ulysses_anything: ranks have shares of different sizes; wanted equal ones"
        )
    if ordered and spec.text != "none":
        raise UnsupportedModelError(
            f"under context parallelism the text and image tokens of {name} alternate, rank by rank; wanted a model "
            "whose text is in cross-attention (Wan, LTX), or one process"
        )
    return Shard(config._ulysses_local_rank, config.ulysses_degree, config._ulysses_mesh.get_group())
