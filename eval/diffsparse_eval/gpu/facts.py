"""Where this runs, and the two ceilings: bytes copied and operations of a matrix product a second."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Any

import torch

from diffsparse_eval import environment
from diffsparse_eval.gpu.stage import STAGES, Options, Row, Stage, Talk, module_of
from diffsparse_eval.timing import in_turns
from diffsparse_kernels import trials
from diffsparse_kernels.machine import device_name, driver

_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
_EDGE, _BYTES = 8192, 2 * 2**30


def jobs(options: Options) -> list[str]:
    """One child."""
    return ["facts"]


def run(job: str, options: Options, talk: Talk) -> None:
    """Say what is missing, or what is there."""
    obstacle = _obstacle(options)
    if obstacle:
        return talk.missing(obstacle)
    talk.facts(
        device=device_name(options.device),
        driver=driver() if options.on_gpu else "",
        versions={**environment.versions(), "torch": torch.__version__},
        commit=environment.commit(),
        source=trials.source(),  # says which kernels these were where there is no checkout to ask
    )
    talk.plan({stage.name: _jobs(stage, options) for stage in STAGES[1:]})
    talk.row(kernel="clocks", shape="as they are", verdict="done", **_clocks(options))
    size = max(_BYTES // options.shrink, 2**20)
    talk.attempt("copy", f"{size >> 20} MiB", lambda: _copy(size, options, talk))
    edge = max(_EDGE // options.shrink, 128)
    talk.attempt("matrix product", f"{edge}^3 bfloat16", lambda: _product(edge, options, talk))


def _jobs(stage: Stage, options: Options) -> list[str] | str:
    """Asked here, for the parent never looks at the device; or why there are none: a package that is missing, say."""
    try:
        found: list[str] = module_of(stage).jobs(options)
    except Exception as error:
        return str(error)
    return found


def _obstacle(options: Options) -> str:
    if not options.on_gpu:
        return ""
    if not torch.cuda.is_available():
        built = "with CUDA" if torch.version.cuda else "without CUDA"
        return f"a CUDA device: torch {torch.__version__} is built {built}, and sees none"
    with suppress(ImportError):
        import triton  # noqa: F401

        return ""
    return "Triton, which makes the kernels: pip install triton"


def _clocks(options: Options) -> Row:
    """Read, never set."""
    if not options.on_gpu:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return dict(zip(_CLOCKS, done.stdout.strip().splitlines()[0].split(", "), strict=False))
    return {}


def _copy(size: int, options: Options, talk: Talk) -> Row:
    """Bytes read and written."""
    x, y = (torch.ones(size, dtype=torch.uint8, device=options.device) for _ in range(2))
    seconds = _median(lambda: y.copy_(x), options, talk)
    return {"ms": seconds * 1e3, "gb_per_s": 2 * size / seconds / 1e9}


def _product(edge: int, options: Options, talk: Talk) -> Row:
    x, y = (torch.randn(edge, edge, device=options.device).bfloat16() for _ in range(2))
    seconds = _median(lambda: x @ y, options, talk)
    return {"ms": seconds * 1e3, "tflops": 2 * edge**3 / seconds / 1e12}


def _median(call: Any, options: Options, talk: Talk) -> float:
    for _ in range(3):
        call()
    return in_turns({"": [call]}, 10, options.device, talk.end)[""]
