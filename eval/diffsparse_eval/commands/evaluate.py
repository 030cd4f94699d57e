"""`diffsparse evaluate`: strategies beside dense, with metrics, videos and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsparse.errors import ConfigError
from diffsparse_pipelines import values
from diffsparse_pipelines.commands import checks
from diffsparse_pipelines.commands.options import (
    CACHED,
    GUIDANCE,
    MODEL,
    SAMPLING,
    STRATEGIES,
    GuidanceOptions,
    ModelOptions,
    Prompts,
    SamplingOptions,
    Seeds,
    SparsityOptions,
)
from diffsparse_pipelines.prompts import read_prompts, read_seeds

if TYPE_CHECKING:
    from diffsparse.guidance.preset import Preset
    from diffsparse.seam.caching import Caching
    from diffsparse.strategies import Strategy
    from diffsparse_eval.rows import ResultRow
    from diffsparse_eval.speed import SpeedTest

_RANDOM = "Speed without weights"


@dataclass(frozen=True)
class ComparedOptions(SparsityOptions):
    """Knobs of all strategies that are compared; their names and sparsities are options of the command."""

    strategy: str = ""
    sparsity: float | None = None


COMPARED = ComparedOptions()


def evaluate(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for results.json, results.csv, report.md, videos, a sheet and a plot.", callback=checks.file
        ),
    ],
    strategy: Annotated[
        str, typer.Option(help=f"Names separated by commas: {STRATEGIES}{CACHED}.", callback=checks.text)
    ] = "digest,adaspa,random",
    sparsity: Annotated[
        str | None, typer.Option(help="Numbers in [0, 1) separated by commas.", show_default="0.8")
    ] = None,
    prompts: Prompts = "2",
    seeds: Seeds = "0",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop results that the folder holds.")] = False,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Time a known architecture without its weights: one pass of each kind, the rest by the schedule.",
            rich_help_panel=_RANDOM,
        ),
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Build and time so many blocks of each kind, and scale.",
            show_default="all",
            rich_help_panel=_RANDOM,
            callback=checks.whole(1, values.MOST_COUNT),
        ),
    ] = None,
    model: ModelOptions = MODEL,
    sampling: SamplingOptions = SAMPLING,
    knobs: ComparedOptions = COMPARED,
    guidance: GuidanceOptions = GUIDANCE,
) -> None:
    """Compare strategies with dense attention: fidelity and speed, same prompts and seeds, one process.

    A run that was interrupted goes on where it stopped. With --heads, dense and each strategy also run under head
    guidance; all are compared with dense attention without it. With --random-weights nothing is downloaded and only
    speed is measured; where the whole model is too large or too slow, try --layers 2 and a smaller --height, --width,
    --frames.
    """
    knobs = replace(knobs, strategy=strategy)
    own = knobs.mild(model.name, sampling.arguments()).sparsity
    shares = [own] if sparsity is None else values.shares(sparsity, "--sparsity")
    compared = knobs.stacks(shares)
    if layers is not None and not random_weights:
        raise ConfigError("--layers goes together with --random-weights: with its own weights a model runs whole")
    if random_weights:
        _check_random(model, guidance)
        return _without_weights(model, sampling, knobs, layers, knobs.strategies(shares), out, overwrite)
    preset = guidance.preset()
    texts, numbers = read_prompts(prompts, model.name), read_seeds(seeds)
    model.admit(sampling.arguments(), texts)
    _Comparison(model, sampling, knobs, compared, preset, texts, numbers).write(out, overwrite)


@dataclass(frozen=True)
class _Comparison:
    """An evaluation with the model's weights."""

    model: ModelOptions
    sampling: SamplingOptions
    knobs: SparsityOptions
    stacks: Sequence[tuple[Caching | None, Strategy]]
    preset: Preset | None
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def write(self, out: Path, overwrite: bool) -> None:
        """Load the model, run what is missing in `out`, and show the results."""
        from diffsparse_eval.compared import compared, guided
        from diffsparse_eval.evaluation import FILES, check_files, check_packages, evaluate
        from diffsparse_eval.experiment import Experiment
        from diffsparse_pipelines import families
        from diffsparse_pipelines.preflight import check
        from diffsparse_pipelines.progress import bar, terminal

        _, family = families.resolve(self.model.name)
        check_packages()
        check_files(out, FILES)
        pipe, schedule = self.model.load(), self.knobs.schedule
        call = self.model.call_arguments(pipe, self.sampling.arguments())
        check(pipe, call, schedule, self.preset, self.knobs.later_searches)
        plain = compared(self.stacks)
        strategies = guided(plain, self.preset) if self.preset else plain
        experiment = Experiment(
            self.model.name, strategies, self.prompts, self.seeds, call, schedule, self.knobs.strict, family.fps
        )
        with bar(terminal()) as progress:
            rows = evaluate(pipe, experiment, out, progress, overwrite=overwrite, say=progress.say)
        _show(rows, out)


def _show(rows: list[ResultRow], out: Path) -> None:
    """Show the summary of the rows, and where the files are."""
    from diffsparse_eval import report
    from diffsparse_pipelines.progress import say, show_table

    headings, lines = report.table(rows)
    say("")
    show_table(lines, "l" + "r" * (len(headings) - 1), headings, spare=report.SPARE)
    say(f"\n{report.caption(rows)}{report.doubts(rows)}\n{report.facts(rows)}", highlight=False, fill=True)
    say(f"\nsheet.png, tradeoff.png, videos, report.md, results.json and results.csv are in {out}")


def _check_random(model: ModelOptions, guidance: GuidanceOptions) -> None:
    if guidance.heads is not None or model.offload != "none" or model.vae_tiling:
        raise ConfigError("--random-weights times the transformer alone: leave out --heads, --offload and --vae-tiling")


def _without_weights(
    model: ModelOptions,
    sampling: SamplingOptions,
    knobs: SparsityOptions,
    layers: int | None,
    compared: Sequence[Strategy],
    out: Path,
    overwrite: bool,
) -> None:
    """Time the architecture alone, and show the results."""
    from diffsparse_eval import speed
    from diffsparse_eval.evaluation import TABLES, check_files
    from diffsparse_pipelines.progress import bar, say, show_table, terminal

    model.admit(sampling.arguments())
    test = _speed_test(model, sampling, knobs, layers)
    check_files(out, TABLES)
    with bar(terminal()) as progress:
        rows = speed.measure(test, compared, out, progress, overwrite)
    headings, lines = speed.table(rows)
    title = "seconds of a step by kind, and of the run"
    show_table(lines, "l" + "r" * (len(headings) - 1), headings, title, spare=speed.SPARE)
    say(speed.facts(rows), highlight=False, fill=True)
    say(f"report.md, results.json and results.csv are in {out}")


def _speed_test(
    model: ModelOptions, sampling: SamplingOptions, knobs: SparsityOptions, layers: int | None
) -> SpeedTest:
    from diffsparse_eval.speed import SpeedTest
    from diffsparse_pipelines import families
    from diffsparse_pipelines.architectures import architecture

    built = architecture(model.name)
    call: families.Call = {**families.defaults(model.name), **sampling.arguments()}
    device, dtype = families.target(model.name, model.device, model.dtype)
    return SpeedTest(
        model.name,
        built,
        size=(call.get("num_frames", 1), call["height"], call["width"]),
        steps=call["num_inference_steps"],
        passes=2 if built.guided and call.get("guidance_scale", 2.0) > 1 else 1,
        schedule=knobs.schedule,
        strict=knobs.strict,
        layers=layers,
        dtype=dtype,
        device=device,
    )
