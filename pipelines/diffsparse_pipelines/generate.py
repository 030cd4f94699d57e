"""Generation: one pipeline call with progress, its raw frames, its time; and the command built on it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from diffsparse.errors import ConfigError, DiffsparseError
from diffsparse_pipelines import options

if TYPE_CHECKING:
    import numpy as np
    import torch
    from rich.progress import Progress

    from diffsparse.guidance.preset import Preset


class Generation(NamedTuple):
    """frames: float32 [F, H, W, C] in [0, 1]; latents: of the last step, if the pipeline shows them; seconds: wall."""

    frames: np.ndarray
    latents: torch.Tensor | None
    seconds: float


def call_arguments(pipe: Any, defaults: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """What to call `pipe` with: defaults that it knows, overruled by what was chosen.

    Raises:
        ConfigError: something was chosen that this pipeline doesn't take.
    """
    known = set(inspect.signature(type(pipe).__call__).parameters)
    strange = sorted(name for name in chosen if name not in known and name not in ("height", "width"))
    if strange:
        raise ConfigError(f"{type(pipe).__name__} takes no {', '.join(strange)}; leave it out")
    return {name: value for name, value in {**defaults, **chosen}.items() if name in known}


def generation(pipe: Any, arguments: dict[str, Any], seed: int, progress: Progress | None = None) -> Generation:
    """Call `pipe` once with a seeded generator.

    Args:
        pipe: a Diffusers pipeline.
        arguments: call arguments, with the prompt.
        seed: of a generator on the CPU, so that every device starts from the same noise.
        progress: a running rich progress display that gets one task for this call's steps.

    Raises:
        ConfigError: the pipeline refused the arguments.
    """
    import torch

    last: dict[str, Any] = {}
    task = progress.add_task("steps", total=None) if progress else None

    def after_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = tensors.get("latents")
        if progress is not None and task is not None:
            progress.update(task, completed=step + 1, total=len(pipe.scheduler.timesteps))
        return tensors

    start = time.perf_counter()
    try:
        out = _call(pipe, arguments, torch.Generator().manual_seed(seed), after_step)
    finally:
        if progress is not None and task is not None:
            progress.remove_task(task)
    return Generation(_clips(out)[0], last.get("latents"), time.perf_counter() - start)


def generations(
    pipe: Any, arguments: dict[str, Any], pairs: Sequence[tuple[str, int]], after_step: Any = None
) -> list[np.ndarray]:
    """Frames [F, H, W, C] for each prompt and seed, drawn in one batch by one call.

    Raises:
        ConfigError: the pipeline refused the arguments.
    """
    import torch

    generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
    return _clips(_call(pipe, {**arguments, "prompt": [prompt for prompt, _ in pairs]}, generators, after_step))


def _call(pipe: Any, arguments: dict[str, Any], generator: Any, after_step: Any) -> Any:
    watches = after_step and "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    watched = {"callback_on_step_end": after_step} if watches else {}
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(**arguments, **watched, generator=generator, output_type="np")
    except DiffsparseError:
        raise
    except ValueError as error:
        raise ConfigError(f"{type(pipe).__name__} refused the call: {error}") from error


def _clips(out: Any) -> list[np.ndarray]:
    """Frames [F, H, W, C] of each sample; an image has one frame."""
    import numpy as np

    if hasattr(out, "frames"):
        return [np.asarray(frames, dtype=np.float32) for frames in out.frames]
    return [np.asarray(image, dtype=np.float32)[None] for image in out.images]


def generate(
    prompt: Annotated[str | None, typer.Option(help="What should be seen.", show_default="a caption for tiny")] = None,
    out: Annotated[
        Path, typer.Option(help="A file: .mp4, .gif, .png (a sheet of frames), .jpg.", callback=options.file)
    ] = Path("out.mp4"),
    seed: options.Seed = 0,
    image: Annotated[
        Path | None, typer.Option(help="An input image, for models that take one.", callback=options.file)
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
    strategy: options.Strategy = "digest",
    sparsity: options.Sparsity = None,
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
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Also generate without head guidance, and write both side by side: a .png file.",
            rich_help_panel="Head guidance",
            callback=options.file,
        ),
    ] = None,
) -> None:
    """Generate a video or an image from a prompt, with sparse attention, with or without head guidance."""
    chosen = options.sampling(steps, height, width, frames, guidance_scale, negative_prompt)
    plan = options.schedule(dense_first, dense_last, dense_layers)
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
    made = options.strategies(strategy, [sparsity], knobs)
    if len(made) != 1:
        raise ConfigError(f"generate wants one strategy; got {strategy!r}. To compare several, use evaluate")
    preset = options.preset(heads, head_strength, head_scale)
    _check_compare(compare, preset)
    loading = {"dtype": dtype, "device": device, "offload": offload, "vae_tiling": vae_tiling}
    _generate(model, made[0], prompt, chosen, plan, strict, loading, out, seed, image, preset, compare)


def _check_compare(compare: Path | None, preset: Preset | None) -> None:
    if compare is None:
        return
    if preset is None:
        raise ConfigError("--compare shows what head guidance does; it wants --heads")
    if compare.suffix.lower() != ".png":
        raise ConfigError(f"--compare wants a .png file; got {compare.name!r}")


def _generate(
    model: str,
    strategy: Any,
    prompt: str | None,
    chosen: dict[str, Any],
    plan: Any,
    strict: bool,
    loading: dict[str, Any],
    out: Path,
    seed: int,
    image: Path | None,
    preset: Preset | None,
    sheet: Path | None,
) -> None:
    import diffsparse
    from diffsparse.files import check_outputs
    from diffsparse_pipelines import families, media
    from diffsparse_pipelines.preflight import admit, announce, argument, check, compare, preflight
    from diffsparse_pipelines.progress import bar, terminal

    console = terminal()
    _, family = families.resolve(model, image is not None)
    expected = 1 if family.output == "image" else chosen.get("num_frames", 2)
    media.check_suffix(out, expected if family.hub or families.variant(model) else None)
    check_outputs({"--out": out, "--compare": sheet}, {"--image": image})
    if image is not None:
        chosen["image"] = media.read_image(image)
    prompt = _prompt(model, prompt)
    admit(model, loading, chosen, [prompt])
    with console.status(f"loading {model}"):
        pipe = families.load(model, **loading, with_image=image is not None)
    arguments = call_arguments(pipe, families.defaults(model), {**chosen, "prompt": prompt})
    check(pipe, arguments, plan, preset)
    count = argument(pipe, arguments, "num_inference_steps")
    console.print(f"{strategy}, {plan.describe(count)}" if count else f"{strategy}", soft_wrap=True)
    estimate = preflight(pipe, arguments, strategy, plan)
    console.print(announce(estimate), highlight=False, soft_wrap=True)
    with diffsparse.apply(pipe, strategy, schedule=plan, strict=strict) as handle, bar(console) as progress:
        plain = generation(pipe, arguments, seed, progress) if sheet is not None else None
        with ExitStack() as stack:
            guided = stack.enter_context(diffsparse.guide(pipe, preset)) if preset is not None else None
            result = generation(pipe, arguments, seed, progress)
    report = handle.report()
    console.print(str(report), highlight=False, soft_wrap=True)
    if guided is not None:
        console.print(str(guided.report()), highlight=False, soft_wrap=True)
    if estimate is not None and (afterwards := compare(estimate, report, result.seconds)):
        console.print(afterwards, highlight=False, soft_wrap=True)
    if plain is not None and sheet is not None:
        media.sheet({"head guidance off": plain.frames, "head guidance on": result.frames}, sheet)
        console.print(f"off and on, side by side -> {sheet}")
    media.save(result.frames, out, family.fps)
    console.print(f"{result.seconds:.1f} s -> {out}")


def _prompt(model: str, prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    from diffsparse_pipelines import families

    if families.variant(model):
        from diffsparse_pipelines import tiny

        return tiny.prompts(1)[0]
    raise ConfigError(f"--prompt is missing: model {model!r} wants a text of what should be seen")
