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

    from diffsparse.guidance.hunt import HeadHunter
    from diffsparse.guidance.objectives import Objective
    from diffsparse.guidance.preset import Preset

_HUNT, _HELD = "Hunt", "Check on prompts that the hunt did not see"
_PROXY_SHARE, _PROXY_LEAST = 4, 4  # a proxy runs a quarter of the steps, and at least four
_SHOWN = 4  # prompts on the sheet
_COUNT = options.whole(1, options.MOST_COUNT)

Pairs = list[tuple[str, int]]


def hunt(
    out: Annotated[
        Path,
        typer.Option(
            help="The preset to write, a .json file; a table (.md) and a sheet (.png) go beside it.",
            callback=options.file,
        ),
    ],
    objective: Annotated[
        str,
        typer.Option(
            help="What to raise: sharpness, colourfulness, contrast, steadiness, look:IMAGE, clip, pickscore, hps (the "
            "last three with an optional :CHECKPOINT), or module:function.",
            rich_help_panel=_HUNT,
        ),
    ],
    prompts: Annotated[
        str,
        typer.Option(
            help="How many built-in prompts, or a file with one a line.",
            rich_help_panel=_HUNT,
            callback=options.text,
        ),
    ] = "5",
    style: Annotated[
        str,
        typer.Option(help="A style to put ahead of every prompt, as in 'style, prompt'.", rich_help_panel=_HUNT),
    ] = "",
    images: Annotated[
        int | None,
        typer.Option(
            help="Images or videos for each set of heads; image i has prompt i and seed i.",
            show_default="one a prompt",
            rich_help_panel=_HUNT,
            callback=_COUNT,
        ),
    ] = None,
    k: Annotated[int, typer.Option(help="Heads that join in each round.", rich_help_panel=_HUNT, callback=_COUNT)] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds.", rich_help_panel=_HUNT, callback=_COUNT)] = 5,
    pool: Annotated[
        str,
        typer.Option(
            help="Heads to try, such as 0-11.*,single.*.*; * is all.", rich_help_panel=_HUNT, callback=options.text
        ),
    ] = "*",
    head_strength: Annotated[
        float,
        typer.Option(
            help="How far heads are perturbed, in [0, 1].", rich_help_panel=_HUNT, callback=options.number(most=1)
        ),
    ] = 1.0,
    head_scale: Annotated[
        float, typer.Option(help="Weight of the head guidance.", rich_help_panel=_HUNT, callback=options.number())
    ] = 3.0,
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
        int,
        typer.Option(help="Images drawn in one call, where memory allows.", rich_help_panel=_HUNT, callback=_COUNT),
    ] = 1,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what the hunt will cost, and stop.", rich_help_panel=_HUNT)
    ] = False,
    held_out: Annotated[
        str,
        typer.Option(
            help="How many further built-in prompts, or a file; 0 for no check.",
            rich_help_panel=_HELD,
            callback=options.text,
        ),
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
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
) -> None:
    """Search the attention heads whose perturbation raises an objective, by HeadHunter's greedy selection.

    A hunt that was interrupted goes on where it stopped, and ends with the same heads. The paper hunts without
    classifier-free guidance: --guidance-scale 1.
    """
    from diffsparse.guidance.hunt import HeadHunter
    from diffsparse.guidance.objectives import objective as named
    from diffsparse_pipelines.machine import place
    from diffsparse_pipelines.preflight import admit

    hunter = HeadHunter(k, rounds, 1.0 if proxy else head_strength, head_scale, kind)
    chosen = options.sampling(steps, height, width, frames, guidance_scale, negative_prompt)
    seen, unseen = _pairs(prompts, images, held_out, model, style)
    loading = {"dtype": dtype, "device": device, "offload": offload, "vae_tiling": vae_tiling}
    admit(model, loading, chosen, [prompt for prompt, _ in [*seen, *unseen]])
    begun = _begun(out, overwrite, objective)
    score = named(objective, place(device))
    session = _Session(model, loading, chosen)
    session.batch, session.proxy = batch, proxy
    heads = session.pool(pool)
    hunter.check(heads)
    settings = repr((hunter, heads, seen, objective, batch, session.searching))
    if begun is None or estimate:
        session.estimate(hunter, heads, seen)
    if estimate:
        return
    if begun is None:
        begun = session.hunt(hunter, heads, seen, score, out, {"objective": objective, "settings": settings})
    elif begun.about["settings"] != settings:
        raise OutputFileError(f"{out} is of a hunt with other settings; choose another --out or use --overwrite")
    preset = begun
    if unseen:
        preset = session.check(preset, unseen, score, out)
    session.console.print(f"{', '.join(preset.heads)} -> {out}", soft_wrap=True)


def _pairs(prompts: str, images: int | None, held_out: str, model: str, style: str = "") -> tuple[Pairs, Pairs]:
    """Prompts and seeds of the hunt, and of the check: prompts and seeds that the hunt does not see."""
    texts = read_prompts(prompts, model)
    count = len(texts) if images is None else images
    ahead = f"{style}, " if style else ""
    seen = [(ahead + texts[i % len(texts)], i) for i in range(count)]
    if held_out == "0":
        return seen, []
    fresh = read_prompts(held_out, model, "--held-out")
    if held_out.isdecimal() and prompts.isdecimal():
        fresh = read_prompts(str(int(prompts) + int(held_out)), model, "--prompts and --held-out together")
        fresh = fresh[int(prompts) :]
    both = sorted(set(fresh) & set(texts))
    if both:
        raise ConfigError(f"--held-out holds prompts of the hunt, such as {both[0]!r}; give it others")
    return seen, [(ahead + text, count + i) for i, text in enumerate(fresh)]


