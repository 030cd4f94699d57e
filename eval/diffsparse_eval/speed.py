"""End-to-end speed of real architectures without their weights: a few passes of each kind, the rest by the schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

import diffsparse
from diffsparse import Dense, Report, Schedule
from diffsparse.errors import ConfigError
from diffsparse.files import write_csv, write_text
from diffsparse.insight.cost import Estimate, Flops, flops, kinds
from diffsparse.orders.layout import Layout
from diffsparse.site.report import elapsed, mark
from diffsparse.strategies.work import KINDS, Kind
from diffsparse_eval import environment
from diffsparse_eval.experiment import Row, dense_backend, label
from diffsparse_eval.report import as_markdown, flat, meanings
from diffsparse_pipelines import machine
from diffsparse_pipelines.architectures import Architecture, MinimalPipeline, inputs
from diffsparse_pipelines.preflight import grid_tokens, layout


@dataclass(frozen=True)
class Trial:
    """What is timed.

    name: for the rows. size: pixels, as (frames, height, width). steps: of the run that is foretold. layers: blocks of
    each kind that are built and timed, None for all. passes: forward passes in a step. rounds: timed repetitions.
    """

    name: str
    architecture: Architecture
    strategies: tuple[Any, ...]
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

    def settings(self) -> dict[str, Any]:
        """All that decides the rows, as plain values."""
        return {
            "model": self.name,
            "weights": "random",
            "arguments": {"size": self.size, "num_inference_steps": self.steps, "passes": self.passes},
            "layers": self.layers,
            "schedule": repr(self.schedule),
            "strict": self.strict,
            "device": environment.device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": environment.versions(),
        }


@dataclass(frozen=True)
class Pass:
    """One forward pass of the whole model: seconds in self-attention and outside, mean density and work of calls."""

    attention: float
    rest: float
    density: float
    work: float = 1.0

    @property
    def seconds(self) -> float:
        """Both."""
        return self.attention + self.rest


class Stopwatch:
    """Times forward passes of a model with a part of its blocks, and scales each list of blocks to its full length."""

    def __init__(self, model: nn.Module, whole: nn.Module) -> None:
        self.device = next(model.parameters()).device
        self.factors: dict[str, float] = {}
        self._marks: dict[str, Any] = {}
        for name, blocks in model.named_children():
            if isinstance(blocks, nn.ModuleList) and len(blocks):
                self.factors[name] = len(getattr(whole, name)) / len(blocks)
                blocks[0].register_forward_pre_hook(self._at(f"{name} begins"))
                blocks[-1].register_forward_hook(self._at(f"{name} ends"))

    def _at(self, name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
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


def run(trial: Trial, missing: list[Any], advance: Callable[[], None]) -> Iterator[Row]:
    """Time dense attention and the strategies `missing`, in turns; the first round warms up and is not counted.

    Yields:
        One row for each strategy.

    Raises:
        ConfigError: the device can't hold the model.
    """
    whole = trial.architecture.build(device="meta")
    seen = layout(whole, trial.latent, trial.architecture.text)
    count = flops(whole, grid_tokens(whole, trial.latent), trial.architecture.text)
    _check_memory(trial)
    model = trial.architecture.build(trial.layers, dtype=trial.dtype, device=trial.device)
    rig, watch = MinimalPipeline(model, trial.steps), Stopwatch(model, whole)
    arguments = inputs(model, trial.latent, trial.architecture.text)
    contestants = [Dense(), *(strategy for strategy in missing if strategy != Dense())]
    found: list[dict[Kind, list[Pass]]] = [{} for _ in contestants]
    reports: list[Report] = []
    for turn in range(trial.rounds + 1):
        reports = []
        for strategy, timed in zip(contestants, found, strict=True):
            passes, report = _passes(trial, strategy, rig, watch, arguments, advance)
            reports.append(report)
            for kind, one in passes.items() if turn else ():
                timed.setdefault(kind, []).append(one)
    rest = median(one.rest for timed in found for passes in timed.values() for one in passes)
    dense: dict[Kind, Pass] = {"dense": _middle(found[0]["dense"], rest)}
    for strategy, timed, report in zip(contestants, found, reports, strict=True):
        if strategy in missing:
            typical: dict[Kind, Pass] = dense | {kind: _middle(passes, rest) for kind, passes in timed.items()}
            yield _row(trial, strategy, typical, report, count, seen)


def looks(trial: Trial, strategy: Any) -> dict[Kind, int]:
    """The first step of each kind: those that are run. Dense steps are the same for all strategies."""
    listed = kinds(strategy, trial.schedule, trial.steps)
    wanted = [kind for kind in KINDS if kind in listed and (kind != "dense" or strategy == Dense())]
    return {kind: listed.index(kind) for kind in sorted(wanted, key=listed.index)}


def count_passes(trial: Trial, missing: list[Any]) -> int:
    """Forward passes that `run` will make."""
    contestants = dict.fromkeys([Dense(), *missing])
    return (trial.rounds + 1) * sum(len(looks(trial, strategy)) for strategy in contestants)


def _passes(
    trial: Trial,
    strategy: Any,
    rig: MinimalPipeline,
    watch: Stopwatch,
    arguments: dict[str, Any],
    advance: Callable[[], None],
) -> tuple[dict[Kind, Pass], Report]:
    rig.begin()
    steps, seconds = looks(trial, strategy), {}
    with diffsparse.apply(rig, strategy, schedule=trial.schedule, strict=trial.strict) as handle:
        for kind, step in steps.items():
            seconds[kind] = watch.time(lambda step=step: rig.step(step, arguments))  # type: ignore[misc]
            advance()
        report = handle.report()
    density, work, passes = report.table("step"), report.table("step", "work"), {}
    for kind, step in steps.items():
        attention = watch.attention(report, step)
        passes[kind] = Pass(attention, seconds[kind] - attention, density[str(step)], work[str(step)])
    return passes, report


def _middle(passes: list[Pass], rest: float) -> Pass:
    """Medians; outside of attention all passes do the same, and have one time."""
    attention, density, work = (median(getattr(p, name) for p in passes) for name in ("attention", "density", "work"))
    return Pass(attention, rest, density, work)


def _row(
    trial: Trial, strategy: Any, typical: dict[Kind, Pass], report: Report, count: Flops, seen: Layout | None = None
) -> Row:
    many = Counter(kinds(strategy, trial.schedule, trial.steps))
    dense = typical["dense"]
    seconds = trial.passes * sum(n * typical[kind].seconds for kind, n in many.items())
    attention = trial.passes * sum(n * typical[kind].attention for kind, n in many.items())
    whole = trial.passes * trial.steps
    expected = Estimate.before(count, strategy, trial.schedule, trial.steps, seen)
    frames, height, width = trial.size
    return {
        "model": trial.name,
        "weights": "random",
        "strategy": type(strategy).__name__.lower(),
        "label": label(strategy),
        "arguments": repr(strategy),
        "sparsity": getattr(strategy, "sparsity", 0.0),
        "density": sum(n * typical[kind].density for kind, n in many.items()) / trial.steps,
        "work": sum(n * typical[kind].work for kind, n in many.items()) / trial.steps,
        "sparse_density": report.sparse_density,
        "steps": trial.steps,
        "dense_steps": many["dense"] + many["search"] + many["tail"],
        **dict.fromkeys(("psnr_db", "psnr_db_min", "ssim", "latent_cosine")),
        "dense_seconds": whole * dense.seconds,
        "seconds": seconds,
        "speedup": whole * dense.seconds / seconds,
        "attention_seconds": attention,
        "attention_share": dense.attention / dense.seconds,
        "attention_speedup": whole * dense.attention / attention,
        "recall": None,
        "memory_bytes": trial.passes * report.memory_bytes,
        **{f"{kind}_step_seconds": trial.passes * typical[kind].seconds if kind in many else None for kind in KINDS},
        "expected_attention_share": count.share,
        "expected_speedup": expected.speedup if expected else None,
        "dense_pass_tflop": count.total / 1e12,
        "passes": trial.passes,
        "layers": trial.layers,
        "fallbacks": report.fallbacks,
        "backends": report.backends,
        "dense_backend": dense_backend(report),
        "device": environment.device_name(trial.device),
        "dtype": str(trial.dtype).removeprefix("torch."),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "prompt": "",
        "seed": 0,
        "size": f"{width}x{height}x{frames}",
        "schedule": repr(trial.schedule),
    }


def _check_memory(trial: Trial) -> None:
    """Raise ConfigError where the weights alone don't fit."""
    weights = sum(p.numel() for p in trial.architecture.build(trial.layers, device="meta").parameters())
    need, have = weights * trial.dtype.itemsize, machine.memory(trial.device)
    if have is not None and need > have:
        raise ConfigError(
            f"the weights of {trial.name} take {need / 2**30:.0f} GiB as {str(trial.dtype).removeprefix('torch.')}, "
            f"{trial.device} has {have / 2**30:.0f} GiB; time a part of the blocks with --layers, such as --layers 2"
        )


