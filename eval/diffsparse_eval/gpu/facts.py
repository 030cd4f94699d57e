"""Where this runs, and the two ceilings: bytes copied and operations of a matrix product a second."""

from __future__ import annotations

import subprocess
from contextlib import suppress

import torch

from diffsparse_eval import environment
from diffsparse_eval.gpu.stage import STAGES, Channel, Options, Stage, module_of
from diffsparse_eval.rows import Attempt
from diffsparse_eval.timing import Call, median_seconds
from diffsparse_kernels import trials
from diffsparse_kernels.machine import device_name, driver

_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
_EDGE, _BYTES = 8192, 2 * 2**30


def jobs(options: Options) -> list[str]:
    """One child."""
    return ["facts"]


def run(job: str, options: Options, channel: Channel) -> None:
    """Report what is missing, or what is there."""
    obstacle = _obstacle(options)
    if obstacle:
        return channel.missing(obstacle)
    channel.facts(
        device=device_name(options.device),
        driver=driver() if options.on_gpu else "",
        versions={**environment.versions(), "torch": torch.__version__},
        commit=environment.commit(),
        source=trials.source(),  # identifies the kernels where there is no checkout
    )
    channel.plan({stage.name: _jobs(stage, options) for stage in STAGES[1:]})
    channel.clocks(_clocks(options))
    size = max(_BYTES // options.shrink, 2**20)
    channel.attempt("copy", f"{size >> 20} MiB", lambda: _copy(size, options, channel))
    edge = max(_EDGE // options.shrink, 128)
    channel.attempt("matrix product", f"{edge}^3 bfloat16", lambda: _product(edge, options, channel))


def _jobs(stage: Stage, options: Options) -> list[str] | str:
    """The children of a stage, or why it has none, such as a missing package; the parent never opens the device."""
    try:
        return module_of(stage).jobs(options)
    except Exception as error:
        return str(error)


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


def _clocks(options: Options) -> dict[str, str]:
    """Clocks, power and temperature by nvidia-smi; read, never set."""
    if not options.on_gpu:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return dict(zip(_CLOCKS, done.stdout.strip().splitlines()[0].split(", "), strict=False))
    return {}


def _copy(size: int, options: Options, channel: Channel) -> Attempt:
    """Bytes read and written."""
    x, y = (torch.ones(size, dtype=torch.uint8, device=options.device) for _ in range(2))
    seconds = _seconds(lambda: y.copy_(x), options, channel)
    return {"ms": seconds * 1e3, "gb_per_s": 2 * size / seconds / 1e9}


def _product(edge: int, options: Options, channel: Channel) -> Attempt:
    x, y = (torch.randn(edge, edge, device=options.device).bfloat16() for _ in range(2))
    seconds = _seconds(lambda: x @ y, options, channel)
    return {"ms": seconds * 1e3, "tflops": 2 * edge**3 / seconds / 1e12}


def _seconds(call: Call, options: Options, channel: Channel) -> float:
    return median_seconds(call, options.device, 10, warm_up=3, end=channel.end)
