"""What attention looks like under a strategy: block masses, chosen blocks, orders and recall, as pictures and files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import diffsparse
from diffsparse import Dense, Schedule
from diffsparse.errors import ConfigError
from diffsparse.files import write_csv, write_json
from diffsparse.insight.inspection import Inspector, LayerView, sampled_steps
from diffsparse.orders.named import AXES
from diffsparse.strategies import as_strategy
from diffsparse_eval import charts, style
from diffsparse_eval.compared import label, sparsity_of
from diffsparse_eval.rows import SCHEMA, SCHEMA_KEY, HeadRow, InspectionFacts
from diffsparse_kernels import Block, written
from diffsparse_pipelines import generation
from diffsparse_pipelines.preflight import argument

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

    from diffsparse.strategies import Strategy

FILES = ("inspect.json", "recall.csv", "recall.png", "orders.png")  # and maps-*.png, one a layer
HEADINGS = ("layer", "raster", "best order", "chosen", "density", "best order of each head, and its recall")


@dataclass(frozen=True)
class Inspection:
    """What was found: the view of each layer, and how the inspection was made."""

    views: list[LayerView]
    facts: InspectionFacts


@dataclass(frozen=True)
class Sampling:
    """What is inspected of a run.

    Attributes:
        steps: how many steps are sampled, evenly spread over those in which the strategy may run sparse.
        orders: candidate token orders.
        layers: self-attention layers by number from 0; None for all.
        sparsity: at which recall is measured, if the strategy has none of its own; None is the default.
        block: tokens of the blocks that are measured, likewise.
    """

    steps: int = 3
    orders: tuple[str, ...] = AXES
    layers: tuple[int, ...] | None = None
    sparsity: float | None = None
    block: Block | None = None


class _Measured(TypedDict, total=False):
    sparsity: float
    block: Block


def inspect(
    pipe: DiffusionPipeline,
    strategy: Strategy,
    prompts: Sequence[str],
    progress: Progress,
    *,
    arguments: dict[str, object],
    sampling: Sampling = Sampling(),  # frozen
    schedule: Schedule = Schedule(),  # noqa: B008  # frozen
    seed: int = 0,
    model: str = "",
) -> Inspection:
    """Run a pipeline with a strategy, and record the attention of some of its steps.

    Args:
        pipe: the model, loaded.
        strategy: what runs; `Dense()` may be inspected too, and then all steps may be sampled.
        prompts: one run for each.
        progress: a running display, which gets a task for the runs.
        arguments: of the pipeline call, without prompt.
        sampling: what is inspected.
        schedule: steps and layers that stay dense.
        seed: of the initial noise.
        model: a name for files and pictures.

    Returns:
        The view of each layer, and how it was made; `write` makes files of them.

    Raises:
        ConfigError: the pipeline's number of steps is unknown, it has no such layers, or no sampled step was sparse.
    """
    count = argument(pipe, arguments, "num_inference_steps")
    if count is None:
        raise ConfigError(f"{type(pipe).__name__} has no number of steps of its own; give --steps")
    strategy = as_strategy(strategy)
    schedule = Schedule(0) if strategy == Dense() else schedule
    steps = sampled_steps(strategy, schedule, count, sampling.steps)
    inspector = Inspector(
        strategy, steps, orders=sampling.orders, layers=sampling.layers, **_measured_at(strategy, sampling)
    )
    with diffsparse.apply(pipe, inspector, schedule=schedule):
        task = progress.add_task("runs", total=len(prompts))
        for prompt in prompts:
            generation.generation(pipe, {**arguments, "prompt": prompt}, seed, progress)
            progress.advance(task)
    views = _views(inspector)
    return Inspection(views, _facts(inspector, steps, schedule, list(prompts), seed, model))


def _measured_at(strategy: Strategy, sampling: Sampling) -> _Measured:
    """Sparsity and block at which recall is measured: the strategy's own if it has them, else those given."""
    measured: _Measured = {}
    if sparsity := sparsity_of(strategy) or sampling.sparsity:
        measured["sparsity"] = sparsity
    if block := strategy.block or sampling.block:
        measured["block"] = block
    return measured


def _views(inspector: Inspector) -> list[LayerView]:
    views = inspector.views()
    if views:
        return views
    if inspector.seen:
        raise ConfigError(
            f"--layers wants some of 0 to {len(inspector.seen) - 1}; got {', '.join(map(str, inspector.layers or ()))}"
        )
    raise ConfigError("no sampled step had self-attention that the strategy may change; sample more steps with --looks")


def _facts(
    inspector: Inspector, steps: Collection[int], schedule: Schedule, prompts: list[str], seed: int, model: str
) -> InspectionFacts:
    return {
        "model": model,
        "label": label(inspector.strategy),
        "strategy": repr(inspector.strategy),
        "schedule": repr(schedule),
        "sparsity": inspector.sparsity,
        "block": written(inspector.block),
        "layout": str(inspector.sums.layout),
        "looks": sorted(step + 1 for step in steps),
        "prompts": prompts,
        "seed": seed,
    }


# --- files and tables -----------------------------------------------------------------------------------------------


def rows(views: list[LayerView]) -> list[dict[str, object]]:
    """One row for each head of each layer: `HeadRow`, and the recall in each order."""
    return [
        {
            **_head_row(view, head),
            **{f"recall_{order}": view.recall[i, head].item() for i, order in enumerate(view.orders)},
        }
        for view in views
        for head in range(len(view.best))
    ]


def _head_row(view: LayerView, head: int) -> HeadRow:
    return {
        "model": view.model,
        "layer": view.layer,
        "number": view.number,
        "head": head,
        "raster_recall": view.raster[head].item(),
        "best_recall": view.recall[:, head].max().item(),
        "best_order": view.best[head],
        "own_order": view.own_orders[head],
        "chosen_recall": None if view.chosen is None else view.chosen[head].item(),
        "chosen_density": None if view.density is None else view.density[head].item(),
    }


def write(inspection: Inspection, out: Path) -> None:
    """Write pictures, `inspect.json` and `recall.csv` into a folder, each whole or not at all.

    Raises:
        OutputFileError: one can't be written.
    """
    views, facts = inspection.views, inspection.facts
    found = rows(views)
    write_json({SCHEMA_KEY: SCHEMA, **facts, "rows": found}, out / "inspect.json")
    write_csv(found, out / "recall.csv")
    style.save(charts.recall(views, facts), out / "recall.png")
    style.save(charts.orders(views, facts), out / "orders.png")
    for view in views:
        style.save(charts.maps(view, facts), out / f"maps-{view.number:02}-{view.model}.{view.layer}.png")


def table(views: list[LayerView]) -> list[list[str]]:
    """Lines below `HEADINGS`: recall of each layer, mean over its heads, and the best order of each head."""
    lines = []
    for view in views:
        best = view.recall.amax(0)
        heads = " ".join(f"{name}={value:.2f}" for name, value in zip(view.best, best.tolist(), strict=True))
        means = (view.raster, best, view.chosen, view.density)
        figures = ("-" if x is None else f"{x.mean():.3f}" for x in means)
        lines.append([f"{view.number} {view.layer}", *figures, heads])
    return lines


def legend(facts: InspectionFacts) -> str:
    """One line on what the table shows."""
    return (
        f"{facts['model']}, {facts['strategy']}; {facts['layout']}; steps {', '.join(map(str, facts['looks']))}; "
        f"raster and best order: the best blocks of each row at {facts['sparsity']:.0%} sparsity; chosen: the "
        "blocks that the strategy computes; summaries, if it has them, stand for the rest"
    )
