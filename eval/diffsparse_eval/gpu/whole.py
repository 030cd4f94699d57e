"""Real architectures with random weights, a few blocks of each: steps of each kind, and the run they add up to."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from diffsparse_eval.gpu.stage import Channel, Options
from diffsparse_eval.rows import Attempt

if TYPE_CHECKING:
    from diffsparse.strategies import Strategy

_SIZES = {"wan2.1-1.3b": ((81, 480, 832), 2), "hunyuan-video": ((129, 720, 1280), 1)}  # pixels, blocks
_SMALL = {"tiny-twin": ((9, 32, 32), 1)}
_STEPS = 50


def jobs(options: Options) -> list[str]:
    """A child for each model; without a GPU, one for the smallest."""
    return list(_SIZES if options.on_gpu else _SMALL)


def run(job: str, options: Options, channel: Channel) -> None:
    """Dense, then the strategies, each beside a dense run of its own, so that rows come one by one."""
    from diffsparse.strategies import AdaSpa, Dense, Digest

    for strategy in (Dense(), Digest(0.8), AdaSpa(0.8)):
        channel.attempt(type(strategy).__name__.lower(), job, partial(_measure, job, strategy, options, channel))


def _measure(job: str, strategy: Strategy, options: Options, channel: Channel) -> Attempt:
    from diffsparse_eval import speed
    from diffsparse_pipelines.architectures import architecture

    size, layers = (_SIZES | _SMALL)[job]
    built = architecture(job)
    test = speed.SpeedTest(
        job,
        built,
        size,
        _STEPS,
        2 if built.guided else 1,
        layers=layers,
        dtype=torch.bfloat16,
        device=options.device,
        rounds=2 if options.on_gpu else 1,
    )
    with channel.heartbeat(80):  # it builds the model, compiles, and tries kernels first
        row = next(speed.run(test, [strategy], channel.alive))
    return {
        "verdict": "timed",
        "kind": row["label"],
        "seconds": row["seconds"],
        "speedup": row["speedup"],
        "dense_seconds": row["dense_seconds"],
        "attention_speedup": row["attention_speedup"],
        "attention_share": row["attention_share"],
        "density": row["density"],
        "backends": row["backends"],
        "dense_step_seconds": row["dense_step_seconds"],
        "search_step_seconds": row["search_step_seconds"],
        "sparse_step_seconds": row["sparse_step_seconds"],
        "fallbacks": row["fallbacks"],
        "layers": row["layers"],
        "size": row["size"],
    }