# --- what people see ----------------------------------------------------------------------------------------------

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


DEFINITIONS = {
    "dense_step_seconds": "seconds of a step that is dense in all layers, on the user's own backend",
    "search_step_seconds": "of a dense step that also sums block masses and chooses blocks",
    "refresh_step_seconds": "of a sparse step that chooses its blocks anew on the cached log-sum-exp",
    "tail_step_seconds": "of a step that runs dense beside sparse, to keep what the dropped blocks gave (+tail)",
    "sparse_step_seconds": "of a sparse step",
    "dense_seconds": "seconds of a run of dense steps: transformer only, extrapolated",
    "seconds": "the same with the strategy on, by its schedule: dense steps and searches included",
    "speedup": "dense_seconds / seconds",
    "attention_share": "share of a dense step that is spent in self-attention",
    "attention_speedup": "time inside self-attention, dense over sparse, dense steps and searches included",
    "work": "attention computed, in dense passes a step: density, and what searches compute beside it",
    "expected_speedup": "from the count of operations alone, as if the machine did all of them equally fast; "
    "null: what the strategy computes is not known before it runs",
    "dense_pass_tflop": "operations of one dense forward pass, in units of 10^12",
    "layers": "blocks of each kind that were built and timed, their times scaled to all; null: all were timed",
}


