"""The record of one self-attention call: dense or sparse, why, how much was computed, and in what time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from diffsparse.site.timing import Mark, elapsed, mark, passed

Kind = Literal["dense", "search", "sparse"]

PLANNED = "schedule"


@dataclass
class CallRecord:
    """One self-attention call.

    Attributes:
        layer: name of the attention module.
        step: denoising step, 0-based.
        branch: guidance branch.
        kind: "dense" ran on the user's backend, "search" dense on our kernels, "sparse" over some blocks.
        density: share of attention computed; it may still live on the device.
        reason: why a dense call was dense.
        planned: whether that was meant to be; other dense calls are fall-backs.
        backend: what computed it.
        recall: mean softmax mass of the chosen blocks, where blocks were chosen.
        heads: what each head did, by name, where a strategy chooses by head.
        note: what else the user should know; equal notes are shown once.
        passed_over: back ends of this device that come before those that ran, and why they didn't run.
        beside: computed beside `density`, in dense calls: mass passes, and products that were only compared.
    """

    layer: str
    step: int
    branch: str
    kind: Kind = "dense"
    density: float | torch.Tensor = 1.0
    reason: str = PLANNED
    planned: bool = True
    backend: str = "native"
    recall: torch.Tensor | None = None
    heads: tuple[str, ...] = ()
    note: str = ""
    passed_over: tuple[str, ...] = ()
    beside: float | torch.Tensor = 0.0
    _marks: list[Mark] = field(default_factory=list, repr=False)
    _seconds: float = field(default=0.0, repr=False)

    def ran_dense(self, reason: str, *, planned: bool, backend: str, kind: Kind = "dense") -> None:
        """Note a dense call; one of kind "search" ran on our kernels, others on the user's backend."""
        self.kind, self.density = kind, 1.0
        self.reason, self.planned, self.backend = reason, planned, backend

    def ran_sparse(self, density: float | torch.Tensor, backend: str, passed_over: tuple[str, ...] = ()) -> None:
        """Note a block-sparse call, of our kernels or of your own; `density` may still live on the device."""
        self.kind, self.density, self.reason, self.backend = "sparse", density, "", backend
        self.passed_over += passed_over

    def searched(self, recall: torch.Tensor) -> None:
        """Note that this call chose blocks; `recall` is their share of the softmax mass."""
        self.recall = recall.detach().mean()

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Time the call: with events on a CUDA device (no sync), else with the wall clock."""
        self._marks = [mark(device)]
        try:
            yield
        except BaseException:
            self.reason, self.planned = "cut off", False
            raise
        self._marks.append(mark(device))

    @property
    def work(self) -> float:
        """All that was computed, in dense calls; waits for the device where it must."""
        return float(self.density) + float(self.beside)

    @property
    def seconds(self) -> float:
        """Seconds of the call; waits for the device where it must."""
        return elapsed(*self._marks) if len(self._marks) == 2 else self._seconds

    def settle(self) -> bool:
        """Keep the seconds in place of the events that tell them; False if the device has not come so far."""
        if len(self._marks) == 2:
            if not passed(self._marks[1]):
                return False
            self._seconds, self._marks = elapsed(*self._marks), []
        return True
