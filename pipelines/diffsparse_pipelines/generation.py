"""Generation: pipeline calls with their call arguments, seeds and progress; their raw frames and their time."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffsparse.errors import ConfigError, DiffsparseError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.utils import BaseOutput
    from rich.progress import Progress

Tensors = dict[str, Tensor]
AfterStep = Callable[["DiffusionPipeline", int, int, Tensors], Tensors]


class Generation(NamedTuple):
    """One clip or image.

    frames: float32 [F, H, W, C] in [0, 1].
    latents: of the last step, if the pipeline shows them.
    seconds: wall time of the call.
    cpu_seconds: processor time of this process in it.
    """

    frames: np.ndarray
    latents: Tensor | None
    seconds: float
    cpu_seconds: float = math.nan


def call_arguments(
    pipe: DiffusionPipeline, defaults: Mapping[str, object], chosen: Mapping[str, object]
) -> dict[str, object]:
    """What to call `pipe` with: defaults that it knows, overruled by what was chosen.

    Raises:
        ConfigError: something was chosen that this pipeline doesn't take.
    """
    known = set(inspect.signature(type(pipe).__call__).parameters)
    unknown = sorted(name for name in chosen if name not in known and name not in ("height", "width"))
    if unknown:
        raise ConfigError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")
    return {name: value for name, value in {**defaults, **chosen}.items() if name in known}


def generation(
    pipe: DiffusionPipeline, arguments: Mapping[str, object], seed: int, progress: Progress | None = None
) -> Generation:
    """Call `pipe` once with a seeded generator.

    Args:
        pipe: a Diffusers pipeline.
        arguments: call arguments, with the prompt.
        seed: of a generator on the CPU, so that every device starts from the same noise.
        progress: a running rich progress display that gets one task for this call's steps.

    Raises:
        ConfigError: the pipeline refused the arguments.
    """
    last: Tensors = {}
    task = progress.add_task("steps", total=None) if progress else None

    def after_step(_: DiffusionPipeline, step: int, __: int, tensors: Tensors) -> Tensors:
        last.update(tensors)
        if progress is not None and task is not None:
            progress.update(task, completed=step + 1, total=len(pipe.scheduler.timesteps))
        return tensors

    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        out = _call(pipe, arguments, torch.Generator().manual_seed(seed), after_step)
    finally:
        if progress is not None and task is not None:
            progress.remove_task(task)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Generation(_clips(out)[0], last.get("latents"), seconds, cpu_seconds)


def generations(
    pipe: DiffusionPipeline,
    arguments: Mapping[str, object],
    pairs: Sequence[tuple[str, int]],
    after_step: AfterStep | None = None,
) -> list[np.ndarray]:
    """Frames [F, H, W, C] for each prompt and seed, drawn in one batch by one call.

    Raises:
        ConfigError: the pipeline refused the arguments.
    """
    generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
    return _clips(_call(pipe, {**arguments, "prompt": [prompt for prompt, _ in pairs]}, generators, after_step))


def _call(
    pipe: DiffusionPipeline,
    arguments: Mapping[str, object],
    generator: torch.Generator | list[torch.Generator],
    after_step: AfterStep | None,
) -> BaseOutput:
    watches = after_step and "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    watched = {"callback_on_step_end": after_step} if watches else {}
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(**arguments, **watched, generator=generator, output_type="np")
    except DiffsparseError:
        raise
    except (ValueError, IndexError) as error:  # a step cache indexes what another kind of guidance would have brought
        raise ConfigError(f"{type(pipe).__name__} refused the call: {error}") from error


def _clips(out: BaseOutput) -> list[np.ndarray]:
    """Frames [F, H, W, C] of each sample; an image has one frame."""
    if hasattr(out, "frames"):
        return [np.asarray(frames, dtype=np.float32) for frames in out.frames]
    return [np.asarray(image, dtype=np.float32)[None] for image in out.images]
