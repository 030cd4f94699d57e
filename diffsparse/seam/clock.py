"""The denoising step of a forward pass: read from the pipeline, never written to it, and without a device sync."""

from __future__ import annotations

import sys
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from diffusers.hooks import hooks
from diffusers.hooks.hooks import StateManager
from torch import Tensor

if TYPE_CHECKING:
    from types import FrameType

    from diffusers import DiffusionPipeline

T = TypeVar("T")

MOST_SHAPES = 8  # of passes that are counted because their step is unknown: how many are remembered at a time
UNNAMED = "#"  # begins the name of a branch that has none
_MOST_AT_ONCE = 4  # passes of one branch that a step may have
_INNER = ("diffsparse.", "torch.", "diffusers.models.", "diffusers.hooks.", "accelerate.", "peft.")


class Moment(NamedTuple):
    """When a forward pass happens.

    Attributes:
        run: number of the run.
        step: denoising step, counted from the first of the run.
        steps: number of steps of the run; None if unknown.
        branch: guidance branch.
    """

    run: int
    step: int
    steps: int | None
    branch: str


class Ahead(NamedTuple):
    """What is known of a forward pass before it attends.

    Attributes:
        steps: of its run; None if unknown.
        is_first: it is the first of a run.
        branch: its guidance branch, where the pipeline names none: by its number in the step, or empty if that is
            unknown; None where one is named.
    """

    steps: int | None
    is_first: bool
    branch: str | None


def set_context(model: torch.nn.Module, context: object) -> None:
    """Give every step cache the context, as `cache_context` does; the way differs between Diffusers' releases."""
    registry = hooks.HookRegistry.check_if_exists_or_initialize(model)
    if hasattr(registry, "_set_context"):  # until 0.41
        registry._set_context(context)
    else:
        hooks._set_cache_context(model, context)


class Context(StateManager):  # type: ignore[misc]
    """The pipeline's `cache_context`: a name in Diffusers 0.40, a record with a name and more later."""

    def __init__(self) -> None:
        super().__init__(dict)
        self.current: object = None

    def set_context(self, context: object) -> None:
        """Called by Diffusers when a context is entered, and with None when it is left."""
        self.current = context

    @property
    def name(self) -> str | None:
        """Its name, without what the guiders of modular pipelines put before it; None outside of any context."""
        return None if self.current is None else str(getattr(self.current, "name", self.current)).removeprefix("pred_")