def _begun(out: Path, overwrite: bool, objective: str) -> Preset | None:
    """The preset of a hunt that ended and was stopped in its check, to go on with; None where there is no file."""
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


class _Session:
    """One loaded model, and the ways in which a hunt runs it."""

    batch: int = 1
    proxy: bool = False

    def __init__(self, model: str, loading: dict[str, Any], chosen: dict[str, Any]) -> None:
        from diffsparse_pipelines import families
        from diffsparse_pipelines.generate import call_arguments
        from diffsparse_pipelines.preflight import check
        from diffsparse_pipelines.progress import terminal

        self.console: Console = terminal()
        with self.console.status(f"loading {model}"):
            self.pipe = families.load(model, **loading)
        self.model, self.steps_given = model, "num_inference_steps" in chosen
        self.arguments = call_arguments(self.pipe, families.defaults(model), chosen)
        check(self.pipe, self.arguments)

    @property
    def searching(self) -> dict[str, Any]:
        """The call arguments of the hunt: a proxy runs fewer steps."""
        steps = self.arguments.get("num_inference_steps")
        if not self.proxy or self.steps_given or not steps:
            return self.arguments
        return {**self.arguments, "num_inference_steps": max(_PROXY_LEAST, steps // _PROXY_SHARE)}

    def pool(self, patterns: str) -> list[str]:
        """The names of the heads to try."""
        from diffsparse.guidance.heads import names_of
        from diffsparse.seam.targets import models_of

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
        self,
        hunter: HeadHunter,
        heads: list[str],
        pairs: Pairs,
        score: Objective,
        out: Path,
        record: dict[str, Any],
    ) -> Preset:
        """Search, with a progress bar; `record` goes into the preset."""
        from diffsparse.guidance.hunt import hunt as search
        from diffsparse_pipelines.progress import bar

        about = {
            **record,
            "search": "proxy" if self.proxy else "HeadHunter",
            "model": self.model,
            "steps": self.searching.get("num_inference_steps"),
            "pool": len(heads),
            "images": len(pairs),
        }
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
                name=record["settings"],
                about=about,
                after_trial=moved,
            )

    def check(self, preset: Preset, pairs: Pairs, score: Objective, out: Path) -> Preset:
        """Compare guidance off and on over unseen prompts; into the preset's record, a table and a sheet."""
        import diffsparse
        from diffsparse.files import if_stopped, write_text
        from diffsparse.guidance.hunt import checked
        from diffsparse_pipelines import media
        from diffsparse_pipelines.progress import bar

        clips: dict[str, list[np.ndarray]] = {"off": [], "on": []}
        kept = f"the heads are in {out}; the same command goes on with the check"
        with if_stopped(lambda: kept), bar(self.console) as progress:
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
        self.console.print(_table(preset.about))
        write_text(markdown(preset), out.with_suffix(".md"))
        rows = {
            f"{side} {scores[side][i]:.4f}  {texts[i]}": clips[side][i]
            for i in range(min(_SHOWN, len(pairs)))
            for side in ("off", "on")
        }
        self.console.print(f"off and on, side by side -> {media.sheet(rows, out.with_suffix('.png'))}", soft_wrap=True)
        preset.save(out)  # last: a hunt without a check recorded goes on with it
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


_HEADINGS = ("prompts", "n", "off", "on", "gain (95 % interval)", "better")


def _rows(about: dict[str, Any]) -> list[list[str]]:
    """Texts under `_HEADINGS`: for the hunt's own prompts, and for those that it did not see."""
    held, score = about["held_out"], about["score"]
    own = [f"{score['none']:.4f}", f"{score['all']:.4f}", f"{score['all'] - score['none']:+.4f}"]
    interval = f" ({held['gain_95'][0]:+.4f} to {held['gain_95'][1]:+.4f})" if "gain_95" in held else ""
    n, new = held["pairs"], [f"{held['off']:.4f}", f"{held['on']:.4f}", f"{held['gain']:+.4f}{interval}"]
    return [["of the hunt", str(about["images"]), *own, ""], ["unseen", str(n), *new, f"{held['better']}/{n}"]]


def _table(about: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    shown = Table(title=f"objective: {about['objective']}", title_justify="left", title_style="bold", box=box.SIMPLE)
    for heading in _HEADINGS:
        shown.add_column(heading, justify="left" if heading == "prompts" else "right")
    for row in _rows(about):
        shown.add_row(*row)
    return shown


def markdown(preset: Preset) -> str:
    """The check as a Markdown table, under one line on the hunt and one on the heads that it chose."""
    about = preset.about
    kind = "proxy hunt" if about["search"] == "proxy" else "hunt"
    line = (
        f"{about['model']}: {kind} for `{about['objective']}` over {about['pool']} heads, {about['rounds']} rounds for "
        f"{about['k']} each, {about['images']} images a trial, {about['steps']} steps; {preset.kind}, strength "
        f"{preset.head_strength:g}, scale {preset.head_scale:g}"
    )
    chosen = ", ".join(f"{head} ({score:.4f})" for head, score in about["score"]["when chosen"].items())
    cells = [list(_HEADINGS), ["---", *["---:"] * (len(_HEADINGS) - 1)], *_rows(about)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in cells)
    return f"{line}\n\nHeads, with the score of the set when each joined: {chosen}\n\n{table}\n"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
