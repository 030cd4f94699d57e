"""End-to-end speed of real architectures without their weights: a few passes of each kind, the rest by the schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

import diffsparse
from diffsparse import Dense, Report, Schedule
from diffsparse.errors import ConfigError
from diffsparse.files import if_stopped, write_csv, write_text
from diffsparse.insight.cost import Estimate, Flops, flops
from diffsparse.strategies import as_strategy
from diffsparse.strategies.base import as_given
from diffsparse.strategies.work import KINDS, Kind
from diffsparse_eval import environment, metrics
from diffsparse_eval.compared import label, sparsity_of
from diffsparse_eval.experiment import Results, Settings, dense_backend
from diffsparse_eval.report import meanings
from diffsparse_eval.rows import DEFINITIONS, SPEED_DEFINITIONS, SpeedRow, StepSeconds, flat, number
from diffsparse_eval.timing import Stopwatch
from diffsparse_pipelines import machine
from diffsparse_pipelines.architectures import Architecture, MinimalPipeline, inputs
from diffsparse_pipelines.preflight import grid_tokens, layout
from diffsparse_pipelines.tables import markdown_table

if TYPE_CHECKING:
    from rich.progress import Progress

    from diffsparse.orders.layout import Layout
    from diffsparse.strategies import Strategy


@dataclass(frozen=True)
class SpeedTest:
    """What is timed.

    Attributes:
        name: of the model, for the rows.
        architecture: of the transformer.
        size: pixels, as (frames, height, width).
        steps: of the run to which the times are extrapolated.
        passes: forward passes in a step: 2 with classifier-free guidance.
        schedule: of the sparse runs.
        strict: fail where a call would fall back to dense.
        layers: blocks of each kind that are built and timed, None for all.
        dtype: of the model.
        device: of the model.
        rounds: timed repetitions.
    """

    name: str
    architecture: Architecture
    size: tuple[int, int, int]
    steps: int
    passes: int
    schedule: Schedule = field(default_factory=Schedule)
    strict: bool = False
    layers: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rounds: int = 3

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent cells along frames, height and width."""
        return self.architecture.compression.latent(*self.size)

    def settings(self) -> Settings:
        """All that decides the rows, as plain values."""
        return {
            "model": self.name,
            "weights": "random",
            "arguments": {"size": self.size, "num_inference_steps": self.steps, "passes": self.passes},
            "layers": self.layers,
            "schedule": repr(self.schedule),
            "strict": self.strict,
            "device": environment.device_name(self.device),
            "dtype": environment.dtype_name(self.dtype),
            "versions": environment.versions(),
        }


@dataclass(frozen=True)
class Pass:
    """One forward pass of the whole model.

    Attributes:
        attention: seconds in self-attention.
        rest: seconds outside of it.
        density: mean over its attention calls.
        work: mean over its attention calls, in dense passes.
    """

    attention: float
    rest: float
    density: float
    work: float = 1.0

    @property
    def seconds(self) -> float:
        """Of the whole pass."""
        return self.attention + self.rest


Passes = dict[Kind, Pass]  # one of each kind of step


def run(test: SpeedTest, missing: list[Strategy], advance: Callable[[], None]) -> Iterator[SpeedRow]:
    """Time dense attention and the strategies in turns; the first round warms up and is not counted.

    Args:
        test: what is timed.
        missing: strategies whose rows are wanted.
        advance: called after each forward pass; there are `count_passes` of them.

    Yields:
        One row for each strategy.

    Raises:
        ConfigError: the device can't hold the model.
    """
    whole = test.architecture.build(device="meta")
    seen = layout(whole, test.latent, test.architecture.text)
    count = flops(whole, grid_tokens(whole, test.latent), test.architecture.text)
    _check_memory(test)
    compared = [Dense(), *(strategy for strategy in missing if strategy != Dense())]
    timed, reports = _Timer(test, whole, advance).rounds(compared)
    rest = median(one.rest for found in timed for passes in found.values() for one in passes)
    dense: Passes = {"dense": _median(timed[0]["dense"], rest)}
    for strategy, found, report in zip(compared, timed, reports, strict=True):
        if strategy in missing:
            typical: Passes = dense | {kind: _median(passes, rest) for kind, passes in found.items()}
            yield _row(test, strategy, typical, report, count, seen)


