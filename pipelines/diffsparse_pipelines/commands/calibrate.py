"""`diffsparse calibrate`: an offline search over a few prompts, which ends with a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsparse.errors import ConfigError, OutputFileError, UnknownNameError
from diffsparse_pipelines import values
from diffsparse_pipelines.commands import checks
from diffsparse_pipelines.commands.options import (
    MODEL,
    SAMPLING,
    Block,
    ModelOptions,
    Prompts,
    SamplingOptions,
    Seeds,
    Sparsity,
    check_knobs,
)
from diffsparse_pipelines.prompts import read_prompts, read_seeds

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffsparse.plans.plan import Plan
    from diffsparse.strategies.search import Search

_SEARCH, _PARO, _VDIT = "Search", "Search of paro", "Search of sparse-vdit"
_COUNT = checks.whole(1, values.MOST_COUNT)


@dataclass(frozen=True)
class SearchOptions:
    """Whose plan is searched, and the knobs of its search; None is the search's own."""

    strategy: Annotated[str, typer.Option(help="Whose plan: paro or sparse-vdit.", rich_help_panel=_SEARCH)] = "paro"
    sparsity: Sparsity = None
    block: Block = None
    groups: Annotated[
        int | None,
        typer.Option(
            help="Parts of the run with masks or modes of their own.",
            show_default="paro 4, sparse-vdit one for each step",
            rich_help_panel=_SEARCH,
            callback=_COUNT,
        ),
    ] = None
    looks: Annotated[
        int,
        typer.Option(
            help="Steps of a first, dense run that are sampled.",
            rich_help_panel=_SEARCH,
            callback=_COUNT,
        ),
    ] = 4
    orders: Annotated[
        str | None,
        typer.Option(
            help="Candidate token orders, separated by commas: FHW, ..., tile4x8x8, hilbert.",
            show_default="the six of the axes",
            rich_help_panel=_PARO,
            callback=checks.text,
        ),
    ] = None
    metric: Annotated[
        str | None,
        typer.Option(
            help="How orders are ranked: recall, or paper (sparsity, incoherence).",
            show_default="recall",
            rich_help_panel=_PARO,
        ),
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Weight of sparsity in the paper's metric.",
            show_default="0.5",
            rich_help_panel=_PARO,
            callback=checks.number(most=1),
        ),
    ] = None
    bits: Annotated[
        int | None,
        typer.Option(
            help="Of the numbers that attention multiplies: 16, or 8 or 4, emulated.",
            show_default="16",
            rich_help_panel=_PARO,
            callback=checks.whole(4, 16),
        ),
    ] = None
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Largest relative error and cost at which a head is sparse.",
            show_default="0.1",
            rich_help_panel=_VDIT,
            callback=checks.number(),
        ),
    ] = None
    weight: Annotated[
        float | None,
        typer.Option(
            help="Of the cost beside the error (the paper's lambda).",
            show_default="0.1",
            rich_help_panel=_VDIT,
            callback=checks.number(),
        ),
    ] = None
    cost: Annotated[
        str | None,
        typer.Option(
            help="Of a mode: sparsity, or time as measured here.", show_default="sparsity", rich_help_panel=_VDIT
        ),
    ] = None
    modes: Annotated[
        str | None,
        typer.Option(
            help="Candidates beside full, separated by commas.",
            show_default="skip,diagonal,multi-diagonal,stripe",
            rich_help_panel=_VDIT,
            callback=checks.text,
        ),
    ] = None

    def search(self) -> Search:
        """The search, with the knobs that were given.

        Raises:
            UnknownNameError: no such search. ConfigError: a knob that it doesn't have, or out of range.
        """
        from diffsparse.errors import closest
        from diffsparse.strategies import SEARCHES, knobs_of, with_knobs

        if self.strategy not in SEARCHES:
            raise UnknownNameError(f"no search is called {self.strategy!r}; known: {closest(self.strategy, SEARCHES)}")
        knobs = {name: value for name, value in vars(self).items() if name != "strategy"}
        knobs["block"] = values.block(self.block, "--block")
        for name in ("orders", "modes"):
            knobs[name] = knobs[name] and values.names(knobs[name])
        known = {key: set(knobs_of(cls)) for key, cls in SEARCHES.items()}
        check_knobs(knobs, {self.strategy: known[self.strategy]}, known)
        search: Search = with_knobs(SEARCHES[self.strategy], knobs)
        return search


