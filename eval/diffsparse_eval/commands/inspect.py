"""`diffsparse inspect`: pictures and numbers of attention, of what a strategy computes of it; attention on file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    from diffusers import DiffusionPipeline

    from diffsparse.schedule import Schedule
    from diffsparse.strategies import Strategy
    from diffsparse_eval.attention import Inspection
    from diffsparse_eval.replay import Recorded

_FILES = "Attention on file"
_STRATEGY, _LOOKS, _PROMPTS = "digest", 3, "1"


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


@dataclass(frozen=True)
class LookOptions:
    """Where in a run is looked, and in which token orders."""

    orders: Annotated[
        str,
        typer.Option(
            help="Candidate token orders, separated by commas: FHW, ..., tile4x8x8, hilbert.", callback=checks.text
        ),
    ] = "FHW,FWH,HFW,HWF,WFH,WHF"
    layers: Annotated[
        str,
        typer.Option(
            help="Self-attention layers, by number from 0, separated by commas.",
            show_default="all; with --record 3, evenly spread",
        ),
    ] = ""
    looks: Annotated[
        int | None,
        typer.Option(
            help="Steps that are sampled, evenly spread; with --record, pairs of consecutive steps.",
            show_default="3; with --record 2",
            callback=checks.whole(1, values.MOST_COUNT),
        ),
    ] = None

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """Numbers of the layers; None for the command's own choice.

        Raises:
            ConfigError: anything but whole numbers from 0.
        """
        numbers = tuple(n for n in values.amounts(self.layers, "--layers") if isinstance(n, int) and n >= 0)
        if len(numbers) != len(values.names(self.layers)):
            raise ConfigError(f"--layers wants whole numbers from 0, separated by commas; got {self.layers!r}")
        return numbers or None


@dataclass(frozen=True)
class FileOptions:
    """Attention that is kept on file, and files that methods are tried on."""

    record: Annotated[
        Path | None,
        typer.Option(
            help="A .safetensors file: keep q, k, v of some calls of a dense run there, instead of drawing.",
            rich_help_panel=_FILES,
            callback=checks.file,
        ),
    ] = None
    heads: Annotated[
        str,
        typer.Option(
            help="Heads to record, by number from 0, separated by commas.",
            show_default="2, evenly spread",
            rich_help_panel=_FILES,
        ),
    ] = ""
    most_gib: Annotated[
        float, typer.Option(help="Largest recording, in GiB.", rich_help_panel=_FILES, callback=checks.number())
    ] = 4.0
    replay: Annotated[
        Path | None,
        typer.Option(
            help="A file of --record: try methods on it, without a model.", rich_help_panel=_FILES, callback=checks.file
        ),
    ] = None

    def recorded(self, look: LookOptions) -> Recorded:
        """What of a run is recorded."""
        from diffsparse_eval.replay import Recorded

        heads = values.wholes(self.heads, "--heads", 0, values.MOST_COUNT) if self.heads.strip() else None
        usual = Recorded()
        return Recorded(look.looks or usual.pairs, look.numbers or usual.layers, heads or usual.heads, self.most_gib)


INSPECTED, LOOK, FILES = InspectedOptions(), LookOptions(), FileOptions()


def inspect(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures, inspect.json and recall.csv; for replay.json.", callback=checks.file),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help=f"{STRATEGIES}.",
            show_default="digest; with --replay all that want no plan",
            rich_help_panel="Strategy",
            callback=checks.text,
        ),
    ] = None,
    sparsity: Sparsity = None,
    look: LookOptions = LOOK,
    prompts: Prompts = _PROMPTS,
    seed: Seed = 0,
    model: ModelOptions = MODEL,
    sampling: SamplingOptions = SAMPLING,
    knobs: InspectedOptions = INSPECTED,
    files: FileOptions = FILES,
) -> None:
    """Draw attention mass, the blocks that a strategy computes, and recall by layer and head, in several token orders.

    Recall is the softmax mass inside the blocks that are kept. "raster" and "best" ask what the best blocks of each row
    could hold, before and after reordering; "chosen" is what the strategy's own blocks do hold; summaries, if it has
    them, stand for the rest.

    --record keeps real attention on file instead; --replay shows what each method makes of it at 10, 20 and 30 % of
    the work: error of the output, and what is missing.
    """
    knobs = replace(knobs, strategy=strategy or "", sparsity=sparsity)
    run = _Run(prompts, seed, model, sampling)
    if files.replay is not None:
        others = {"--layers, --looks, --orders": look != LOOK, "--record": replace(files, replay=None) != FILES}
        _refuse("--replay", {**run.given, **others, "--sparsity": sparsity is not None})
        _replay(files.replay, knobs, model, out)
    elif files.record is not None:
        _refuse("--record", {"--out": out, "--strategy": strategy, "knobs of a strategy": knobs != INSPECTED})
        _record(files.record, files.recorded(look), run)
    elif out is not None:
        _refuse("--out", {"options of --record": files != FILES})
        _draw(replace(knobs, strategy=strategy or _STRATEGY), look, run, out)
    else:
        raise ConfigError("inspect wants --out FOLDER for its pictures, or --record FILE, or --replay FILE")


@dataclass(frozen=True)
class _Run:
    """The run that is looked at."""

    prompts: str
    seed: int
    model: ModelOptions
    sampling: SamplingOptions

    @property
    def given(self) -> dict[str, object]:
        """What of it was chosen, by option; where and in which number format something runs is another matter."""
        placed = replace(self.model, device=MODEL.device, dtype=MODEL.dtype)
        sized = any(value is not None for value in vars(self.sampling).values())
        chosen = {"--model": placed != MODEL, "--prompts": self.prompts != _PROMPTS, "--seed": self.seed}
        return {**chosen, "sizes, steps and guidance": sized}

    def texts(self) -> Sequence[str]:
        """The prompts, after a look at what can be known before the model is loaded."""
        texts = read_prompts(self.prompts, self.model.name)
        self.model.admit(self.sampling.arguments(), texts)
        return texts

    def loaded(self, knobs: InspectedOptions) -> tuple[DiffusionPipeline, dict[str, object]]:
        """The pipeline, and what to call it with."""
        from diffsparse_pipelines.preflight import check

        pipe = self.model.load()
        call = self.model.call_arguments(pipe, self.sampling.arguments())
        check(pipe, call, knobs.schedule, searches=knobs.later_searches)
        return pipe, call


def _refuse(mode: str, given: Mapping[str, object]) -> None:
    """Raise ConfigError for options that were given and mean nothing beside `mode`."""
    useless = [option for option, value in given.items() if value]
    if useless:
        raise ConfigError(f"{mode} takes no {', '.join(useless)}; leave that out")


def _draw(knobs: InspectedOptions, look: LookOptions, run: _Run, out: Path) -> None:
    from diffsparse.files import writable
    from diffsparse_eval.attention import FILES as NAMES
    from diffsparse_eval.attention import Sampling, inspect
    from diffsparse_pipelines.progress import bar, terminal

    sampled = Sampling(
        look.looks or _LOOKS,
        values.names(look.orders),
        look.numbers,
        knobs.sparsity,
        values.block(knobs.block, "--block"),
    )
    made, schedule = knobs.made(), knobs.schedule
    texts = run.texts()
    for name in NAMES:
        writable(out / name)
    pipe, call = run.loaded(knobs)
    with bar(terminal()) as progress:
        found = inspect(
            pipe,
            made,
            texts,
            progress,
            arguments=call,
            sampling=sampled,
            schedule=schedule,
            seed=run.seed,
            model=run.model.name,
        )
    _write(found, out)


def _record(file: Path, what: Recorded, run: _Run) -> None:
    """Keep some attention of a dense run on file."""
    from diffsparse.files import writable
    from diffsparse_eval.replay import record
    from diffsparse_pipelines.progress import bar, say, status, terminal

    texts = run.texts()
    if len(texts) != 1:
        raise ConfigError(f"--record wants one prompt; got {len(texts)}")
    writable(file)
    pipe, call = run.loaded(INSPECTED)
    with bar(terminal()) as progress:
        found = record(pipe, texts[0], progress, arguments=call, what=what, seed=run.seed, model=run.model.name)
    with status("writing"):
        found.save(file)
    size = f"{len(found.calls)} calls, {file.stat().st_size / 2**20:.1f} MiB"
    say(f"{size}, are in {file}; diffsparse inspect --replay {file} tries methods on them")


def _replay(file: Path, knobs: InspectedOptions, model: ModelOptions, out: Path | None) -> None:
    """Try methods on recorded attention."""
    from diffsparse.files import writable, write_json
    from diffsparse.insight.recording import DTYPE, Recording
    from diffsparse_eval import replay
    from diffsparse_eval.rows import SCHEMA, SCHEMA_KEY
    from diffsparse_pipelines import families
    from diffsparse_pipelines.progress import bar, say, show_table, status, terminal

    strategies = replay.at_each_sparsity(replace(knobs, strategy=knobs.strategy or replay.methods()))
    device, dtype = families.target(MODEL.name, model.device, model.dtype)
    dtype = DTYPE if model.dtype == "auto" and device != "cpu" else dtype
    if out is not None:
        writable(out / replay.FILE)
    with status(f"reading {file}"):
        recording = Recording.load(file)
    with bar(terminal()) as progress:
        rows = replay.replay(recording, strategies, progress, device=device, dtype=dtype)
    facts = replay.facts(recording)
    if out is not None:
        write_json({SCHEMA_KEY: SCHEMA, **facts, "rows": rows}, out / replay.FILE)
    show_table(replay.table(rows), "l" + "r" * 8, replay.HEADINGS, "recorded attention", replay.SPARE)
    for note in replay.notes(rows):
        say(note, highlight=False)
    say(replay.legend(facts, rows), highlight=False, fill=True)


def _write(found: Inspection, out: Path) -> None:
    from diffsparse.files import if_stopped
    from diffsparse_eval import attention
    from diffsparse_pipelines.progress import say, show_table, status

    with status("drawing"), if_stopped(lambda: f"what is drawn so far is in {out}"):
        attention.write(found, out)
    show_table(attention.table(found.views), "lrrrrl", attention.HEADINGS, "recall, mean over heads")
    say(attention.legend(found.facts), highlight=False, fill=True)
    say(f"maps, recall.png, orders.png, inspect.json and recall.csv are in {out}")
