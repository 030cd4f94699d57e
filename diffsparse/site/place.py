"""Where one self-attention call is."""

from __future__ import annotations

from dataclasses import dataclass

from diffsparse.orders.layout import Layout
from diffsparse.site.shard import WHOLE, Shard


@dataclass(frozen=True)
class Place:
    """The place of one self-attention call in a run.

    model: the transformer's name in the pipeline.
    layer: the attention module's name in the transformer.
    index: number of that module, in the order of the model's modules.
    step: denoising step, counted from 0.
    steps: length of the run in steps; None if it is unknown.
    end: first step after those that this transformer may run sparse; None if it is unknown, as where the experts of a
        pipeline take turns.
    branch: name of the guidance branch.
    layout: which of the N tokens lie on the grid.
    layers: how many such modules the model has.
    shard: which of all ranks' heads are this rank's H.
    """

    model: str
    layer: str
    index: int
    step: int
    steps: int | None
    branch: str
    layout: Layout
    end: int | None = None
    layers: int = 1
    shard: Shard = WHOLE
