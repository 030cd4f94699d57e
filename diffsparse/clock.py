"""Which denoising step is it? Read from the pipeline, never written to it, and without a device sync."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Moment(NamedTuple):
    """One instant of a pipeline call: `run` counts pipeline calls, `steps` is None where nobody knows it."""

    run: int
    step: int
    steps: int | None
    branch: str


@dataclass(frozen=True)
class _Reading:
    step: int | None
    steps: int | None


class Clock:
    """Reads step, run and guidance branch for one transformer.

    The step comes from the first source that answers:
    1. `cache_context(name, step_index=...)`, which some pipelines and any hand-written loop may fill;
    2. `scheduler.step_index` (or `begin_index` ahead of the first step);
    3. the storage offset of `pipe._current_timestep`, a view of `scheduler.timesteps`, for schedulers without
       `step_index`: right even where a step cache skipped whole steps;
    4. the number of earlier forward passes in the same branch (bare transformers, pipelines that step copies
       of their scheduler).
    Values of timesteps are never compared: some schedulers repeat them, and reading them waits for the device.

    A new pipeline call is noticed by `scheduler.timesteps`, a fresh tensor for each `set_timesteps`. The branch is
    the name of the `cache_context`, or else `#0`, `#1`, ... by the order of forward passes within a step.
    """

    def __init__(self, pipe: Any, context: Callable[[], Any]) -> None:
        # Weak, so that a copied or forgotten pipeline is not kept alive by its transformer.
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._context = context
        self._timesteps: Any = None
        self._timestep: Any = None
        self._run = 0
        self.passes = 0  # forward passes that attended, over all runs
        self.reset()

    def reset(self) -> None:
        """Forget the current run: the next reading begins a new one."""
        self._run += 1
        self._forwards: Counter[str] = Counter()
        self._ordinal, self._ordinal_step = -1, -1
        self._counted_step = -1
        self._seen: set[object] = set()
        self._moment: Moment | None = None

    @property
    def now(self) -> Moment | None:
        """The moment of the latest pass that attended; None ahead of the first of a run."""
        return self._moment

    def read(self, layer: object, number: int = 0) -> Moment:
        """The moment at which `layer` runs; a layer that comes round again means a new forward pass.

        `number` counts the attention products within one processor call: only the first can begin a pass.
        """
        self._notice_new_call()
        if self._moment is None or (number == 0 and layer in self._seen):
            self._seen.clear()
            self._moment = self._next_forward()
        self._seen.add(layer)
        return self._moment

    def _notice_new_call(self) -> None:
        timesteps = getattr(self._scheduler(), "timesteps", None)
        if timesteps is not self._timesteps:
            self._timesteps = timesteps
            self.reset()

    def _next_forward(self) -> Moment:
        name = self._context_name()
        reading = self._reading()
        step = self._forwards[name or ""] if reading.step is None else reading.step
        if name is None and reading.step is not None:
            self._ordinal = self._ordinal + 1 if step == self._ordinal_step else 0
            self._ordinal_step = step
        branch = name if name is not None else f"#{max(self._ordinal, 0)}"
        self._forwards[name or ""] += 1
        self.passes += 1
        return Moment(self._run, step, reading.steps, branch)

    def _reading(self) -> _Reading:
        scheduler, context = self._scheduler(), self._context()
        steps = None if self._timesteps is None else len(self._timesteps)
        if getattr(context, "step_index", None) is not None:
            return _Reading(context.step_index, context.num_inference_steps or steps)
        if scheduler is None:
            return _Reading(None, None)
        if not hasattr(scheduler, "step_index"):
            return _Reading(self._step_of_timestep(), steps)
        if scheduler.step_index is not None:
            return _Reading(scheduler.step_index, steps)
        return _Reading(self._step_before_first(scheduler), steps)

    def _step_before_first(self, scheduler: Any) -> int | None:
        """Step 0 (or `begin_index`) until `step` was called; None once passes show that it never will be."""
        passes = self._forwards[self._context_name() or ""]
        named_again = self._context_name() is not None and passes > 0
        return None if named_again else (getattr(scheduler, "begin_index", None) or 0)

    def _step_of_timestep(self) -> int:
        timesteps, timestep = self._timesteps, getattr(self._pipe(), "_current_timestep", None)
        if timestep is self._timestep and self._counted_step >= 0:
            return self._counted_step
        self._timestep = timestep
        position = _position(timestep, timesteps)
        self._counted_step = self._counted_step + 1 if position is None else position
        return self._counted_step

    @property
    def pipe(self) -> Any:
        """The pipeline that is read, if there is one and it is still alive."""
        return self._pipe()

    def _scheduler(self) -> Any:
        return getattr(self._pipe(), "scheduler", None)

    def _context_name(self) -> str | None:
        context = self._context()
        return None if context is None else str(getattr(context, "name", context))


def _position(timestep: Any, timesteps: Any) -> int | None:
    """Index of `timestep` in `timesteps`, told by where it is stored; None if it is no view of it."""
    if not (torch.is_tensor(timestep) and torch.is_tensor(timesteps)):
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - timesteps.storage_offset()) // max(timesteps.stride(0), 1)
