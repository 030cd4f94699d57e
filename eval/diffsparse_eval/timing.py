"""Seconds of calls by the device's clock, and medians of calls that take turns.

`torch.utils.benchmark` and `triton.testing.do_bench` time one call at a time; here all calls take turns, so that a
slow moment of the machine slows all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from diffsparse.site.timing import Mark, elapsed, mark

if TYPE_CHECKING:
    from diffsparse.site.report import Report

K = TypeVar("K")
Call = Callable[[], object]
_AHEAD = 2_000_000  # cycles that a device waits, so that the host has launched all before the clock runs


def seconds_of(call: Call, device: str) -> float:
    """Seconds of one call, by the clock of a CUDA device if that is meant and there is one.

    With one thread of a CPU its own seconds, so that what other programs take from it does not count.
    """
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if not on_gpu and torch.get_num_threads() == 1:
        start = time.process_time()
        call()
        return time.process_time() - start
    place = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda._sleep(_AHEAD)
    begin = mark(place)
    call()
    return elapsed(begin, mark(place))


def in_turns(
    calls: Mapping[K, Sequence[Call]],
    rounds: int,
    device: str,
    *,
    warm_up: int = 0,
    end: float = math.inf,
    tick: Callable[[], None] = lambda: None,
    failed: Callable[[K, Exception], None] | None = None,
) -> dict[K, float]:
    """Median seconds of each call, in the order given.

    Args:
        calls: by name; of each one or more, on inputs of their own, so that none finds its inputs in the cache.
        rounds: timed turns of each at most.
        device: whose clock is read, "cpu" or "cuda".
        warm_up: turns before those that are timed.
        end: when to stop after at least one timed turn of each, by `time.monotonic`.
        tick: called after each call.
        failed: called with what a call raises, which then takes part no more; by default that is raised.
    """
    times: dict[K, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name in list(times):
            try:
                seconds = seconds_of(calls[name][turn % len(calls[name])], device)
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del times[name]
                continue
            if turn >= warm_up:
                times[name].append(seconds)
            tick()
            if turn > warm_up and time.monotonic() > end:
                return _medians(times)
    return _medians(times)


def _medians(times: dict[K, list[float]]) -> dict[K, float]:
    return {name: median(found) for name, found in times.items() if found}


def median_seconds(call: Call, device: str, rounds: int = 3, *, warm_up: int = 1, end: float = math.inf) -> float:
    """Median seconds of one call alone."""
    return in_turns({"": [call]}, rounds, device, warm_up=warm_up, end=end)[""]


class Stopwatch:
    """Times forward passes of a model with a part of its blocks, and scales each list of blocks to its full length.

    Attributes:
        model: what runs, with some of the blocks.
        whole: the model with all of them; it may be on the meta device.
    """

    def __init__(self, model: nn.Module, whole: nn.Module) -> None:
        self.device = next(model.parameters()).device
        self.factors: dict[str, float] = {}  # by list of blocks: all of its blocks over those that run
        self._marks: dict[str, Mark] = {}
        for name, blocks in model.named_children():
            if isinstance(blocks, nn.ModuleList) and len(blocks):
                self.factors[name] = len(getattr(whole, name)) / len(blocks)
                blocks[0].register_forward_pre_hook(self._note(f"{name} begins"))
                blocks[-1].register_forward_hook(self._note(f"{name} ends"))

    def _note(self, name: str) -> Callable[..., None]:
        def note(*_: object) -> None:
            self._marks[name] = mark(self.device)

        return note

    def time(self, forward: Callable[[], None]) -> float:
        """Seconds that `forward` would take on the whole model."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = mark(self.device)
        forward()
        seconds = elapsed(start, mark(self.device))
        for name, factor in self.factors.items():
            seconds += (factor - 1) * elapsed(self._marks[f"{name} begins"], self._marks[f"{name} ends"])
        return seconds

    def attention(self, report: Report, step: int) -> float:
        """Seconds of self-attention at `step` on the whole model."""
        calls = [call for call in report.calls if call.step == step]
        return sum(call.seconds * self.factors.get(call.layer.split(".")[0], 1.0) for call in calls)