def measure(
    test: SpeedTest, strategies: Iterable[Strategy], out: Path, progress: Progress, overwrite: bool = False
) -> list[SpeedRow]:
    """Time dense attention and the strategies, and write `results.json`, `results.csv` and `report.md` into a folder.

    Args:
        test: what is timed.
        strategies: those to compare with dense attention.
        out: the folder; strategies that have a row there are not timed again.
        progress: a running display, which gets a task for the passes.
        overwrite: drop results that the folder holds.

    Returns:
        The rows of dense attention and of the strategies, in that order.

    Raises:
        ConfigError: the device can't hold the model, or the folder holds results of another experiment.
        InputFileError: the folder's `results.json` can't be read.
        OutputFileError: a file can't be written.
    """
    compared = list(dict.fromkeys([Dense(), *map(as_strategy, strategies)]))
    results: Results[SpeedRow] = Results(out, test.settings(), overwrite)
    missing = [strategy for strategy in compared if results.find("", 0, strategy) is None]
    if missing:
        with if_stopped(results.kept):
            task = progress.add_task("passes", total=count_passes(test, missing))
            for row in run(test, missing, lambda: progress.advance(task)):
                results.add(row)
    rows = [found for strategy in compared if (found := results.find("", 0, strategy))]
    write(rows, out)
    return rows


def timed_steps(test: SpeedTest, strategy: Strategy) -> dict[Kind, int]:
    """The first step of each kind: those that are run. Dense steps are the same for all strategies."""
    listed = strategy.kinds(test.schedule, test.steps)
    wanted = [kind for kind in KINDS if kind in listed and (kind != "dense" or strategy == Dense())]
    return {kind: listed.index(kind) for kind in sorted(wanted, key=listed.index)}


def count_passes(test: SpeedTest, missing: list[Strategy]) -> int:
    """Forward passes that `run` will make."""
    compared = dict.fromkeys([Dense(), *missing])
    return (test.rounds + 1) * sum(len(timed_steps(test, strategy)) for strategy in compared)


class _Timer:
    """The model with some of its blocks, its inputs, and the clock."""

    def __init__(self, test: SpeedTest, whole: torch.nn.Module, advance: Callable[[], None]) -> None:
        self.test, self.advance = test, advance
        model = test.architecture.build(test.layers, dtype=test.dtype, device=test.device)
        self.pipe, self.watch = MinimalPipeline(model, test.steps), Stopwatch(model, whole)
        self.arguments = inputs(model, test.latent, test.architecture.text)

    def rounds(self, compared: list[Strategy]) -> tuple[list[dict[Kind, list[Pass]]], list[Report]]:
        """Passes of each kind and the last report, for each strategy."""
        timed: list[dict[Kind, list[Pass]]] = [{} for _ in compared]
        reports: list[Report] = []
        for turn in range(self.test.rounds + 1):
            reports = []
            for strategy, found in zip(compared, timed, strict=True):
                passes, report = self.passes(strategy)
                reports.append(report)
                for kind, one in passes.items() if turn else ():
                    found.setdefault(kind, []).append(one)
        return timed, reports

    def passes(self, strategy: Strategy) -> tuple[Passes, Report]:
        """One pass of each kind."""
        test = self.test
        steps, seconds = timed_steps(test, strategy), dict[Kind, float]()
        self.pipe.begin()
        with diffsparse.apply(self.pipe, strategy, schedule=test.schedule, strict=test.strict) as handle:
            for kind, step in steps.items():
                seconds[kind] = self.watch.time(partial(self.pipe.step, step, self.arguments))
                self.advance()
            report = handle.report()
        density, work, passes = report.table("step"), report.table("step", "work"), Passes()
        for kind, step in steps.items():
            attention = self.watch.attention(report, step)
            passes[kind] = Pass(attention, seconds[kind] - attention, density[str(step)], work[str(step)])
        return passes, report


def _median(passes: list[Pass], rest: float) -> Pass:
    """Medians; outside of attention all passes do the same, and have one time."""
    attention = median(one.attention for one in passes)
    return Pass(attention, rest, median(one.density for one in passes), median(one.work for one in passes))


def _row(
    test: SpeedTest, strategy: Strategy, typical: Passes, report: Report, count: Flops, seen: Layout | None = None
) -> SpeedRow:
    many = Counter(strategy.kinds(test.schedule, test.steps))
    dense = typical["dense"]
    seconds = test.passes * sum(n * typical[kind].seconds for kind, n in many.items())
    attention = test.passes * sum(n * typical[kind].attention for kind, n in many.items())
    whole = test.passes * test.steps
    expected = Estimate.before(count, strategy, test.schedule, test.steps, seen)
    frames, height, width = test.size
    return {
        "model": test.name,
        "weights": "random",
        "strategy": type(as_given(strategy)).__name__.lower(),
        "label": label(strategy),
        "arguments": repr(strategy),
        "sparsity": sparsity_of(strategy),
        "density": sum(n * typical[kind].density for kind, n in many.items()) / test.steps,
        "work": sum(n * typical[kind].work for kind, n in many.items()) / test.steps,
        "executed": 1.0,
        "sparse_density": report.sparse_density,
        "steps": test.steps,
        "dense_steps": many["dense"] + many["search"] + many["tail"],
        **metrics.NONE,
        "dense_seconds": whole * dense.seconds,
        "seconds": seconds,
        "speedup": whole * dense.seconds / seconds,
        "attention_seconds": attention,
        "attention_share": dense.attention / dense.seconds,
        "attention_speedup": whole * dense.attention / attention,
        "recall": None,
        "memory_bytes": test.passes * report.memory_bytes,
        **_step_seconds(test, {kind: typical[kind] for kind in many}),
        "expected_attention_share": count.share,
        "expected_speedup": expected.speedup if expected else None,
        "dense_pass_tflop": count.total / 1e12,
        "passes": test.passes,
        "layers": test.layers,
        "fallbacks": report.fallbacks,
        "backends": report.backends,
        "dense_backend": dense_backend(report),
        **environment.origin(test.device, test.dtype),
        "prompt": "",
        "seed": 0,
        "size": f"{width}x{height}x{frames}",
        "schedule": repr(test.schedule),
    }


