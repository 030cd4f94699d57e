"""Seconds of a call by the device's clock, and medians of calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

import torch

K = TypeVar("K")
_AHEAD = 2_000_000  # cycles that a device waits, so that the host has launched all before the clock runs
Tick = Callable[[], None]


def seconds_of(call: Callable[[], Any], device: str = "cuda") -> float:
    """One call, by the device's clock if it is a GPU and there is one."""
    if device == "cpu" or not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_AHEAD)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _silent() -> None:
    """Nobody is told."""


def in_turns(
    calls: dict[K, list[Callable[[], Any]]], rounds: int, device: str, end: float, tick: Tick = _silent
) -> dict[K, float]:
    """Median seconds of each: all take turns, so that a slow moment slows all alike.

    calls: of each several, on inputs of their own, so that nobody finds its own in the cache. rounds: at most, for at
    `end`, by `time.monotonic`, there is an end. tick: called after each call.
    """
    times: dict[K, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, variants in calls.items():
            times[name].append(seconds_of(variants[turn % len(variants)], device))
            tick()
            if turn and time.monotonic() > end:  # all have had one turn
                return _medians(times)
    return _medians(times)


def _medians(times: dict[K, list[float]]) -> dict[K, float]:
    return {name: median(found) for name, found in times.items() if found}
