"""`diffsparse hunt`: HeadHunter over a few prompts, which ends with a preset and a check on prompts it did not see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsparse.errors import ConfigError, OutputFileError
from diffsparse_pipelines import values
from diffsparse_pipelines.commands import checks
from diffsparse_pipelines.commands.options import MODEL, SAMPLING, ModelOptions, SamplingOptions
from diffsparse_pipelines.prompts import read_prompts

if TYPE_CHECKING:
    from diffsparse.guidance.hunt import HeadHunter
    from diffsparse.guidance.preset import Preset
    from diffsparse_pipelines.families import Call
    from diffsparse_pipelines.hunting import Pairs, Session

_HUNT, _HELD = "Hunt", "Check on prompts that the hunt did not see"
_COUNT = checks.whole(1, values.MOST_COUNT)


@dataclass(frozen=True)
class HuntOptions:
    """What is raised, over which prompts, and how heads are searched."""

    objective: Annotated[
        str,
        typer.Option(
            help="What to raise: sharpness, colourfulness, contrast, steadiness, look:IMAGE, clip, pickscore, hps (the "
            "last three with an optional :CHECKPOINT), or module:function.",
            rich_help_panel=_HUNT,
        ),
    ]
    prompts: Annotated[
        str,
        typer.Option(
            help="How many built-in prompts, or a file with one a line.",
            rich_help_panel=_HUNT,
            callback=checks.text,
        ),
    ] = "5"
    style: Annotated[
        str,
        typer.Option(help="A style to put ahead of every prompt, as in 'style, prompt'.", rich_help_panel=_HUNT),
    ] = ""
    images: Annotated[
        int | None,
        typer.Option(
            help="Images or videos for each set of heads; image i has prompt i and seed i.",
            show_default="one a prompt",
            rich_help_panel=_HUNT,
            callback=_COUNT,
        ),
    ] = None
    k: Annotated[
        int | None,
        typer.Option(
            help="Heads that join in each round.",
            show_default="3; of embedded models 2",
            rich_help_panel=_HUNT,
            callback=_COUNT,
        ),
    ] = None
    rounds: Annotated[
        int | None,
        typer.Option(help="Rounds.", show_default="5; of embedded models 1", rich_help_panel=_HUNT, callback=_COUNT),
    ] = None
    pool: Annotated[
        str,
        typer.Option(
            help="Heads to try, such as 0-11.*,single.*.*; * is all.", rich_help_panel=_HUNT, callback=checks.text
        ),
    ] = "*"
    head_strength: Annotated[
        float,
        typer.Option(
            help="How far heads are perturbed, in [0, 1].", rich_help_panel=_HUNT, callback=checks.number(most=1)
        ),
    ] = 1.0
    head_scale: Annotated[
        float | None,
        typer.Option(
            help="Weight of the head guidance.",
            show_default="3; of embedded models 1",
            rich_help_panel=_HUNT,
            callback=checks.number(),
        ),
    ] = None
    kind: Annotated[str, typer.Option(help="identity, self, uniform, query-mean or zero.", rich_help_panel=_HUNT)] = (
        "identity"
    )
    proxy: Annotated[
        bool,
        typer.Option(
            "--proxy",
            help="A cheaper search that is not the paper's: a quarter of the steps, strength 1; the check runs all.",
            rich_help_panel=_HUNT,
        ),
    ] = False
    batch: Annotated[
        int,
        typer.Option(help="Images drawn in one call, where memory allows.", rich_help_panel=_HUNT, callback=_COUNT),
    ] = 1
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what the hunt will cost, and stop.", rich_help_panel=_HUNT)
    ] = False
    held_out: Annotated[
        str,
        typer.Option(
            help="How many further built-in prompts, or a file; 0 for no check.",
            rich_help_panel=_HELD,
            callback=checks.text,
        ),
    ] = "8"

    def hunter(self, model: str) -> HeadHunter:
        """How heads are searched, and how they are perturbed meanwhile; embedded models have few heads.

        Raises:
            ConfigError: a value out of its range.
        """
        from diffsparse.guidance.hunt import HeadHunter
        from diffsparse_pipelines import families

        usual = HeadHunter(2, 1, head_scale=1.0) if families.variant(model) else HeadHunter()
        return HeadHunter(
            usual.k if self.k is None else self.k,
            usual.rounds if self.rounds is None else self.rounds,
            1.0 if self.proxy else self.head_strength,
            usual.head_scale if self.head_scale is None else self.head_scale,
            self.kind,
        )

    def pairs(self, model: str) -> tuple[Pairs, Pairs]:
        """Prompts and seeds of the hunt, and of the check: prompts and seeds that the hunt does not see."""
        texts = read_prompts(self.prompts, model)
        count = len(texts) if self.images is None else self.images
        ahead = f"{self.style}, " if self.style else ""
        seen = [(ahead + texts[i % len(texts)], i) for i in range(count)]
        if self.held_out == "0":
            return seen, []
        fresh = read_prompts(self.held_out, model, "--held-out")
        if self.held_out.isdecimal() and self.prompts.isdecimal():
            both = str(int(self.prompts) + int(self.held_out))
            fresh = read_prompts(both, model, "--prompts and --held-out together")[int(self.prompts) :]
        shared = sorted(set(fresh) & set(texts))
        if shared:
            raise ConfigError(f"--held-out holds prompts of the hunt, such as {shared[0]!r}; give it others")
        return seen, [(ahead + text, count + i) for i, text in enumerate(fresh)]


def hunt(
    out: Annotated[
        Path,
        typer.Option(
            help="The preset to write, a .json file; a table (.md) and a sheet (.png) go beside it.",
            callback=checks.file,
        ),
    ],
    hunting: HuntOptions,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing preset.")] = False,
    model: ModelOptions = MODEL,
    sampling: SamplingOptions = SAMPLING,
) -> None:
    """Search the attention heads whose perturbation raises an objective, by HeadHunter's greedy selection.

    A hunt that was interrupted goes on where it stopped, and ends with the same heads. The paper hunts without
    classifier-free guidance: --guidance-scale 1.

    Args:
        out: the preset to write, a .json file; a table (.md) and a sheet (.png) go beside it.
        hunting: the objective, the prompts, and how heads are searched and checked.
        overwrite: replace an existing preset.
        model: which model, and how it is loaded.
        sampling: size, steps and classifier-free guidance.

    Raises:
        ConfigError, UnknownNameError: an option that doesn't fit, or work so far of another hunt.
        InputFileError: a file that can't be read. OutputFileError: `out` exists, or can't be written.
    """
    from diffsparse.guidance.objectives import objective as named
    from diffsparse_pipelines.machine import place
    from diffsparse_pipelines.progress import say

    hunter, call = hunting.hunter(model.name), sampling.arguments()
    seen, unseen = hunting.pairs(model.name)
    model.admit(call, [prompt for prompt, _ in [*seen, *unseen]])
    preset = _begun(out, overwrite, hunting.objective)
    score = named(hunting.objective, place(model.device))
    session = _session(model, call, hunting)
    heads = session.pool(values.names(hunting.pool))
    hunter.check(heads)
    settings = repr((hunter, heads, seen, hunting.objective, hunting.batch, session.searching))
    if preset is None or hunting.estimate:
        session.estimate(hunter, heads, seen, len(unseen))
    if hunting.estimate:
        return
    if preset is None:
        preset = session.hunt(hunter, heads, seen, score, out, {"objective": hunting.objective, "settings": settings})
    elif preset.about["settings"] != settings:
        raise OutputFileError(f"{out} is of a hunt with other settings; choose another --out or use --overwrite")
    if unseen:
        preset = session.check(preset, unseen, score, out)
    say(f"{', '.join(preset.heads)} -> {out}")


def _session(model: ModelOptions, call: Call, hunting: HuntOptions) -> Session:
    """The loaded model, and the call arguments of the hunt and of the check."""
    from diffsparse_pipelines.hunting import Session
    from diffsparse_pipelines.preflight import check

    pipe = model.load()
    arguments = model.call_arguments(pipe, call)
    check(pipe, arguments)
    shorter = hunting.proxy and "num_inference_steps" not in call
    return Session(pipe, model.name, arguments, hunting.batch, hunting.proxy, shorter)


def _begun(out: Path, overwrite: bool, objective: str) -> Preset | None:
    """The preset of a hunt that was stopped in its check, to go on with; None if there is no file."""
    from diffsparse.files import check_outputs
    from diffsparse.guidance.preset import Preset
    from diffsparse.plans.store import partial_path

    if out.suffix != ".json":
        raise ConfigError(f"--out wants a .json file; got {out.name!r}")
    picture = {"--objective": Path(objective.removeprefix("look:"))} if objective.startswith("look:") else {}
    files = [out, out.with_suffix(".md"), out.with_suffix(".png"), partial_path(out)]
    check_outputs({f"--out, which writes {path.name}": path for path in files}, picture)
    if overwrite or not out.exists():
        return None
    about = (preset := Preset.load(out)).about
    if "held_out" in about or "settings" not in about:
        raise OutputFileError(f"{out} exists; choose another --out or use --overwrite")
    return preset