def _step_seconds(test: SpeedTest, passes: Passes) -> StepSeconds:
    seconds = {kind: test.passes * one.seconds for kind, one in passes.items()}
    return {
        "dense_step_seconds": seconds.get("dense"),
        "search_step_seconds": seconds.get("search"),
        "refresh_step_seconds": seconds.get("refresh"),
        "tail_step_seconds": seconds.get("tail"),
        "sparse_step_seconds": seconds.get("sparse"),
    }


def _check_memory(test: SpeedTest) -> None:
    """Raise ConfigError where the weights alone don't fit."""
    weights = sum(p.numel() for p in test.architecture.build(test.layers, device="meta").parameters())
    need, have = weights * test.dtype.itemsize, machine.memory(test.device)
    if have is not None and need > have:
        raise ConfigError(
            f"the weights of {test.name} take {need / 2**30:.0f} GiB as {environment.dtype_name(test.dtype)}, "
            f"{test.device} has {have / 2**30:.0f} GiB; time a part of the blocks with --layers, such as --layers 2"
        )


# --- tables and files ---------------------------------------------------------------------------------------------

# column -> (heading, digits)
COLUMNS = {
    "dense_step_seconds": ("dense", 2),
    "search_step_seconds": ("search", 2),
    "refresh_step_seconds": ("refresh", 2),
    "tail_step_seconds": ("tail", 2),
    "sparse_step_seconds": ("sparse", 2),
    "attention_share": ("attention share", 2),
    "attention_speedup": ("attention", 2),
    "dense_seconds": ("dense run", 1),
    "seconds": ("run", 1),
    "speedup": ("speed-up", 2),
    "expected_speedup": ("by FLOPs", 2),
}
SPARE = ("attention share", "attention", "dense run")  # headings that go first where the terminal is narrow


def table(rows: list[SpeedRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: seconds of a step by kind, seconds of the run, and speed-up."""
    columns = _columns(rows)
    headings = ["strategy", *(COLUMNS[column][0] for column in columns)]
    return headings, [[row["label"], *(_cell(row, column) for column in columns)] for row in rows]


def _columns(rows: list[SpeedRow]) -> list[str]:
    """Those in which some row has a value; steps of some kinds are rare."""
    return [column for column in COLUMNS if any(_cell(row, column) != "-" for row in rows)]


def _cell(row: SpeedRow, column: str) -> str:
    value = number(row, column)
    if value is None:
        return "unknown" if column == "expected_speedup" else "-"
    return f"{value:.{COLUMNS[column][1]}f}"


def write(rows: list[SpeedRow], out: Path) -> None:
    """Write `results.csv` and `report.md` into `out`."""
    write_csv(flat(rows), out / "results.csv")
    title = f"# {rows[0]['model']}: speed without weights\n\n{facts(rows)}\n\n"
    rest = {name: meaning for name, meaning in DEFINITIONS.items() if name in rows[0].keys() - SPEED_DEFINITIONS.keys()}
    columns = f"## Columns\n{meanings(SPEED_DEFINITIONS | rest)}\n"
    write_text(f"{title}{markdown_table(*table(rows))}\n\n{columns}", out / "report.md")


def facts(rows: list[SpeedRow]) -> str:
    """One line on where and how the rows were measured."""
    row = rows[0]
    part = "all blocks" if row["layers"] is None else f"{row['layers']} blocks of each kind timed and scaled to all"
    fallen = sum(sum(r["fallbacks"].values()) for r in rows)
    parts = [
        f"{row['model']} with random weights: speed only, the transformer only",
        f"{row['size']}, {row['steps']} steps of {row['passes']} passes, extrapolated from one pass of each kind",
        part,
        f"{row['dense_pass_tflop']:.3g} TFLOP a dense pass",
        f"{row['dtype']}, dense backend {row['dense_backend']}, {row['device']}",
        f"torch {row['versions']['torch']}, Diffusers {row['versions']['diffusers']}, commit {row['commit']}",
    ]
    if fallen:
        parts.append(f"{fallen} calls fell back to dense (see `fallbacks` in results.json)")
    return "; ".join(parts)
