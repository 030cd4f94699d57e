"""`diffsparse inspect`: pictures and numbers of attention, and of what a strategy computes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsparse.errors import ConfigError
from diffsparse_pipelines import values
from diffsparse_pipelines.commands import checks
from diffsparse_pipelines.commands.options import (
    MODEL,
    SAMPLING,
    STRATEGIES,
    ModelOptions,
    Prompts,
    SamplingOptions,
    Seed,
    Sparsity,
    SparsityOptions,
)
from diffsparse_pipelines.prompts import read_prompts

if TYPE_CHECKING:
    from diffsparse.schedule import Schedule
    from diffsparse.strategies import Strategy
    from diffsparse_eval.attention import Inspection


@dataclass(frozen=True)
class InspectedOptions(SparsityOptions):
    """Knobs of the strategy that is inspected; its name and sparsity are options of the command."""

    strategy: str = ""
    sparsity: float | None = None
    window: str | None = None
    stride: str | None = None
    dilation: str | None = None
    strict: bool = False

    def made(self) -> Strategy:
        """The one strategy; "dense" has neither sparsity nor block: there both define how recall is measured.

        Raises:
            ConfigError: several strategies, or a knob that it doesn't have.
        """
        dense = self.strategy.strip().lower() == "dense"
        options = replace(self, sparsity=None, block=None) if dense else self
        made = options.strategies()
        if len(made) != 1:
            raise ConfigError(f"inspect wants one strategy; got {self.strategy!r}")
        return made[0]

    @property
    def schedule(self) -> Schedule:
        """The dense steps and layers; none beside those of a strategy that is always dense."""
        from diffsparse.schedule import Schedule

        return Schedule(0) if self.strategy.strip().lower() == "dense" else super().schedule


INSPECTED = InspectedOptions()


def inspect(
    out: Annotated[
        Path, typer.Option(help="Folder for the pictures, inspect.json and recall.csv.", callback=checks.file)
    ],
    strategy: Annotated[
        str, typer.Option(help=f"{STRATEGIES}.", rich_help_panel="Strategy", callback=checks.text)
    ] = "adaspa",
    sparsity: Sparsity = None,
    orders: Annotated[
        str,
        typer.Option(
            help="Candidate token orders, separated by commas: FHW, ..., tile4x8x8, hilbert.", callback=checks.text
        ),
    ] = "FHW,FWH,HFW,HWF,WFH,WHF",
    layers: Annotated[
        str, typer.Option(help="Self-attention layers, by number from 0, separated by commas.", show_default="all")
    ] = "",
    looks: Annotated[
        int,
        typer.Option(help="Steps that are sampled, evenly spread.", callback=checks.whole(1, values.MOST_COUNT)),
    ] = 3,
    prompts: Prompts = "1",
    seed: Seed = 0,
    model: ModelOptions = MODEL,
    sampling: SamplingOptions = SAMPLING,
    knobs: InspectedOptions = INSPECTED,
) -> None:
    """Draw attention mass, the blocks that a strategy computes, and recall by layer and head, in several token orders.

    Recall is the softmax mass inside the blocks that are kept. "raster" and "best" ask what the best blocks of each
    row could hold, before and after reordering; "chosen" is what the strategy's own blocks do hold.
    """
    from diffsparse.files import writable
    from diffsparse_eval.attention import FILES, Sampling, inspect
    from diffsparse_pipelines.preflight import check
    from diffsparse_pipelines.progress import bar, terminal

    knobs = replace(knobs, strategy=strategy, sparsity=sparsity)
    sampled = Sampling(looks, values.names(orders), _layers(layers), sparsity, values.block(knobs.block, "--block"))
    made, schedule = knobs.made(), knobs.schedule
    texts = read_prompts(prompts, model.name)
    model.admit(sampling.arguments(), texts)
    for name in FILES:
        writable(out / name)
    pipe = model.load()
    call = model.call_arguments(pipe, sampling.arguments())
    check(pipe, call, schedule, searches=knobs.later_searches)
    with bar(terminal()) as progress:
        found = inspect(
            pipe,
            made,
            texts,
            progress,
            arguments=call,
            sampling=sampled,
            schedule=schedule,
            seed=seed,
            model=model.name,
        )
    _write(found, out)


def _layers(text: str) -> tuple[int, ...] | None:
    numbers = tuple(n for n in values.amounts(text, "--layers") if isinstance(n, int) and n >= 0)
    if len(numbers) != len(values.names(text)):
        raise ConfigError(f"--layers wants whole numbers from 0, separated by commas; got {text!r}")
    return numbers or None


def _write(found: Inspection, out: Path) -> None:
    from diffsparse.files import if_stopped
    from diffsparse_eval import attention
    from diffsparse_pipelines.progress import say, show_table, terminal

    with terminal().status("drawing"), if_stopped(lambda: f"what is drawn so far is in {out}"):
        attention.write(found, out)
    show_table(attention.table(found.views), "lrrrrl", attention.HEADINGS, "recall, mean over heads", wrap=True)
    say(attention.legend(found.facts), highlight=False)
    say(f"maps, recall.png, orders.png, inspect.json and recall.csv are in {out}")
