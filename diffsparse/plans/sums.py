"""What an offline search adds up over its runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffsparse.errors import PlanError
from diffsparse.orders.layout import Layout
from diffsparse.site.compute import Site


class Sums:
    """What a search has added up so far: tensors on the CPU by "model.layer.what", and the video they are of."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.layout: Layout | None = None

    def add(self, site: Site, what: str, value: Tensor, shape: tuple[int, ...], at: Any = ...) -> None:
        """Add `value` to place `at` of the tensor `what` [shape] of this layer, zero at first.

        Raises:
            PlanError: the runs differ in size.
        """
        if self.layout not in (None, site.layout.grid):
            raise PlanError(f"all runs of a search want one size; got {self.layout} and {site.layout.grid}")
        self.layout = site.layout.grid
        total = self.tensors.setdefault(f"{site.model}.{site.layer}.{what}", torch.zeros(shape))
        if total.shape != shape:
            raise PlanError(f"all runs of a search want one number of steps; got {total.shape[0]} and {shape[0]}")
        total[at] += value.cpu()

    def has(self, site: Site, what: str) -> bool:
        """Whether anything of that kind was added for this layer."""
        return f"{site.model}.{site.layer}.{what}" in self.tensors

    def of(self, what: str) -> dict[str, Tensor]:
        """All tensors of that kind, by "model.layer"."""
        ending = f".{what}"
        return {name.removesuffix(ending): x for name, x in self.tensors.items() if name.endswith(ending)}
