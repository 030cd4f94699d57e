"""What was measured on this machine: tables in the user's cache folder, JSON lists of rows, and what goes without them.

`diffsparse doctor --measure` writes `break_even.json`: for each device the fastest backend, and for each head size,
block and length the density above which dense attention is faster.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

BREAK_EVEN = "break_even.json"
# Without a measurement. On the CPU as measured with AVX-512 and bfloat16 products; on a GPU from the share of the best
# dense kernel's speed that a kernel of its kind reaches, and a tenth for the lists. The reference is never left.
_DEFAULTS = {"cpu": 0.6, "gluon": 0.8, "triton": 0.65, "reference": 1.0, "flex": 0.6, "flash-attn-4": 0.8}
_WIDE_BLOCKS = 0.1  # more, for blocks of 128 on the CPU


def cache_folder() -> Path:
    """DIFFSPARSE_CACHE if set, else `diffsparse` in the place that the system has for caches."""
    named = os.environ.get("DIFFSPARSE_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "diffsparse" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/diffsparse"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffsparse"


def read_rows(name: str | Path) -> list[dict[str, Any]]:
    """The rows of a table in the cache folder, or at an absolute path; none if it isn't there.

    A table that can't be read is as good as none: a broken cache must not stop a run. It is told in a warning.
    """
    path = cache_folder() / name
    try:
        rows = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored ({error}); delete it, or measure anew", stacklevel=2)
        return []
    return rows if isinstance(rows, list) else []


def measured_backend(device: str) -> str | None:
    """The backend that was the fastest on a device of this name."""
    return next((row["backend"] for row in break_even_rows() if row["device"] == device), None)


def density_limit(backend: str, device: str, dtype: torch.dtype, head_dim: int, block: int, tokens: int) -> float:
    """Density above which dense attention is faster, as measured nearest to this size, else the default."""
    known = [
        row
        for row in break_even_rows()
        if (row["device"], row["backend"]) == (device, backend)
        and row["dtype"] == str(dtype).removeprefix("torch.")
        and row["head_dim"] == (64 if head_dim <= 64 else 128)
        and row["block"] == (64 if block <= 64 else 128)
    ]
    if not known:
        return _DEFAULTS[backend] + (_WIDE_BLOCKS if backend == "cpu" and block >= 128 else 0.0)
    return float(min(known, key=lambda row: abs(math.log(row["tokens"] / tokens)))["break_even"])


@cache
def break_even_rows() -> list[dict[str, Any]]:
    """What `doctor --measure` wrote on this machine."""
    return read_rows(BREAK_EVEN)


def device_name(device: str | torch.device) -> str:
    """The name of a GPU, or of the processor with the threads in use."""
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
