"""Why a kernel is wrong: the first failing case under `compute-sanitizer`, if that is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial

from diffsparse_eval.gpu.stage import Channel, Options
from diffsparse_eval.rows import Attempt

_TOOLS = ("memcheck", "racecheck")


def jobs(options: Options) -> list[str]:
    """One child; `account` adds which kernels failed."""
    return [""]


def run(job: str, options: Options, channel: Channel) -> None:
    """Run one case under each tool.

    Args:
        job: kernel and the words of the case that failed, separated by bars; empty if none failed.
    """
    if not job:
        return channel.row(kernel="all", shape="", verdict="nothing failed")
    if shutil.which("compute-sanitizer") is None:
        return channel.row(kernel="all", shape="", verdict="left out", why="compute-sanitizer is not installed")
    kernel, *words = job.split("|")
    for tool in _TOOLS:
        command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "diffsparse_kernels.backend.selftest"]
        command += [options.device, kernel, *words]
        with channel.heartbeat(channel.left):
            channel.attempt(f"{kernel}, {tool}", " ".join(words), partial(_run, command, channel))


def _run(command: list[str], channel: Channel) -> Attempt:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(channel.left - 2, 1), check=False)
    except subprocess.TimeoutExpired:
        return {"verdict": "no time"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    return {"verdict": "told", "why": " / ".join(lines[1:6] or lines[-1:])[:600]}