def calling_pipeline() -> DiffusionPipeline | None:
    """The pipeline that is running on this thread, found on the stack; None in a hand-written loop.

    Pipelines may share a transformer, and nothing else says which of them calls it: a transformer has no reference to
    its pipelines, and a registry of them would have to patch Diffusers. A pipeline is any object with a noise scheduler
    and a method that is running. Frames of models and hooks are skipped: reading the variables of a frame keeps them
    alive until it ends (before Python 3.13).
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        inner = str(frame.f_globals.get("__name__")).startswith(_INNER)
        if not inner and code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if hasattr(getattr(owner, "__dict__", {}).get("scheduler"), "timesteps"):
                return owner
        frame = frame.f_back
    return None


class Clock:
    """Reads step, run and guidance branch for one transformer.

    The scheduler is that of the calling pipeline (see `calling_pipeline`), or else that of the pipeline given to
    `apply`, if it has been set, has not run out, and does not remain from an earlier call of the pipeline.

    The step comes from the first source that has it:
    1. `cache_context(name, step_index=...)`, which some pipelines and any hand-written loop may fill;
    2. `scheduler.step_index`;
    3. the storage offset of the calling pipeline's `_current_timestep`, a view of `scheduler.timesteps` or a row of a
       matrix (diffusion forcing): right even where a step cache skipped whole steps;
    4. step 0, ahead of the scheduler's first step;
    5. the number of earlier forward passes in the same branch with a sequence of the same shape (transformers without
       a pipeline, pipelines that step copies of their scheduler).
    Values of timesteps are never compared: some schedulers repeat them, and reading them waits for the device.

    Steps count from where the run begins: `scheduler.begin_index`, or else what the pipeline's `_num_timesteps` leaves
    of the schedule, or the first position that was read.

    A new run shows in another pipeline, in `scheduler.timesteps`, a fresh tensor for each `set_timesteps`, and in a
    step that goes back. The branch is the name of the `cache_context`, or what the guider of a modular pipeline counts,
    or else `#0`, `#1`, ... by the order of forward passes within a step.
    """

    def __init__(self, pipe: DiffusionPipeline | None, context: Context) -> None:
        # Weak, so that a copied or forgotten pipeline is not kept alive by its transformer.
        self._given: Callable[[], DiffusionPipeline | None] = _weak(pipe)
        self._caller: Callable[[], DiffusionPipeline | None] = _weak(None)
        self._context = context
        self._timesteps: Tensor | None = None
        self._stale: Tensor | None = None  # timesteps of a call that is over, or of a loop that has left the scheduler
        self._run = 0
        self.passes = 0  # forward passes that attended, over all runs
        self._unnamed = 0  # number of the latest pass in its step, in branches that nobody names
        self._unnamed_stamps: tuple[object, ...] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the current run: the next reading begins a new one."""
        self._run += 1
        self._counts: OrderedDict[tuple[str, Hashable], int] = OrderedDict()
        self._at_step: Counter[str | None] = Counter()  # passes of the present step, by name
        self._begin: int | None = None
        self._was_read = False  # whether the step of the latest pass was read, not counted
        self._seen: set[object] = set()
        self._stamps: tuple[object, ...] = ()
        self._moment: Moment | None = None

    @property
    def now(self) -> Moment | None:
        """The moment of the latest pass that attended; None ahead of the first of a run."""
        return self._moment

    def ahead(self) -> Ahead:
        """What is known of a forward pass before it attends."""
        caller = calling_pipeline()
        timesteps, context = self._live_timesteps(), self._context
        given: int | None = getattr(context.current, "num_inference_steps", None)
        left = getattr(caller, "_num_timesteps", None)
        known = left if isinstance(left, int) and left > 0 else None if timesteps is None else len(timesteps)
        first = caller is not self._caller() or timesteps is not self._timesteps or self._goes_back()
        if context.name is not None and not context.name.startswith(UNNAMED):
            return Ahead(given or known, first, None)
        stamps, before = self._read_stamps()[:-1], self._unnamed_stamps
        again = before is not None and not _differ(stamps, before)
        self._unnamed, self._unnamed_stamps = (self._unnamed + 1 if again and not first else 0), stamps
        return Ahead(given or known, first, "" if timesteps is None else f"{UNNAMED}{self._unnamed}")

    def _goes_back(self) -> bool:
        """Whether the step is an earlier one than that of the latest pass."""
        given = getattr(self._context.current, "step_index", None)
        step = self._position()[0] if given is None else given + (self._begin or 0)
        return step is not None and self._moment is not None and step < self._moment.step + (self._begin or 0)

    @property
    def timesteps(self) -> tuple[float, ...] | None:
        """Of the run's steps; None if unknown. Waits for the device where they are on one: once a run is enough."""
        if self._timesteps is None or self._timesteps.ndim != 1 or self._begin is None:
            return None
        return tuple(map(float, self._timesteps.tolist()[self._begin :]))

    @property
    def pipe(self) -> DiffusionPipeline | None:
        """The calling pipeline, or else the one that was given, if it is still alive."""
        return calling_pipeline() or self._given()

    def read(self, layer: object, number: int = 0, shape: Hashable = None) -> Moment:
        """The moment at which `layer` runs; a layer that runs again means a new forward pass.

        Args:
            layer: identifies the layer.
            number: of the attention product within one processor call; only the first can begin a pass.
            shape: of the sequence: passes over different shapes are counted apart.
        """
        again = number == 0 and layer in self._seen
        if self._moment is None or again or _differ(self._stamps, self._read_stamps()):
            self._moment = self._next_pass(shape)
        self._seen.add(layer)
        return self._moment

    def _read_stamps(self) -> tuple[object, ...]:
        """What can't change within a pass."""
        pipe, context = self._pipe(), self._context.current
        scheduler = getattr(pipe, "scheduler", None)
        stamps = (getattr(scheduler, name, None) for name in ("timesteps", "step_index"))
        return (scheduler, *stamps, getattr(pipe, "_current_timestep", None), context)

    def _next_pass(self, shape: Hashable) -> Moment:
        self._notice_new_call()
        step, steps = self._reading(shape)
        if self._is_new_run(step):
            self.reset()
            step, steps = self._reading(shape)
        self._seen.clear()
        self._stamps, self._was_read = self._read_stamps(), step is not None
        self.passes += 1
        count, name = self._count(shape), self._context.name
        step = count if step is None else step
        if self._moment is None or step != self._moment.step:
            self._at_step.clear()
        branch = name or self._guided() or f"{UNNAMED}{self._at_step[None] if self._was_read else 0}"
        self._at_step[name] += 1
        return Moment(self._run, step, steps if steps is None or step < steps else None, branch)

    def _guided(self) -> str | None:
        """The branch for which the guider of a modular pipeline has prepared the model; None if there is no such.

        It counts the passes of each step. What it counted last may be of an earlier schedule.
        """
        guider = getattr(self._caller(), "guider", None)
        count, timestep = (getattr(guider, name, 0) for name in ("_count_prepared", "_timestep"))
        if not _share(timestep, self._timesteps):
            return None
        has_uncond = getattr(guider, "_is_cfg_enabled", lambda: True)()
        return "cond" if count == 1 else "uncond" if count == 2 and has_uncond else None

    def _is_new_run(self, step: int | None) -> bool:
        """Whether the step went back, or a loop has left the scheduler, which stands still."""
        if step is None or self._moment is None or not self._was_read:
            return False
        still = step == self._moment.step and self._at_step[self._context.name] >= _MOST_AT_ONCE
        if still and self._caller() is None and getattr(self._context.current, "step_index", None) is None:
            self._stale, self._timesteps = self._timesteps, None
            return True
        return step < self._moment.step

    def _notice_new_call(self) -> None:
        caller, before = calling_pipeline(), self._caller()
        if caller is not before:
            self._caller = _weak(caller)
            self._stale = self._timesteps if caller is None else None
        timesteps = self._live_timesteps()
        if caller is not before or timesteps is not self._timesteps:
            self._timesteps = timesteps
            self.reset()

    def _live_timesteps(self) -> Tensor | None:
        """The schedule that is being run; None if there is none."""
        scheduler = getattr(self._pipe(), "scheduler", None)
        timesteps: Tensor | None = getattr(scheduler, "timesteps", None)
        if timesteps is None or timesteps is self._stale:
            return None
        stepped, custom = getattr(scheduler, "step_index", None), getattr(scheduler, "custom_timesteps", False)
        if stepped is None:
            was_set = custom or getattr(scheduler, "num_inference_steps", None) is not None
            return timesteps if was_set else None
        return timesteps if stepped < len(timesteps) else None

    def _count(self, shape: Hashable) -> int:
        """Number of earlier passes of this branch and shape; bounded, for a server's loop has no end."""
        key = self._context.name or "", shape
        count = self._counts.pop(key, 0)
        self._counts[key] = count + 1
        if len(self._counts) > MOST_SHAPES:
            self._counts.popitem(last=False)
        return count

    def _reading(self, shape: Hashable) -> tuple[int | None, int | None]:
        """Step and number of steps; None where unknown."""
        context, (index, length) = self._context.current, self._position()
        steps = None if length is None else length - self._begin_of(index, length)
        given: int | None = getattr(context, "step_index", None)
        if given is not None:
            return given, getattr(context, "num_inference_steps", None) or steps
        if length is None:
            return None, None
        if index is None:
            return (0 if self._may_be_first(shape) else None), steps
        return index - self._begin_of(index, length), steps

    def _position(self) -> tuple[int | None, int | None]:
        """Index of the step in its schedule, of which a run may skip the start, and the schedule's length."""
        if self._timesteps is None:
            return None, None
        index = getattr(getattr(self._pipe(), "scheduler", None), "step_index", None)
        if index is not None:
            return index, len(self._timesteps)
        place = _place(getattr(self._caller(), "_current_timestep", None), self._timesteps)
        return place or (None, len(self._timesteps))

    def _begin_of(self, index: int | None, length: int) -> int:
        """Index at which this run begins."""
        if self._begin is not None:
            return self._begin
        scheduler, left = getattr(self._pipe(), "scheduler", None), getattr(self._caller(), "_num_timesteps", None)
        begin: int | None = getattr(scheduler, "begin_index", None)
        if begin is None and isinstance(left, int) and 0 < left <= length:
            begin = length - left
        if index is None:
            return begin or 0
        if begin is None and getattr(scheduler, "step_index", None) is None:
            begin = index
        elif begin is None:  # `step_index` is set after the first step of a run; or the start of this run was not seen
            begin = index - 1 if self._counts else 0
        self._begin = max(min(begin, index), 0)
        return self._begin

    def _may_be_first(self, shape: Hashable) -> bool:
        """Whether a scheduler that has not stepped yet is at its first step, or only copies of it are stepped."""
        name = self._context.name
        most = _MOST_AT_ONCE if name is None else 1
        counts_steps = hasattr(getattr(self._pipe(), "scheduler", None), "step_index")
        return counts_steps and self._counts.get((name or "", shape), 0) < most

    def _pipe(self) -> DiffusionPipeline | None:
        return self._caller() or self._given()


def _weak(x: T | None) -> Callable[[], T | None]:
    """A weak reference, to None too."""
    return (lambda: None) if x is None else weakref.ref(x)


def _differ(before: tuple[object, ...], after: tuple[object, ...]) -> bool:
    return any(a is not b for a, b in zip(before, after, strict=True))


def _share(a: object, b: object) -> bool:
    """Whether both are tensors of one storage."""
    if not (torch.is_tensor(a) and torch.is_tensor(b)):
        return False
    return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())


def _place(timestep: object, timesteps: object) -> tuple[int, int] | None:
    """Index of `timestep` among those of its storage and their number; None if its storage holds no other."""
    if not (torch.is_tensor(timestep) and torch.is_tensor(timesteps)):
        return None
    storage = timestep.untyped_storage()
    if _share(timestep, timesteps):
        offset = timestep.storage_offset() - timesteps.storage_offset()
        return offset // max(timesteps.stride(0), 1), len(timesteps)
    rows = storage.nbytes() // max(timestep.numel() * timestep.itemsize, 1)
    if rows < 2 or not timestep.is_contiguous():
        return None
    return timestep.storage_offset() // timestep.numel(), rows
