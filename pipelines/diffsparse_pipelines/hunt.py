"""`diffsparse hunt`: HeadHunter over a few prompts, which ends with a preset and a check on prompts it did not see."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsparse.errors import ConfigError, OutputFileError
from diffsparse_pipelines import options
from diffsparse_pipelines.prompts import read_prompts

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from diffsparse.preset import Preset
    from diffsparse.search import HeadHunter
    from diffsparse.search.objectives import Objective

_HUNT, _HELD = "Hunt", "Check on prompts that the hunt did not see"
_PROXY_SHARE, _PROXY_LEAST = 4, 4  # a proxy runs a quarter of the steps, and at least four
_SHOWN = 4  # prompts on the sheet

Pairs = list[tuple[str, int]]


def hunt(
    out: Annotated[Path, typer.Option(help="The preset to write, a .json file; a sheet .png goes beside it.")],
    objective: Annotated[
        str,
        typer.Option(
            help="What to raise: sharpness, colourfulness, contrast, steadiness, look:IMAGE, clip, pickscore, hps (the "
            "last three with an optional :CHECKPOINT), or module:function.",
            rich_help_panel=_HUNT,
        ),
    ],
    prompts: Annotated[
        str, typer.Option(help="How many built-in prompts, or a file with one a line.", rich_help_panel=_HUNT)
    ] = "5",
    images: Annotated[
        int | None,
        typer.Option(
            help="Images or videos for each set of heads; image i has prompt i and seed i.",
            show_default="one a prompt",
            rich_help_panel=_HUNT,
        ),
    ] = None,
    k: Annotated[int, typer.Option(help="Heads that join in each round.", rich_help_panel=_HUNT)] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds.", rich_help_panel=_HUNT)] = 5,
    pool: Annotated[
        str, typer.Option(help="Heads to try, such as 0-11.*,single.*.*; * is all.", rich_help_panel=_HUNT)
    ] = "*",
    guidance_strength: Annotated[
        float, typer.Option(help="How far heads are perturbed, in [0, 1].", rich_help_panel=_HUNT)
    ] = 1.0,
    guidance_scale: Annotated[float, typer.Option(help="Weight of the head guidance.", rich_help_panel=_HUNT)] = 3.0,
    kind: Annotated[
        str, typer.Option(help="identity, self, uniform, query-mean or zero.", rich_help_panel=_HUNT)
    ] = "identity",
    proxy: Annotated[
        bool,
        typer.Option(
            "--proxy",
            help="A cheaper search that is not the paper's: a quarter of the steps, strength 1; the check runs all.",
            rich_help_panel=_HUNT,
        ),
    ] = False,
    batch: Annotated[
        int, typer.Option(help="Images drawn in one call, where memory allows.", rich_help_panel=_HUNT)
    ] = 1,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what the hunt will cost, and stop.", rich_help_panel=_HUNT)
    ] = False,
    held_out: Annotated[
        str, typer.Option(help="How many further built-in prompts, or a file; 0 for no check.", rich_help_panel=_HELD)
    ] = "8",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing preset.")] = False,
    model: options.Model = "tiny",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offload: options.Offload = "none",
    vae_tiling: options.VaeTiling = False,
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.NumFrames = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
) -> None:
    """Search the attention heads whose perturbation raises an objective, by HeadHunter's greedy selection.

    A hunt that was interrupted goes on where it stopped, and ends with the same heads. The paper hunts without
    classifier-free guidance: --guidance 1.
    """
    from diffsparse.search import HeadHunter
    from diffsparse.search.objectives import objective as named

    for option, value in (("--batch", batch), ("--images", images)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} wants a whole number of at least 1; got {value}")
    hunter = HeadHunter(k, rounds, 1.0 if proxy else guidance_strength, guidance_scale, kind)
    chosen = options.sampling(steps, height, width, frames, guidance, negative_prompt)
    seen, unseen = _pairs(prompts, images, held_out, model)
    _check_out(out, overwrite)
    score = named(objective, _device(device))
    session = _Session(model, {"dtype": dtype, "device": device, "offload": offload, "vae_tiling": vae_tiling}, chosen)
    session.batch, session.proxy = batch, proxy
    heads = session.pool(pool)
    hunter.check(heads)
    session.estimate(hunter, heads, seen)
    if estimate:
        return
    preset = session.hunt(hunter, heads, seen, score, objective, out)
    if unseen:
        preset = session.check(preset, unseen, score, out)
    session.console.print(f"{', '.join(preset.heads)} -> {out}", soft_wrap=True)


def _device(asked: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _pairs(prompts: str, images: int | None, held_out: str, model: str) -> tuple[Pairs, Pairs]:
    """Prompts and seeds of the hunt, and of the check: prompts and seeds that the hunt does not see."""
    texts = read_prompts(prompts, model)
    count = len(texts) if images is None else images
    seen = [(texts[i % len(texts)], i) for i in range(count)]
    if held_out == "0":
        return seen, []
    if held_out.isdecimal() and prompts.isdecimal():
        fresh = read_prompts(str(int(prompts) + int(held_out)), model)[int(prompts) :]
    else:
        fresh = read_prompts(held_out, model)
    both = sorted(set(fresh) & set(texts))
    if both:
        raise ConfigError(f"--held-out holds prompts of the hunt, such as {both[0]!r}; give it others")
    return seen, [(text, count + i) for i, text in enumerate(fresh)]


def _check_out(out: Path, overwrite: bool) -> None:
    from diffsparse.files import folder

    if out.suffix != ".json":
        raise ConfigError(f"--out wants a .json file; got {out.name!r}")
    if out.exists() and not overwrite:
        raise OutputFileError(f"{out} exists; choose another --out or use --overwrite")
    folder(out.parent)


class _Session:
    """One loaded model, and the ways in which a hunt runs it."""

    batch: int = 1
    proxy: bool = False

    def __init__(self, model: str, loading: dict[str, Any], chosen: dict[str, Any]) -> None:
        from diffsparse_pipelines import families
        from diffsparse_pipelines.generate import call_arguments
        from diffsparse_pipelines.progress import terminal

        self.console: Console = terminal()
        with self.console.status(f"loading {model}"):
            self.pipe = families.load(model, **loading)
        self.model, self.steps_given = model, "num_inference_steps" in chosen
        self.arguments = call_arguments(self.pipe, families.defaults(model), chosen)

    @property
    def searching(self) -> dict[str, Any]:
        """The call arguments of the hunt: a proxy runs fewer steps."""
        steps = self.arguments.get("num_inference_steps")
        if not self.proxy or self.steps_given or not steps:
            return self.arguments
        return {**self.arguments, "num_inference_steps": max(_PROXY_LEAST, steps // _PROXY_SHARE)}

    def pool(self, patterns: str) -> list[str]:
        """The names of the heads to try."""
        from diffsparse.heads import names_of
        from diffsparse.patch import models_of

        first = next(iter(models_of(self.pipe).values()))  # experts of one pipeline are built alike
        return names_of(first, [part.strip() for part in patterns.split(",") if part.strip()])

    def render(self, arguments: dict[str, Any], pairs: Sequence[tuple[str, int]]) -> list[np.ndarray]:
        """Clips of some pairs, in batches; where memory runs out, in smaller ones from then on."""
        import torch

        from diffsparse_pipelines.generate import generation, generations

        clips: list[np.ndarray] = []
        while len(clips) < len(pairs):
            part = pairs[len(clips) : len(clips) + self.batch]
            try:
                if len(part) == 1:
                    clips.append(generation(self.pipe, {**arguments, "prompt": part[0][0]}, part[0][1]).frames)
                else:
                    clips += generations(self.pipe, arguments, part)
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
                torch.cuda.empty_cache()
        return clips

    def estimate(self, hunter: HeadHunter, heads: list[str], pairs: Pairs) -> None:
        """Time one guided generation, and say how long all of them will take."""
        import diffsparse

        trials = hunter.trials(len(heads))
        with diffsparse.guide(self.pipe, hunter.preset([heads[len(heads) // 2]])):
            self.render(self.searching, pairs[:1])  # the first call is no measure
            start = time.perf_counter()
            self.render(self.searching, pairs[:1])
        seconds = time.perf_counter() - start
        total, kind = trials * len(pairs), "proxy hunt (not the paper's)" if self.proxy else "hunt"
        steps = self.searching.get("num_inference_steps", "?")
        self.console.print(
            f"{kind} for {hunter.rounds} x {hunter.k} heads out of {len(heads)}: {trials} trials x {len(pairs)} images "
            f"= {total} generations of {steps} steps, about {_duration(total * seconds)} at {seconds:.2f} s each",
            highlight=False,
            soft_wrap=True,
        )

    def hunt(
        self, hunter: HeadHunter, heads: list[str], pairs: Pairs, score: Objective, name: str, out: Path
    ) -> Preset:
        """Search, with a progress bar."""
        from diffsparse.search import hunt as search
        from diffsparse_pipelines.progress import bar

        about = {
            "search": "proxy" if self.proxy else "HeadHunter",
            "objective": name,
            "model": self.model,
            "arguments": {key: str(value) for key, value in self.searching.items()},
            "images": len(pairs),
        }
        told = f"{name} {self.batch} {self.searching}"
        with bar(self.console) as progress:
            moved = _Mover(progress, hunter.trials(len(heads)))
            return search(
                self.pipe,
                hunter,
                heads,
                pairs,
                lambda wanted: self.render(self.searching, wanted),
                score,
                out,
                name=told,
                about=about,
                after_trial=moved,
            )

    def check(self, preset: Preset, pairs: Pairs, score: Objective, out: Path) -> Preset:
        """Compare guidance off and on over unseen prompts; into the preset's record, a table and a sheet."""
        import diffsparse
        from diffsparse.search.hunt import checked
        from diffsparse_pipelines import media
        from diffsparse_pipelines.progress import bar

        clips: dict[str, list[np.ndarray]] = {"off": [], "on": []}
        with bar(self.console) as progress:
            task = progress.add_task("held-out prompts", total=2 * len(pairs))
            for pair in pairs:
                clips["off"] += self.render(self.arguments, [pair])
                progress.advance(task)
                with diffsparse.guide(self.pipe, preset):
                    clips["on"] += self.render(self.arguments, [pair])
                progress.advance(task)
        texts = [prompt for prompt, _ in pairs]
        scores = {side: checked(score(shown, texts), len(pairs)) for side, shown in clips.items()}
        found = {**compared(scores["off"], scores["on"]), "scores": scores, "prompts": texts}
        preset = replace(preset, about={**preset.about, "held_out": found})
        preset.save(out)
        self.console.print(_table(preset.about))
        rows = {
            f"{side} {scores[side][i]:.4f}  {texts[i]}": clips[side][i]
            for i in range(min(_SHOWN, len(pairs)))
            for side in ("off", "on")
        }
        self.console.print(f"off and on, side by side -> {media.sheet(rows, out.with_suffix('.png'))}", soft_wrap=True)
        return preset


