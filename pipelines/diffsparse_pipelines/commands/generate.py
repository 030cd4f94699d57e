"""`diffsparse generate`: a video or an image from a prompt, with sparse attention and head guidance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsparse.errors import ConfigError
from diffsparse_pipelines.commands import checks
from diffsparse_pipelines.commands.options import (
    GUIDANCE,
    MODEL,
    SAMPLING,
    SPARSITY,
    GuidanceOptions,
    ModelOptions,
    SamplingOptions,
    Seed,
    SparsityOptions,
    check_knobs,
    known_knobs,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffsparse import Handle
    from diffsparse.guidance.preset import Preset
    from diffsparse.insight.cost import Estimate
    from diffsparse.schedule import Schedule
    from diffsparse_pipelines.families import Call, Family
    from diffsparse_pipelines.generation import Generation

PutOn = Callable[..., "Handle"]  # of a pipeline


def generate(
    prompt: Annotated[str | None, typer.Option(help="What should be seen.", show_default="a caption for tiny")] = None,
    out: Annotated[
        Path, typer.Option(help="A file: .mp4, .gif, .png (a sheet of frames), .jpg.", callback=checks.file)
    ] = Path("out.mp4"),
    seed: Seed = 0,
    image: Annotated[
        Path | None, typer.Option(help="An input image, for models that take one.", callback=checks.file)
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(help="quality, balanced or fast: a step cache, sparse attention on top.", callback=checks.text),
    ] = None,
    model: ModelOptions = MODEL,
    sampling: SamplingOptions = SAMPLING,
    sparsity: SparsityOptions = SPARSITY,
    guidance: GuidanceOptions = GUIDANCE,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Also generate without head guidance, and write both side by side: a .png file.",
            rich_help_panel="Head guidance",
            callback=checks.file,
        ),
    ] = None,
) -> None:
    """Generate a video or an image from a prompt, with sparse attention, with or without head guidance.

    Args:
        prompt: what should be seen; a caption for the embedded models.
        out: the file: .mp4, .gif, .png (a sheet of frames), .jpg.
        seed: of the initial noise.
        speed: in place of a strategy; its knobs may be given.
        image: an input image, for models that take one.
        model: which model, and how it is loaded.
        sampling: size, steps and classifier-free guidance.
        sparsity: the strategy and its knobs; it has to be one.
        guidance: heads to guide away from.
        compare: a .png file for frames without and with head guidance, side by side.

    Raises:
        ConfigError, UnknownNameError: an option that doesn't fit. InputFileError: a file that can't be read.
        OutputFileError: `out` or `compare` can't be written.
    """
    from diffsparse_pipelines.preflight import check

    call, schedule, preset = sampling.arguments(), sparsity.schedule, guidance.preset()
    family = _check_files(model.name, call, out, image, compare, preset)
    sparsity = sparsity.mild(model.name, call)
    put_on = _stack(sparsity) if speed is None else _speed(speed, sparsity)
    if image is not None:
        from diffsparse_pipelines.media import read_image

        call["image"] = read_image(image)
    call["prompt"] = prompt = _prompt(model.name, prompt)
    model.admit(call, [prompt])
    pipe = model.load(with_image=image is not None)
    arguments = model.call_arguments(pipe, call)
    check(pipe, arguments, schedule, preset, sparsity.later_searches)
    _Run(pipe, arguments, seed, put_on, schedule, sparsity.strict, preset).write(out, family.fps, compare)


def _stack(sparsity: SparsityOptions) -> PutOn:
    """Puts on the one strategy that was named, and the step cache that was named with it."""
    from diffsparse.seam.added import stacked

    stacks = sparsity.stacks()
    if len(stacks) != 1:
        raise ConfigError(f"generate wants one strategy; got {sparsity.named!r}. To compare several, use evaluate")
    cache, strategy = stacks[0]
    return partial(stacked, strategy=strategy, cache=cache)


def _speed(speed: str, sparsity: SparsityOptions) -> PutOn:
    """Puts on what a speed stands for, with the knobs that were given."""
    from diffsparse.seam.accelerate import SPEEDS, accelerate
    from diffsparse.strategies import knobs_of

    if speed not in SPEEDS:
        raise ConfigError(f"--speed wants one of {', '.join(SPEEDS)}; got {speed!r}")
    if sparsity.strategy is not None:
        raise ConfigError(f"--speed chooses the strategy; leave --strategy {sparsity.strategy} out, or --speed")
    knobs: dict[str, Any] = {
        name: value for name, value in {**sparsity.knobs, "sparsity": sparsity.sparsity}.items() if value is not None
    }
    own = {f"--speed {speed}": set(knobs_of(SPEEDS[speed].strategy))}
    check_knobs(knobs, own, {**own, **known_knobs()})
    return partial(accelerate, speed=speed, **knobs)


def _check_files(
    model: str,
    call: Call,
    out: Path,
    image: Path | None,
    compare: Path | None,
    preset: Preset | None,
) -> Family:
    """Refuse files that can't be written, or can't hold what will be generated; what is known of the model."""
    from diffsparse.files import check_outputs
    from diffsparse_pipelines import families, media

    if compare is not None and preset is None:
        raise ConfigError("--compare shows what head guidance does; it wants --heads")
    if compare is not None and compare.suffix.lower() != ".png":
        raise ConfigError(f"--compare wants a .png file; got {compare.name!r}")
    _, family = families.resolve(model, image is not None)
    families.check_inputs(model, image is not None)
    known = family.hub or families.variant(model)
    several = family.output == "video" and call.get("num_frames") != 1
    media.check_suffix(out, None if not known else 2 if several else 1)
    check_outputs({"--out": out, "--compare": compare}, {"--image": image})
    return family


def _prompt(model: str, prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    from diffsparse_pipelines import families

    if families.variant(model):
        from diffsparse_pipelines import tiny

        return tiny.prompts(1)[0]
    raise ConfigError(f"--prompt is missing: model {model!r} wants a text of what should be seen")


@dataclass(frozen=True)
class _Run:
    """One generation under a strategy and head guidance, with what the terminal shows before and after it."""

    pipe: DiffusionPipeline
    arguments: dict[str, object]
    seed: int
    put_on: PutOn
    schedule: Schedule
    strict: bool
    preset: Preset | None

    def write(self, out: Path, fps: int, compare: Path | None) -> None:
        """Generate into `out`; and into `compare` side by side with a run without head guidance."""
        from diffsparse_pipelines import media
        from diffsparse_pipelines.progress import say

        plain, result = self._generate(compare is not None)
        if plain is not None and compare is not None:
            media.sheet({"head guidance off": plain.frames, "head guidance on": result.frames}, compare)
            say(f"off and on, side by side -> {compare}")
        media.save(result.frames, out, fps)
        say(f"{result.seconds:.1f} s -> {out}")

    def _generate(self, twice: bool) -> tuple[Generation | None, Generation]:
        """One generation, and ahead of it, if asked for, one without head guidance."""
        from diffsparse import guide
        from diffsparse_pipelines.generation import generation
        from diffsparse_pipelines.preflight import compare
        from diffsparse_pipelines.progress import bar, say, terminal

        with ExitStack() as stack:
            handle = stack.enter_context(self.put_on(self.pipe, schedule=self.schedule, strict=self.strict))
            estimate = self._announce(handle)
            progress = stack.enter_context(bar(terminal()))
            plain = generation(self.pipe, self.arguments, self.seed, progress) if twice else None
            guided = None if self.preset is None else stack.enter_context(guide(self.pipe, self.preset))
            result = generation(self.pipe, self.arguments, self.seed, progress)
            report = handle.report()
        say(str(report), highlight=False)
        if guided is not None:
            say(str(guided.report()), highlight=False)
        if estimate is not None and (found := compare(estimate, report, result.seconds)):
            say(found, highlight=False)
        return plain, result

    def _announce(self, handle: Handle) -> Estimate | None:
        """Say what will run, and what it can be expected to save."""
        from diffsparse.strategies import as_strategy
        from diffsparse_pipelines.preflight import announce, argument, few_tokens, preflight, warm_up_of
        from diffsparse_pipelines.progress import say

        count = argument(self.pipe, self.arguments, "num_inference_steps")
        dense = f", {self.schedule.describe(count, warm_up_of(self.pipe, count))}" if count else ""
        cache, strategy = "" if handle.cache is None else f"{handle.cache}/", as_strategy(handle.strategy)
        say(f"{cache}{handle.strategy}{dense}")
        estimate = preflight(self.pipe, self.arguments, strategy, self.schedule)
        say(announce(estimate), highlight=False)
        if few := few_tokens(self.pipe, self.arguments, strategy):
            say(few, highlight=False)
        return estimate
