"""Where one self-attention call is."""

from __future__ import annotations

from dataclasses import dataclass

from diffsparse.orders.layout import Layout
from diffsparse.site.shard import WHOLE, Shard


@dataclass(frozen=True)
class Place:
    """The place of one self-attention call in a run.

    Attributes:
        model: the transformer's name in the pipeline.
        layer: the attention module's name in the transformer.
        index: number of that module, in the order of the model's modules.
        step: denoising step, counted from 0.
        steps: length of the run in steps; None if it is unknown.
        end: first executed step after those that this transformer may run sparse; None if it is unknown, as where the
            experts of a pipeline take turns.
        branch: name of the guidance branch.
        layout: which of the N tokens lie on the grid.
        layers: how many such modules the model has.
        shard: which of all ranks' heads are this rank's H.
        skipped: earlier steps that did not reach this layer, for a step cache answered them.
        to_skip: steps to come that will not; an estimate where the cache decides as it goes.
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
    skipped: int = 0
    to_skip: int = 0

    @property
    def executed(self) -> int:
        """Number of this step among those that reach this layer, counted from 0."""
        return self.step - self.skipped

    @property
    def executed_steps(self) -> int | None:
        """How many steps of the run reach this layer; None if the run's length is unknown."""
        return None if self.steps is None else self.steps - self.skipped - self.to_skip
