"""The embedded model on this device in bfloat16: PSNR of sparse to dense, beside that on the CPU in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from diffsparse_eval.gpu.stage import Channel, Options, reported
from diffsparse_eval.rows import Attempt

_SPARSITY = 0.8


def jobs(options: Options) -> list[str]:
    """The device, then the CPU to compare with."""
    return ["device", *(["cpu"] if options.on_gpu else [])]


def run(job: str, options: Options, channel: Channel) -> None:
    """PSNR of sparse videos against dense ones of the same seed."""
    measures: list[Callable[[str], Attempt]] = []

    def load() -> Attempt:
        measures.append(_measure(job, options))
        return {}

    with channel.heartbeat(60):
        channel.attempt(f"dense, {job}", "embedded model", load, again=True)
        for name in ("digest", "adaspa") if measures else ():
            channel.attempt(f"{name}, {job}", "embedded model", partial(measures[0], name))


def _measure(job: str, options: Options) -> Callable[[str], Attempt]:
    """Load the model and make its dense video."""
    from diffsparse import AdaSpa, Digest, Schedule, apply
    from diffsparse_pipelines import tiny

    real = options.on_gpu
    variant, steps, block = ("default", 15, 64) if real else ("twin", 2, 32)
    dtype, device = (torch.bfloat16, options.device) if job == "device" else (torch.float32, "cpu")
    pipe = tiny.load(variant, dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    arguments = {**tiny.defaults(variant), "num_inference_steps": steps, "output_type": "pt"}
    strategies = {"digest": Digest(_SPARSITY, block=block), "adaspa": AdaSpa(_SPARSITY, block=block)}

    def video() -> torch.Tensor:
        found = pipe(tiny.prompts(1)[0], generator=torch.Generator("cpu").manual_seed(0), **arguments)
        return torch.as_tensor(found.frames[0]).float().cpu()

    dense = video()

    def measure(name: str) -> Attempt:
        with apply(pipe, strategies[name], schedule=Schedule()) as handle:
            error = (video() - dense).square().mean().item()
            report = handle.report()
        finite = bool(dense.isfinite().all()) and math.isfinite(error)
        return {
            "verdict": "right" if finite and error < 0.05 else "wrong",
            "psnr_db": -10 * math.log10(max(error, 1e-12)),
            **reported(report),
        }

    return measure
