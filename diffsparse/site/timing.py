"""Times and numbers that a device hands over late: nothing here makes a denoising step wait."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event  # the wall clock, or an event on a CUDA device


def mark(device: torch.device) -> Mark:
    """A moment, for `elapsed`: an event on a CUDA device (no sync), else the wall clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def passed(moment: Mark) -> bool:
    """Whether the device has come so far; it may not be asked while a CUDA graph is captured."""
    return isinstance(moment, float) or (not torch.cuda.is_current_stream_capturing() and bool(moment.query()))


def elapsed(start: Mark, stop: Mark) -> float:
    """Seconds between two marks; waits for the device where it must."""
    if isinstance(start, float) and isinstance(stop, float):
        return stop - start
    if isinstance(start, float) or isinstance(stop, float):
        raise TypeError("two marks of one device are wanted")
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


class Reading:
    """A number on its way from the device."""

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number.to("cpu", non_blocking=True)
        self._here = torch.cuda.Event() if number.is_cuda else None
        if self._here is not None:
            self._here.record()

    def value(self) -> float | None:
        """None if it isn't here yet."""
        if self._here is not None:
            if torch.cuda.is_current_stream_capturing() or not self._here.query():
                return None
            self._here = None
        return float(self._number)

    def wait(self) -> float:
        """Waits for the device where it must."""
        if self._here is not None:
            self._here.synchronize()
            self._here = None
        return float(self._number)