SEARCHING = SearchOptions()


def calibrate(
    out: Annotated[Path, typer.Option(help="The plan to write, a .safetensors file.", callback=checks.file)],
    searching: SearchOptions = SEARCHING,
    prompts: Prompts = "2",
    seeds: Seeds = "0",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing plan.")] = False,
    model: ModelOptions = MODEL,
    sampling: SamplingOptions = SAMPLING,
) -> None:
    """Search offline, on a few prompts, what a strategy that runs on a plan wants: orders and masks, or modes.

    A search that was interrupted goes on where it stopped, and ends with the same plan.

    Args:
        out: the plan to write, a .safetensors file; the work so far is kept beside it.
        searching: whose plan, and the knobs of its search.
        prompts: how many built-in prompts, or a file with one a line.
        seeds: whole numbers separated by commas; each prompt is run with each.
        overwrite: replace an existing plan.
        model: which model, and how it is loaded.
        sampling: size, steps and classifier-free guidance.

    Raises:
        ConfigError, UnknownNameError: an option that doesn't fit, or work so far of another search.
        InputFileError: a file that can't be read. OutputFileError: `out` exists, or can't be written.
    """
    from diffsparse.files import if_stopped
    from diffsparse_pipelines.preflight import check
    from diffsparse_pipelines.progress import say

    search, call = searching.search(), sampling.arguments()
    pairs = [(prompt, seed) for prompt in read_prompts(prompts, model.name) for seed in read_seeds(seeds)]
    model.admit(call, [prompt for prompt, _ in pairs])
    _check_out(out, overwrite)
    with if_stopped(lambda: _kept(out)):
        pipe = model.load()
        arguments = model.call_arguments(pipe, call)
        check(pipe, arguments)
    plan = _calibrate(pipe, search, pairs, arguments, out)
    say(summary(plan), highlight=False)
    say(f"-> {out} ({out.stat().st_size / 2**20:.2f} MiB)")


def _check_out(out: Path, overwrite: bool) -> None:
    from diffsparse.files import writable
    from diffsparse.plans.store import partial_path

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out wants a .safetensors file; got {out.name!r}")
    writable(out)
    writable(partial_path(out))
    if out.exists() and not overwrite:
        raise OutputFileError(f"{out} exists; choose another --out or use --overwrite")


def _kept(out: Path) -> str:
    """What is kept of an earlier attempt, in a search that is stopped before its first run."""
    from diffsparse.plans.store import partial_path

    if not partial_path(out).exists():
        return "nothing was written"
    return f"the runs of an earlier attempt are kept in {partial_path(out)}; the same command goes on with the next"


def _calibrate(
    pipe: DiffusionPipeline, search: Search, pairs: list[tuple[str, int]], arguments: dict[str, object], out: Path
) -> Plan:
    """Run the search over prompts and seeds, with a progress bar."""
    from diffsparse.insight.calibration import calibrate as search_over
    from diffsparse_pipelines.generation import generation
    from diffsparse_pipelines.progress import bar, terminal

    with bar(terminal()) as progress:
        task = progress.add_task("runs", total=search.passes * len(pairs))

        def run(prompt: str, seed: int) -> None:
            generation(pipe, {**arguments, "prompt": prompt}, seed, progress)

        calls = [lambda pair=pair: run(*pair) for pair in pairs]
        names = [f"{prompt} | {seed} | {arguments}" for prompt, seed in pairs]
        return search_over(pipe, search, calls, names, out, lambda done: progress.update(task, completed=done))


def summary(plan: Plan) -> str:
    """A few lines on what a plan holds."""
    from diffsparse.strategies import of_plan

    rows = [("strategy", plan.strategy), ("layout", str(plan.layout)), ("models", ", ".join(plan.models.values()))]
    facts = of_plan(plan).facts()
    rows += [(name, str(value)) for name, value in plan.settings.items() if name not in facts]
    rows += facts.items()
    return "\n".join(f"{name:<10} {value}" for name, value in rows)
