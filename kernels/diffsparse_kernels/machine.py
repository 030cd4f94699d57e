"""The machine: names of its devices, the driver, and the folder for what is measured on it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import platformdirs
import torch


def cache_folder() -> Path:
    """DIFFSPARSE_CACHE if set, else `diffsparse` in the place that the system has for caches."""
    named = os.environ.get("DIFFSPARSE_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("diffsparse", appauthor=False)


def device_name(device: str | torch.device) -> str:
    """The name of a GPU, or of the processor with the number of threads in use."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


@cache
def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


@cache
def driver() -> str:
    """Version of the NVIDIA driver; empty if unknown."""
    with suppress(OSError):
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
    return ""
