"""What an offline search adds up over its runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import EllipsisType

import torch
from torch import Tensor

from diffsparse.errors import PlanError
from diffsparse.orders.layout import Layout

Index = EllipsisType | int | Tensor | tuple[int | slice | Tensor, ...]


@dataclass
class Sums:
    """What a search has added up so far.

    Attributes:
        tensors: on the CPU, by "model.layer.what".
        layout: of the video tokens; None before anything is added.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layout: Layout | None = None

    def layer(self, model: str, layer: str, layout: Layout) -> LayerSums:
        """The sums of one attention layer, over tokens in this layout."""
        return LayerSums(self, f"{model}.{layer}", layout.grid)

    def of(self, what: str) -> dict[str, Tensor]:
        """All tensors of that kind, by "model.layer"."""
        ending = f".{what}"
        return {name.removesuffix(ending): x for name, x in self.tensors.items() if name.endswith(ending)}


@dataclass(frozen=True)
class LayerSums:
    """The sums of one attention layer, `name` being "model.layer"."""

    sums: Sums
    name: str
    grid: Layout

    def add(self, what: str, value: Tensor, shape: tuple[int, ...], at: Index = ...) -> None:
        """Add `value` at `at` to the tensor `what` [shape] of this layer, which starts as zeros.

        Raises:
            PlanError: the runs differ in size, or in their number of steps.
        """
        if self.sums.layout not in (None, self.grid):
            raise PlanError(f"all runs of a search want one size; got {self.sums.layout} and {self.grid}")
        self.sums.layout = self.grid
        total = self.sums.tensors.setdefault(f"{self.name}.{what}", torch.zeros(shape))
        if total.shape != shape:
            raise PlanError(f"all runs of a search want one number of steps; got {total.shape[0]} and {shape[0]}")
        total[at] += value.cpu()

    def has(self, what: str) -> bool:
        """Whether anything of that kind was added for this layer."""
        return f"{self.name}.{what}" in self.sums.tensors

    def get(self, what: str) -> Tensor:
        """The tensor of that kind; KeyError if nothing was added."""
        return self.sums.tensors[f"{self.name}.{what}"]
