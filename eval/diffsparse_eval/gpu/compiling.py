"""Every kernel that later stages launch, compiled into one cache by as many processes as there are cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from diffsparse_eval.gpu import numerics, speed
from diffsparse_eval.gpu.stage import Channel, Options
from diffsparse_eval.rows import Attempt
from diffsparse_eval.timing import Call


def jobs(options: Options) -> list[str]:
    """A child for each core; the interpreter of a CPU has nothing to compile."""
    count = (os.cpu_count() or 1) if options.on_gpu else 1
    return [f"{part}/{count}" for part in range(count)]


def run(job: str, options: Options, channel: Channel) -> None:
    """This child's part of all launches, without launching."""
    part, count = map(int, job.split("/"))
    if not options.on_gpu:
        return channel.row(kernel="all", shape=job, verdict="nothing to compile")
    wanted: list[tuple[str, str, Call]] = list(speed.launches(options))  # first, so that these are never timed cold
    wanted += [
        (kernel, shape, partial(numerics.launch, kernel, case, options))
        for kernel, shape, case in numerics.launches(options)
    ]
    with compile_only():
        for kernel, shape, call in wanted[part::count]:
            channel.attempt(kernel, shape, partial(_compiled, call))


def _compiled(call: Call) -> Attempt:
    call()
    return {"verdict": "compiled"}


@contextmanager
def compile_only() -> Iterator[None]:
    """Within this, a launch of a Triton kernel compiles it and no more."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_(self: object, *arguments: object, grid: object, warmup: bool, **options: object) -> object:
        return launch(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run = compile_
    try:
        yield
    finally:
        JITFunction.run = launch
