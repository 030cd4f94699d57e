"""Where a number was measured: versions, device, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from diffsparse_eval.rows import Origin
from diffsparse_kernels.machine import device_name, processor

__all__ = ["commit", "device_name", "dtype_name", "origin", "system", "versions"]
_PACKAGES = ("diffsparse", "torch", "diffusers", "transformers", "accelerate", "triton", "numpy")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; without those that are not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from, "+" behind it if files were changed; else None."""
    folder = Path(__file__).parent
    head = _git("rev-parse", "--short=12", "HEAD", folder=folder)
    if head is None or not _git("ls-files", Path(__file__).name, folder=folder):
        return None
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no", folder=folder) else "")


def _git(*arguments: str, folder: Path) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a number format, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def origin(device: str | torch.device, dtype: torch.dtype) -> Origin:
    """Where a row is measured."""
    return {
        "device": device_name(device),
        "dtype": dtype_name(dtype),
        "versions": versions(),
        "commit": commit(),
    }


def system() -> dict[str, str | int | None]:
    """Operating system, processor, cores and threads."""
    return {
        "platform": platform.platform(),
        "executable": sys.executable,
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
