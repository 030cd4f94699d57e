"""Real architectures with random weights, a few blocks of each: steps of each kind, and the run that follows."""

from __future__ import annotations

from collections.abc import Iterator

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
    """Dense, then the strategies, row by row."""
    try:
        rows = _rows(job, options)
    except ImportError as error:
        return talk.row(kernel="all", shape=job, verdict="left out", why=str(error))

    def measure() -> Row:
        row = next(rows)
        return {"verdict": "timed", "kind": row["label"], **{name: row[name] for name in _KEPT}}

    for name in ("dense", "digest", "adaspa"):
        talk.attempt(name, job, measure)


def _rows(job: str, options: Options) -> Iterator[Row]:
    from diffsparse import AdaSpa, Dense, Digest, Schedule
    from diffsparse_eval import speed
    from diffsparse_pipelines.architectures import architecture

    size, layers = (_TRIALS | _SMALL)[job]
    built = architecture(job)
    trial = speed.Trial(
        job,
        built,
        (Digest(0.8), AdaSpa(0.8)),
        size,
        _STEPS,
        2 if built.guided else 1,
        Schedule(),
        layers=layers,
        dtype=torch.bfloat16,
        device=options.device,
        rounds=2 if options.on_gpu else 1,
    )
    return speed.run(trial, [Dense(), *trial.strategies], lambda: None)
