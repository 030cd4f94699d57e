"""A layer of a strategy as a model calls it: the step that searches and the sparse step, operation by operation."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse_eval.gpu.speed import SHAPES, Shape
from diffsparse_eval.gpu.stage import Channel, Options
from diffsparse_eval.rows import Attempt
from diffsparse_eval.suites import Case
from diffsparse_eval.timing import Call, median_seconds

if TYPE_CHECKING:
    from diffsparse.site.compute import Site
    from diffsparse.site.record import CallRecord

STEPS, FIRST = 50, 9  # of the run, and the last dense one
_SHOWN = 12  # operations that a row lists
_ROUNDS, _SECONDS = 5, 15.0  # timed calls, and seconds that they may take


def jobs(options: Options) -> list[str]:
    """A child for each large model and strategy."""
    return [f"{shape.name}/{name}" for shape in SHAPES[1:3] for name in ("digest", "adaspa")]


def run(job: str, options: Options, channel: Channel) -> None:
    """Search once, then run sparse."""
    name, strategy_name = job.split("/")
    shape = next(shape for shape in SHAPES if shape.name == name).shrunk(options.shrink)
    with torch.inference_mode():
        layer = _Layer(shape, strategy_name, options)
        for kind, call in layer.calls():
            channel.attempt(f"{strategy_name}, {kind}", name, partial(layer.measure, call, channel), again=True)
        for kind, call in layer.calls():  # after all times, since a profiler slows what comes after it
            channel.attempt(f"{strategy_name}, {kind}, profile", name, partial(layer.profile, call))


class _Layer:
    """One attention module of a model, with all its heads, at the steps of a run."""

    def __init__(self, shape: Shape, name: str, options: Options) -> None:
        from diffsparse.orders.layout import Layout
        from diffsparse.strategies import AdaSpa, Digest

        dim, heads = (128, shape.heads) if options.on_gpu else (16, 2)
        block = 128 if options.on_gpu else 32
        finer = (128, 64) if options.on_gpu else 32
        self.strategy = Digest(0.8, finer) if name == "digest" else AdaSpa(0.8, block=block)
        case = Case(shape.tokens, heads, dim, "bfloat16", block, ())
        tensors = case.tensors(options.device)
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)  # as models have them
        self.qkv = q, k, v
        self.layout, self.options = Layout(*shape.grid, 0, shape.text), options
        self.memory: dict[str, object] = {}
        self.key_mask = shape.key_mask(options.device)
        self.records: list[CallRecord] = []

    def calls(self) -> list[tuple[str, Call]]:
        """The calls that are timed: dense as without a strategy, the step that searches, a sparse step."""
        return [
            ("dense", self._dense),
            ("search", partial(self._call, self.strategy.observe, FIRST)),
            ("sparse", partial(self._call, self.strategy.attend, FIRST + 1)),
        ]

    def _dense(self) -> Tensor:
        return self._site(0).dense(*self.qkv)

    def _call(self, method: Callable[[Tensor, Tensor, Tensor, Site], Tensor], step: int) -> Tensor:
        from diffsparse.strategies.base import in_order

        return in_order(self.strategy, method, self.qkv, self._site(step))

    def _site(self, step: int) -> Site:
        from diffsparse.site.compute import DenseBackend, Site
        from diffsparse.site.record import CallRecord

        self.records.append(CallRecord("blocks.0", step, "cond"))
        mask = None if self.key_mask is None else self.key_mask[:, None, None]
        return Site(
            model="transformer",
            layer="blocks.0",
            index=0,
            step=step,
            steps=STEPS,
            end=STEPS,
            branch="cond",
            layout=self.layout,
            memory=self.memory,
            dense_backend=DenseBackend("native", partial(F.scaled_dot_product_attention, attn_mask=mask)),
            record=self.records[-1],
            key_mask=self.key_mask,
        )

    def measure(self, call: Call, channel: Channel) -> Attempt:
        """Milliseconds of the device and of the host, peak memory."""
        with channel.heartbeat(60):
            call()  # compiles, tries kernels
        self._synchronise()
        if self.options.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        host: list[float] = []
        end = time.monotonic() + _SECONDS
        seconds = median_seconds(lambda: host.append(_host_ms(call)), self.options.device, _ROUNDS, warm_up=0, end=end)
        record = self.records[-1]
        return {
            "verdict": "timed",
            "ms": seconds * 1e3,
            "host_ms": min(host),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.options.on_gpu else None,
            "density": float(record.density),
            "backend": record.backend,
            "why": "; ".join(record.passed_over) or record.reason,
        }

    def profile(self, call: Call) -> Attempt:
        """Launches, and the operations that take the most time."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.options.on_gpu else [])]
        with profile(activities=kinds) as seen:
            call()
            self._synchronise()
        own = "self_device_time_total" if self.options.on_gpu else "self_cpu_time_total"
        events = [event for event in seen.key_averages() if getattr(event, own, 0) > 0]
        if self.options.on_gpu:  # what the device ran, not the operations that asked for it
            events = [event for event in events if str(event.device_type).endswith("CUDA")]
        events.sort(key=lambda event: -getattr(event, own))
        return {
            "verdict": "profiled",
            "launches": sum(event.count for event in events),
            "ops": {event.key[:60]: round(getattr(event, own) / 1e3, 3) for event in events[:_SHOWN]},
        }

    def _synchronise(self) -> None:
        if self.options.on_gpu:
            torch.cuda.synchronize()


def _host_ms(call: Call) -> float:
    """Milliseconds until the call returns, which on a GPU is before it is done."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
