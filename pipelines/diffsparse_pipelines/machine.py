"""Devices and memory of this machine, checked before any work starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from diffsparse.errors import ConfigError

if TYPE_CHECKING:
    import torch


def place(asked: str = "auto") -> str:
    """A device that is there, as torch names it; "auto" takes a CUDA device if there is one.

    Raises:
        ConfigError: not the name of a device, or of none that this machine has.
    """
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ConfigError(f"--device wants cpu, cuda, cuda:1, ... or auto; got {asked!r}") from None
    if device.type == "cpu":
        return "cpu"
    available = getattr(getattr(torch, device.type, None), "is_available", None)
    count = getattr(torch, device.type).device_count() if available is not None and available() else 0
    if (device.index or 0) >= count:
        have = f"{count} of that kind" if count else f"no {device.type} device that torch can use"
        raise ConfigError(f"--device {asked} is not there: this machine has {have}; try --device auto")
    return asked


def memory(device: str | torch.device) -> int | None:
    """Bytes of memory that a device has in all, on a CPU no more than its control group may use; None if unknown."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(have, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit
        return have


def hold(need: int, device: str | torch.device, what: str, remedy: str) -> None:
    """Refuse what takes more memory than `device` has in all.

    Args:
        need: bytes that it takes at least.
        device: where.
        what: what takes them, for the message.
        remedy: what to do about it, for the message.

    Raises:
        ConfigError: it takes more.
    """
    have = memory(device)
    if have is not None and need > have:
        raise ConfigError(
            f"{what} take at least {need / 2**30:.1f} GiB, and {device} has {have / 2**30:.1f} GiB of memory; {remedy}"
        )
