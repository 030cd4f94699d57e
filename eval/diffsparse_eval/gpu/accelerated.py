"""`accelerate` on a real architecture with random weights, all blocks of it: a whole run, and the cache alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from diffsparse_eval.gpu.stage import Channel, Options, reported
from diffsparse_eval.rows import Attempt
from diffsparse_eval.timing import seconds_of

if TYPE_CHECKING:
    from diffusers import WanPipeline

    from diffsparse import Handle

_MODEL, _SIZE, _STEPS = "wan2.1-1.3b", (81, 480, 832), 20  # pixels
_SMALL, _SMALL_SIZE, _FEW_STEPS = "tiny-twin", (9, 32, 32), 10


def jobs(options: Options) -> list[str]:
    """One model; without a GPU the smallest."""
    return [_MODEL if options.on_gpu else _SMALL]


def run(job: str, options: Options, channel: Channel) -> None:
    """Dense, then each speed, with sparse attention and without, since what a cache leaves is dense then."""
    from diffsparse import Dense, accelerate
    from diffsparse.seam.accelerate import SPEEDS

    with channel.heartbeat(120):  # it builds the model, compiles, and tries kernels first
        pipe = _pipeline(job, options.device)
        dense = channel.attempt("dense", job, partial(_measure, pipe, options, nullcontext), again=True)
        for speed in reversed(SPEEDS):
            for kernel, strategy in ((speed, None), (f"{speed}, cache alone", Dense())):
                on = partial(accelerate, pipe, speed, strategy=strategy)
                channel.attempt(kernel, job, partial(_measure, pipe, options, on, dense.get("seconds", 0.0)))


def _pipeline(job: str, device: str) -> WanPipeline:
    """A pipeline of the transformer alone."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    from diffsparse_pipelines.architectures import architecture

    model: Any = architecture(job).build(dtype=torch.bfloat16, device=device)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = WanPipeline(**parts, transformer=model, scheduler=UniPCMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _measure(pipe: WanPipeline, options: Options, on: Any, dense: float | None = None) -> Attempt:
    """The second of two runs: the first compiles."""
    context: AbstractContextManager[Handle | None] = on()
    with context as handle:
        _generate(pipe, options)
        seconds = seconds_of(partial(_generate, pipe, options), options.device)
        report = None if handle is None else handle.report()
    found: Attempt = {"verdict": "timed", "seconds": seconds, "speedup": (dense or seconds) / seconds}
    return found if report is None else {**found, "executed": report.executed, **reported(report)}


@torch.inference_mode()
def _generate(pipe: WanPipeline, options: Options) -> None:
    frames, height, width = _SIZE if options.on_gpu else _SMALL_SIZE
    prompt = torch.zeros(1, 512, pipe.transformer.config.text_dim, dtype=torch.bfloat16, device=options.device)
    pipe(
        prompt_embeds=prompt,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=_STEPS if options.on_gpu else _FEW_STEPS,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
