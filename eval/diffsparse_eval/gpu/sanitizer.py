"""Why a kernel is wrong: the smallest failing case under `compute-sanitizer`, if that is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial

from diffsparse_eval.gpu.stage import Options, Row, Talk

_TOOLS = ("memcheck", "racecheck")


def jobs(options: Options) -> list[str]:
    """One child; which kernels failed, `account` adds."""
    return [""]


def run(job: str, options: Options, talk: Talk) -> None:
    """job: what failed, as `proof` wants it: kernel and the words of its case, separated by bars; empty if nothing."""
    if not job:
        return talk.row(kernel="all", shape="", verdict="nothing failed")
    if shutil.which("compute-sanitizer") is None:
        return talk.row(kernel="all", shape="", verdict="left out", why="compute-sanitizer is not installed")
    kernel, *words = job.split("|")
    for tool in _TOOLS:
        command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "diffsparse_kernels.backend.selftest"]
        command += [options.device, kernel, *words]
        with talk.patience(talk.left):
            talk.attempt(f"{kernel}, {tool}", " ".join(words), partial(_run, command, talk))


def _run(command: list[str], talk: Talk) -> Row:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(talk.left - 2, 1), check=False)
    except subprocess.TimeoutExpired:
        return {"verdict": "no time"}
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    return {"verdict": "told", "why": " / ".join(said[1:6] or said[-1:])[:600]}