def table(rows: list[Row]) -> Table:
    """Seconds of a step by kind, seconds of the run, and speed-up."""
    shown = Table(title="seconds of a step by kind, and of the run", title_justify="left", box=box.SIMPLE)
    shown.add_column("strategy", no_wrap=True)
    columns = _columns(rows)
    for column in columns:
        shown.add_column(COLUMNS[column][0], justify="right")
    for row in rows:
        shown.add_row(row["label"], *(_cell(row, column) for column in columns))
    return shown


def _columns(rows: list[Row]) -> list[str]:
    """Those of which some row has something to tell; steps of some kinds are rare."""
    return [column for column in COLUMNS if any(_cell(row, column) != "-" for row in rows)]


def _cell(row: Row, column: str) -> str:
    value = row.get(column)  # rows of an earlier version lack some
    if value is None and column == "expected_speedup":
        return "unknown"
    return "-" if value is None else f"{value:.{COLUMNS[column][1]}f}"


def write(rows: list[Row], out: Path) -> None:
    """Write `results.csv` and `report.md` into `out`."""
    write_csv(flat(rows), out / "results.csv")
    columns = _columns(rows)
    heads = ["strategy", *(COLUMNS[column][0] for column in columns)]
    lines = [[row["label"], *(_cell(row, column) for column in columns)] for row in rows]
    title = f"# {rows[0]['model']}: speed without weights\n\n{facts(rows)}\n\n"
    write_text(f"{title}{as_markdown(heads, lines)}\n\n## Columns\n{meanings(DEFINITIONS)}\n", out / "report.md")


def facts(rows: list[Row]) -> str:
    """One line on where and how the rows came about."""
    row = rows[0]
    part = "all blocks" if row["layers"] is None else f"{row['layers']} blocks of each kind timed and scaled to all"
    fallen = sum(sum(r["fallbacks"].values()) for r in rows)
    parts = [
        f"{row['model']} with random weights: speed only, the transformer only",
        f"{row['size']}, {row['steps']} steps of {row['passes']} passes, extrapolated from one pass of each kind",
        part,
        f"{row['dense_pass_tflop']:.3g} TFLOP a dense pass",
        f"{row['dtype']}, dense backend {rows[0]['dense_backend']}, {row['device']}",
        f"torch {row['versions']['torch']}, Diffusers {row['versions']['diffusers']}, commit {row['commit']}",
    ]
    if fallen:
        parts.append(f"{fallen} calls fell back to dense (see `fallbacks` in results.json)")
    return "; ".join(parts)
