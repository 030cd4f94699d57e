"""`diffsparse calibrate`: an offline search over a few prompts, which ends with a plan."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsparse.errors import ConfigError, OutputFileError, UnknownNameError
from diffsparse_pipelines import options
from diffsparse_pipelines.prompts import read_prompts, read_seeds

if TYPE_CHECKING:
    from diffsparse.plans.plan import Plan

_SEARCH, _PARO, _VDIT = "Search", "Search of paro", "Search of sparse-vdit"


def calibrate(
    out: Annotated[Path, typer.Option(help="The plan to write, a .safetensors file.", callback=options.file)],
    strategy: Annotated[str, typer.Option(help="Whose plan: paro or sparse-vdit.", rich_help_panel=_SEARCH)] = "paro",
    sparsity: options.Sparsity = None,
    block: options.Block = None,
    groups: Annotated[
        int | None,
        typer.Option(
            help="Parts of the run with masks or modes of their own.",
            show_default="paro 4, sparse-vdit one for each step",
            rich_help_panel=_SEARCH,
            callback=options.whole(1, options.MOST_COUNT),
        ),
    ] = None,
    looks: Annotated[
        int,
        typer.Option(
            help="Steps at which a first, dense run is looked at.",
            rich_help_panel=_SEARCH,
            callback=options.whole(1, options.MOST_COUNT),
        ),
    ] = 4,
    orders: Annotated[
        str | None,
        typer.Option(
            help="Candidate token orders, separated by commas: FHW, ..., tile4x8x8, hilbert.",
            show_default="the six of the axes",
            rich_help_panel=_PARO,
            callback=options.text,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="How orders are ranked: recall, or paper (sparsity, incoherence).",
            show_default="recall",
            rich_help_panel=_PARO,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Weight of sparsity in the paper's metric.",
            show_default="0.5",
            rich_help_panel=_PARO,
            callback=options.number(most=1),
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Of the numbers that attention multiplies: 16, or 8 or 4, emulated.",
            show_default="16",
            rich_help_panel=_PARO,
            callback=options.whole(4, 16),
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Largest relative error and cost at which a head is sparse.",
            show_default="0.1",
            rich_help_panel=_VDIT,
            callback=options.number(),
        ),
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(
            help="Of the cost beside the error (the paper's lambda).",
            show_default="0.1",
            rich_help_panel=_VDIT,
            callback=options.number(),
        ),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            help="Of a mode: sparsity, or time as measured here.", show_default="sparsity", rich_help_panel=_VDIT
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Candidates beside full, separated by commas.",
            show_default="skip,diagonal,multi-diagonal,stripe",
            rich_help_panel=_VDIT,
            callback=options.text,
        ),
    ] = None,
    prompts: options.Prompts = "2",
    seeds: options.Seeds = "0",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing plan.")] = False,
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
) -> None:
    """Search offline, on a few prompts, what a strategy that runs on a plan wants: orders and masks, or modes.

    A search that was interrupted goes on where it stopped, and ends with the same plan.
    """
    knobs = {
        "sparsity": sparsity,
        "block": block,
        "looks": looks,
        "orders": orders and options.names(orders),
        "metric": metric,
        "alpha": alpha,
        "bits": bits,
        "epsilon": epsilon,
        "weight": weight,
        "cost": cost,
        "modes": modes and options.names(modes),
        "groups": groups,
    }
    from diffsparse_pipelines import preflight

    search = _search(strategy, knobs)
    chosen = options.sampling(steps, height, width, frames, guidance_scale, negative_prompt)
    pairs = [(prompt, seed) for prompt in read_prompts(prompts, model) for seed in read_seeds(seeds)]
    loading = {"dtype": dtype, "device": device, "offload": offload, "vae_tiling": vae_tiling}
    preflight.admit(model, loading, chosen, [prompt for prompt, _ in pairs])
    _check_out(out, overwrite)
    _calibrate(model, search, pairs, chosen, loading, out)


def _search(name: str, knobs: dict[str, Any]) -> Any:
    from diffsparse.errors import closest
    from diffsparse.strategies import SEARCHES, with_knobs

    if name not in SEARCHES:
        raise UnknownNameError(f"no search is called {name!r}; known: {closest(name, SEARCHES)}")
    known = {key: {knob.name for knob in fields(cls)} for key, cls in SEARCHES.items()}
    options.check_knobs(knobs, {name: known[name]}, known)
    return with_knobs(SEARCHES[name], knobs)


def _check_out(out: Path, overwrite: bool) -> None:
    from diffsparse.files import writable
    from diffsparse.plans.store import partial_path

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out wants a .safetensors file; got {out.name!r}")
    writable(out)
    writable(partial_path(out))
    if out.exists() and not overwrite:
        raise OutputFileError(f"{out} exists; choose another --out or use --overwrite")


def _calibrate(
    model: str,
    search: Any,
    pairs: list[tuple[str, int]],
    chosen: dict[str, Any],
    loading: dict[str, Any],
    out: Path,
) -> None:
    from diffsparse.insight.calibration import calibrate as search_over
    from diffsparse_pipelines import families
    from diffsparse_pipelines.generate import call_arguments, generation
    from diffsparse_pipelines.preflight import check
    from diffsparse_pipelines.progress import bar, terminal

    console = terminal()
    with console.status(f"loading {model}"):
        pipe = families.load(model, **loading)
    arguments = call_arguments(pipe, families.defaults(model), chosen)
    check(pipe, arguments)
    with bar(console) as progress:
        task = progress.add_task("runs", total=search.passes * len(pairs))

        def run(prompt: str, seed: int) -> None:
            generation(pipe, {**arguments, "prompt": prompt}, seed, progress)

        calls = [lambda pair=pair: run(*pair) for pair in pairs]
        names = [f"{prompt} | {seed} | {arguments}" for prompt, seed in pairs]
        plan = search_over(pipe, search, calls, names, out, lambda done: progress.update(task, completed=done))
    console.print(summary(plan), highlight=False)
    console.print(f"-> {out} ({out.stat().st_size / 2**20:.2f} MiB)", soft_wrap=True)


def summary(plan: Plan) -> str:
    """A few lines on what a plan holds."""
    from diffsparse.strategies import STRATEGIES

    rows = [("strategy", plan.strategy), ("layout", str(plan.layout)), ("models", ", ".join(plan.models.values()))]
    facts = STRATEGIES[plan.strategy](plan).facts()
    rows += [(name, str(value)) for name, value in plan.settings.items() if name not in facts]
    rows += facts.items()
    return "\n".join(f"{name:<10} {value}" for name, value in rows)
