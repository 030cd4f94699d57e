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

_LEVELS = ("sigmas", "timesteps")
_MADE = ("frames", "videos", "images")  # what pipelines call what they make
Tensors = dict[str, Tensor]
AfterStep = Callable[["DiffusionPipeline", int, int, Tensors], Tensors]


class Generation(NamedTuple):
    """One clip or image.

    Attributes:
        frames: float32 [F, H, W, C] in [0, 1].
        latents: of the last step, if the pipeline shows them.
        seconds: wall time of the call.
        cpu_seconds: processor time of this process in it.
    """

    frames: np.ndarray
    latents: Tensor | None
    seconds: float
    cpu_seconds: float = math.nan


def parameters(pipe: DiffusionPipeline) -> dict[str, object]:
    """Arguments that a call of `pipe` takes, by name, with their defaults; None where there is none."""
    if blocks := getattr(pipe, "blocks", None):
        return {each.name: each.default for each in blocks.inputs if each.name}
    found = inspect.signature(type(pipe).__call__).parameters
    return {name: None if each.default is each.empty else each.default for name, each in found.items()}


def call_arguments(
    pipe: DiffusionPipeline, defaults: Mapping[str, object], chosen: Mapping[str, object]
) -> dict[str, object]:
    """What to call `pipe` with: defaults that it knows, overruled by what was chosen.

    An image goes to pipelines that take several, too. Steps that were chosen go without the defaults' own noise levels.

    Raises:
        ConfigError: something was chosen that this pipeline doesn't take.
    """
    known = set(parameters(pipe))
    given = {**chosen}
    if "image" in given and "image" not in known and "images" in known:
        given["images"] = [given.pop("image")]
    unknown = sorted(name for name in given if name not in known and name not in ("height", "width"))
    if unknown:
        raise ConfigError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")
    levels = _LEVELS if "num_inference_steps" in given else ()
    kept = {name: value for name, value in defaults.items() if name not in levels}
    return {name: value for name, value in {**kept, **given}.items() if name in known}


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

    Args:
        pipe: a Diffusers pipeline.
        arguments: call arguments, without the prompt.
        pairs: prompts and seeds.
        after_step: called after each step, where the pipeline takes such a function.

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
    watches = after_step and "callback_on_step_end" in parameters(pipe)
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
    name = next((name for name in _MADE if getattr(out, name, None) is not None), None)
    if name is None:  # Cosmos 3 makes one
        return [np.asarray(out.video, dtype=np.float32)]
    made = [np.asarray(sample, dtype=np.float32) for sample in getattr(out, name)]
    return [sample[None] for sample in made] if name == "images" else made
