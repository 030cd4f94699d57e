"""Real architectures with random weights, a few blocks of each: steps of each kind, and the run that follows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from diffsparse_eval.gpu.stage import Options, Row, Talk

_TRIALS = {"wan2.1-1.3b": ((81, 480, 832), 2), "hunyuan-video": ((129, 720, 1280), 1)}  # pixels, blocks
_SMALL = {"tiny-twin": ((9, 32, 32), 1)}
_STEPS = 50
_KEPT = (
    *("seconds", "speedup", "dense_seconds", "attention_speedup", "attention_share", "density", "backends"),
    *("dense_step_seconds", "search_step_seconds", "sparse_step_seconds", "fallbacks", "layers", "size"),
)


def jobs(options: Options) -> list[str]:
    """A child for each model; without a GPU, one for the smallest."""
    return list(_TRIALS if options.on_gpu else _SMALL)


def run(job: str, options: Options, talk: Talk) -> None:
    """Dense, then the strategies, each beside a dense one of its own, so that rows come one by one."""
    from diffsparse.strategies import AdaSpa, Dense, Digest

    for strategy in (Dense(), Digest(0.8), AdaSpa(0.8)):
        talk.attempt(type(strategy).__name__.lower(), job, partial(_measure, job, strategy, options, talk))


def _measure(job: str, strategy: Any, options: Options, talk: Talk) -> Row:
    from diffsparse import Schedule
    from diffsparse_eval import speed
    from diffsparse_pipelines.architectures import architecture

    size, layers = (_TRIALS | _SMALL)[job]
    built = architecture(job)
    trial = speed.Trial(
        job,
        built,
        (strategy,),
        size,
        _STEPS,
        2 if built.guided else 1,
        Schedule(),
        layers=layers,
        dtype=torch.bfloat16,
        device=options.device,
        rounds=2 if options.on_gpu else 1,
    )
    with talk.patience(80):  # it builds the model, compiles, and tries kernels first
        row = next(speed.run(trial, [strategy], talk.alive))
    return {"verdict": "timed", "kind": row["label"], **{name: row[name] for name in _KEPT}}