class _Mover:
    """Moves a progress bar; what an earlier attempt did counts as done, not as fast."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.task = progress, total, None

    task: Any

    def __call__(self, done: int) -> None:
        if self.task is None:
            self.task = self.progress.add_task("trials", total=self.total, completed=done)
        self.progress.update(self.task, completed=done)


def compared(off: list[float], on: list[float]) -> dict[str, Any]:
    """Means of paired scores, and the 95 % confidence interval of their mean difference (Student's t, paired)."""
    import numpy as np
    from scipy.stats import ttest_rel

    gain = np.subtract(on, off)
    found: dict[str, Any] = {
        "pairs": len(gain),
        "off": float(np.mean(off)),
        "on": float(np.mean(on)),
        "gain": float(gain.mean()),
        "better": int((gain > 0).sum()),
    }
    if len(gain) > 1 and gain.std() > 0:
        low, high = ttest_rel(on, off).confidence_interval(0.95)
        found["gain_95"] = [float(low), float(high)]
    return found


def _table(about: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    held, score = about["held_out"], about["score"]
    shown = Table(title=f"objective: {about['objective']}", title_justify="left", title_style="bold", box=box.SIMPLE)
    for heading in ("prompts", "n", "off", "on", "gain (95 % interval)", "better"):
        shown.add_column(heading, justify="left" if heading == "prompts" else "right")
    gain = score["all"] - score["none"]
    shown.add_row(
        "of the hunt", str(about["images"]), f"{score['none']:.4f}", f"{score['all']:.4f}", f"{gain:+.4f}", ""
    )
    interval = f" ({held['gain_95'][0]:+.4f} to {held['gain_95'][1]:+.4f})" if "gain_95" in held else ""
    n = held["pairs"]
    shown.add_row(
        "unseen",
        str(n),
        f"{held['off']:.4f}",
        f"{held['on']:.4f}",
        f"{held['gain']:+.4f}{interval}",
        f"{held['better']}/{n}",
    )
    return shown


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
