"""`diffsparse evaluate`: strategies beside dense, with metrics, videos and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsparse.errors import ConfigError
from diffsparse.schedule import Schedule
from diffsparse_pipelines import options
from diffsparse_pipelines.prompts import read_prompts, read_seeds

if TYPE_CHECKING:
    from diffsparse.guidance.preset import Preset

_RANDOM = "Speed without weights"
FILES = ("results.json", "results.csv", "report.md", "sheet.png", "tradeoff.png")  # and a video for each row


def evaluate(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for results.json, results.csv, report.md, videos, a sheet and a plot.", callback=options.file
        ),
    ],
    strategy: Annotated[
        str, typer.Option(help=f"Names separated by commas: {options.STRATEGIES}.", callback=options.text)
    ] = "digest,adaspa,random",
    sparsity: Annotated[
        str | None, typer.Option(help="Numbers in [0, 1) separated by commas.", show_default="0.8")
    ] = None,
    prompts: options.Prompts = "2",
    seeds: options.Seeds = "0",
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
            callback=options.whole(1, options.MOST_COUNT),
        ),
    ] = None,
    model: options.Model = "tiny",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    vae_tiling: options.VaeTiling = False,
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.NumFrames = None,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    block: options.Block = None,
    order: options.Order = None,
    searches: options.Searches = None,
    head_adaptive: options.HeadAdaptive = None,
    recall_threshold: options.RecallThreshold = None,
    window: options.Window = None,
    stride: options.Stride = None,
    dilation: options.Dilation = None,
    dense_first: options.DenseFirst = "0.2",
    dense_last: options.DenseLast = "0",
    dense_layers: options.DenseLayers = "",
    strict: options.Strict = False,
    heads: options.Heads = None,
    head_strength: options.HeadStrength = None,
    head_scale: options.HeadScale = None,
) -> None:
    """Compare strategies with dense attention: fidelity and speed, same prompts and seeds, one process.

    A run that was interrupted goes on where it stopped. With --heads, dense and each strategy also run under head
    guidance; all are compared with dense attention without it. With --random-weights nothing is downloaded and only
    speed is measured; where the whole model is too large or too slow, try --layers 2 and a smaller --height, --width,
    --frames.
    """
    from diffsparse_pipelines.preflight import admit

    knobs = {
        "block": block,
        "order": order,
        "searches": options.searches(searches),
        "head_adaptive": head_adaptive,
        "recall_threshold": recall_threshold,
        "window": options.cells(window, "--window", 0),
        "stride": options.cells(stride, "--stride", 1),
        "dilation": options.cells(dilation, "--dilation", 1),
    }
    chosen = options.sampling(steps, height, width, frames, guidance_scale, negative_prompt)
    plan = options.schedule(dense_first, dense_last, dense_layers)
    compared = strategies(strategy, sparsity, knobs)
    loading = {"dtype": dtype, "device": device, "offload": offload, "vae_tiling": vae_tiling}
    if layers is not None and not random_weights:
        raise ConfigError("--layers goes together with --random-weights: with its own weights a model runs whole")
    if random_weights:
        if heads is not None or offload != "none" or vae_tiling:
            raise ConfigError(
                "--random-weights times a bare transformer: leave out --heads, --offload and --vae-tiling"
            )
        admit(model, chosen, device=device, dtype=dtype)
        return _foretell(model, compared, chosen, plan, strict, layers, dtype, device, out, overwrite)
    preset = options.preset(heads, head_strength, head_scale)
    if preset is not None:
        compared = guided(compared, preset)
    texts = read_prompts(prompts, model)
    numbers = read_seeds(seeds)
    admit(model, chosen, texts, device=device, dtype=dtype, offload=offload)
    _evaluate(model, compared, preset, texts, numbers, chosen, plan, strict, loading, out, overwrite)


def _evaluate(
    model: str,
    compared: tuple[Any, ...],
    preset: Preset | None,
    texts: tuple[str, ...],
    seeds: tuple[int, ...],
    chosen: dict[str, Any],
    plan: Schedule,
    strict: bool,
    loading: dict[str, Any],
    out: Path,
    overwrite: bool,
) -> None:
    from diffsparse.files import if_stopped, writable
    from diffsparse_eval import report
    from diffsparse_eval.experiment import Experiment, Results, run
    from diffsparse_eval.pictures import write_sheet, write_tradeoff
    from diffsparse_pipelines import families
    from diffsparse_pipelines.generation import call_arguments
    from diffsparse_pipelines.preflight import check
    from diffsparse_pipelines.progress import bar, terminal

    console = terminal()
    _, family = families.resolve(model)
    for name in FILES:
        writable(out / name)
    with console.status(f"loading {model}"):
        pipe = families.load(model, **loading)
    arguments = call_arguments(pipe, families.defaults(model), chosen)
    check(pipe, arguments, plan, preset)
    experiment = Experiment(model, compared, texts, seeds, arguments, plan, strict, family.fps)
    results = Results(out, experiment.settings(pipe), overwrite)
    if results.rows:
        console.print(f"going on with {len(results.rows)} rows of {results.path}", soft_wrap=True)
    with if_stopped(results.kept), bar(console) as progress:
        for row in run(experiment, pipe, results, progress):
            progress.console.print(_line(row), highlight=False, soft_wrap=True)
    wanted = [results.find(p, s, x) for p, s, listed in experiment.jobs() for x in listed]
    rows = [row for row in wanted if row is not None]
    report.write(rows, out)
    write_sheet(rows, texts[0], seeds[0], out)
    write_tradeoff(rows, out)
    console.print(report.table(rows, "mean ± 95 % interval over prompts and seeds"))
    console.print(report.facts(rows), highlight=False)
    console.print(
        f"videos, sheet.png, tradeoff.png, report.md, results.json and results.csv are in {out}", soft_wrap=True
    )


def _foretell(
    model: str,
    compared: tuple[Any, ...],
    chosen: dict[str, Any],
    plan: Schedule,
    strict: bool,
    layers: int | None,
    dtype: str,
    device: str,
    out: Path,
    overwrite: bool,
) -> None:
    from diffsparse import Dense
    from diffsparse.files import if_stopped, writable
    from diffsparse_eval import speed
    from diffsparse_eval.experiment import Results
    from diffsparse_pipelines import families
    from diffsparse_pipelines.architectures import architecture
    from diffsparse_pipelines.progress import bar, terminal

    console = terminal()
    built = architecture(model)
    call = {**families.defaults(model), **chosen}
    place, number_format = families.target(model, device, dtype)
    trial = speed.Trial(
        model,
        built,
        compared,
        (call.get("num_frames", 1), call["height"], call["width"]),
        call["num_inference_steps"],
        2 if built.guided and call.get("guidance_scale", 2.0) > 1 else 1,
        plan,
        strict,
        layers,
        number_format,
        place,
    )
    for name in FILES[:3]:
        writable(out / name)
    results = Results(out, trial.settings(), overwrite)
    missing = [x for x in dict.fromkeys([Dense(), *compared]) if results.find("", 0, x) is None]
    if missing:
        with if_stopped(results.kept), bar(console) as progress:
            task = progress.add_task("passes", total=speed.count_passes(trial, missing))
            for row in speed.run(trial, missing, lambda: progress.advance(task)):
                results.add(row)
    rows = [found for x in dict.fromkeys([Dense(), *compared]) if (found := results.find("", 0, x))]
    speed.write(rows, out)
    console.print(speed.table(rows))
    console.print(speed.facts(rows), highlight=False)
    console.print(f"report.md, results.json and results.csv are in {out}", soft_wrap=True)


def _line(row: dict[str, Any]) -> str:
    psnr = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.2f} dB"
    seconds = f"{row['seconds']:.1f} s, dense {row['dense_seconds']:.1f} s"
    return f"{row['label']:<12} {psnr:>9}  {seconds}  {row['prompt'][:60]}"


def guided(compared: tuple[Any, ...], preset: Preset) -> tuple[Any, ...]:
    """The strategies, and dense and each of them once more under head guidance."""
    from diffsparse import Dense
    from diffsparse_eval.experiment import Guided

    return *compared, *(Guided(strategy, preset) for strategy in dict.fromkeys((Dense(), *compared)))


def strategies(names: str, sparsity: str | None, knobs: dict[str, Any]) -> tuple[Any, ...]:
    """Each named strategy at each sparsity; those without that knob once.

    Raises:
        UnknownNameError, ConfigError: a name, number or knob that doesn't fit.
    """
    shares = [None] if sparsity is None else options.shares(sparsity, "--sparsity")
    return tuple(options.strategies(names, shares, knobs))
