"""A hunt on one loaded model: its runs, its estimate, and the check on prompts that it did not see."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import ttest_rel

import diffsparse
from diffsparse.files import if_stopped, write_text
from diffsparse.guidance import hunt as search
from diffsparse.guidance.heads import names_of
from diffsparse.guidance.hunt import HeadHunter, checked
from diffsparse.guidance.objectives import Objective
from diffsparse.guidance.preset import Preset
from diffsparse.seam.targets import models_of
from diffsparse_pipelines import generation, media
from diffsparse_pipelines.progress import bar, say, show_table, terminal
from diffsparse_pipelines.tables import FEWEST, duration, markdown_table

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_PROXY_SHARE, _PROXY_LEAST = 4, 4  # a proxy runs a quarter of the steps, and at least four
_SHOWN = 4  # prompts on the sheet

Pairs = list[tuple[str, int]]


@dataclass
class Session:
    """One loaded model, and the ways in which a hunt runs it.

    Attributes:
        pipe: the pipeline.
        model: its name, for the record.
        arguments: what it is called with.
        batch: images drawn in one call; halved where memory runs out.
        proxy: search in a cheaper way that is not the paper's.
        shorter: let the search, unlike the check, run a quarter of the steps.
    """

    pipe: DiffusionPipeline
    model: str
    arguments: dict[str, object]
    batch: int = 1
    proxy: bool = False
    shorter: bool = False

    @property
    def searching(self) -> dict[str, object]:
        """The call arguments of the hunt."""
        steps = self.arguments.get("num_inference_steps")
        if not self.shorter or not isinstance(steps, int) or not steps:
            return self.arguments
        return {**self.arguments, "num_inference_steps": max(_PROXY_LEAST, steps // _PROXY_SHARE)}

    def pool(self, patterns: Sequence[str]) -> list[str]:
        """The names of the heads to try."""
        first = next(iter(models_of(self.pipe).values()))  # experts of one pipeline are built alike
        return names_of(first, patterns)

    def render(self, arguments: Mapping[str, object], pairs: Sequence[tuple[str, int]]) -> list[np.ndarray]:
        """Clips of some pairs, in batches; where memory runs out, in smaller ones from then on."""
        clips: list[np.ndarray] = []
        while len(clips) < len(pairs):
            part = pairs[len(clips) : len(clips) + self.batch]
            try:
                clips += self._draw(arguments, part)
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
                torch.cuda.empty_cache()
        return clips

    def _draw(self, arguments: Mapping[str, object], pairs: Sequence[tuple[str, int]]) -> list[np.ndarray]:
        if len(pairs) > 1:
            return generation.generations(self.pipe, arguments, pairs)
        [(prompt, seed)] = pairs
        return [generation.generation(self.pipe, {**arguments, "prompt": prompt}, seed).frames]

    def estimate(self, hunter: HeadHunter, heads: list[str], pairs: Pairs, unseen: int = 0) -> None:
        """Time one guided generation, and say how long all of them will take, without the check."""
        trials = hunter.trials(len(heads))
        with diffsparse.guide(self.pipe, hunter.preset([heads[len(heads) // 2]])):
            self.render(self.searching, pairs[:1])  # the first call is slower than the rest
            start = time.perf_counter()
            self.render(self.searching, pairs[:1])
        seconds = time.perf_counter() - start
        total, kind = trials * len(pairs), "proxy hunt (not the paper's)" if self.proxy else "hunt"
        steps = self.searching.get("num_inference_steps", "?")
        say(
            f"{kind} for {hunter.rounds} x {hunter.k} heads out of {len(heads)}: {trials} trials x {len(pairs)} images "
            f"= {total} generations of {steps} steps, about {duration(total * seconds)} at {seconds:.2f} s each"
            + (f"; then {2 * unseen} for the check" if unseen else ""),
            highlight=False,
        )

    def hunt(
        self,
        hunter: HeadHunter,
        heads: list[str],
        pairs: Pairs,
        score: Objective,
        out: Path,
        record: dict[str, str],
    ) -> Preset:
        """Search, with a progress bar; `record` goes into the preset."""
        about = {
            **record,
            "search": "proxy" if self.proxy else "HeadHunter",
            "model": self.model,
            "steps": self.searching.get("num_inference_steps"),
            "pool": len(heads),
            "images": len(pairs),
        }
        with bar(terminal()) as progress:
            task = None

            def after_trial(done: int) -> None:
                nonlocal task
                if task is None:  # what an earlier attempt did counts as done, not as fast
                    task = progress.add_task("trials", total=hunter.trials(len(heads)), completed=done)
                progress.update(task, completed=done)

            return search.hunt(
                self.pipe,
                hunter,
                heads,
                pairs,
                lambda wanted: self.render(self.searching, wanted),
                score,
                out,
                name=record["settings"],
                about=about,
                after_trial=after_trial,
            )

    def check(self, preset: Preset, pairs: Pairs, score: Objective, out: Path) -> Preset:
        """Compare guidance off and on over unseen prompts; into the preset's record, a table and a sheet."""
        kept = f"the heads are in {out}; the same command goes on with the check"
        with if_stopped(lambda: kept):
            clips = self._off_and_on(preset, pairs)
        texts = [prompt for prompt, _ in pairs]
        scores = {side: checked(score(shown, texts), len(pairs)) for side, shown in clips.items()}
        found = {**compared(scores["off"], scores["on"]), "scores": scores, "prompts": texts}
        preset = replace(preset, about={**preset.about, "held_out": found})
        show_table(_rows(preset), "lrrrrr", _headings(preset), f"objective: {preset.about['objective']}")
        write_text(markdown(preset), out.with_suffix(".md"))
        rows = {
            f"{side} {scores[side][i]:.4f}  {texts[i]}": clips[side][i]
            for i in range(min(_SHOWN, len(pairs)))
            for side in ("off", "on")
        }
        say(f"off and on, side by side -> {media.sheet(rows, out.with_suffix('.png'))}")
        preset.save(out)  # last: a hunt without a check recorded goes on with it
        return preset

    def _off_and_on(self, preset: Preset, pairs: Pairs) -> dict[str, list[np.ndarray]]:
        """Clips of the pairs without and with guidance."""
        clips: dict[str, list[np.ndarray]] = {"off": [], "on": []}
        with bar(terminal()) as progress:
            task = progress.add_task("held-out prompts", total=2 * len(pairs))
            for pair in pairs:
                clips["off"] += self.render(self.arguments, [pair])
                progress.advance(task)
                with diffsparse.guide(self.pipe, preset):
                    clips["on"] += self.render(self.arguments, [pair])
                progress.advance(task)
        return clips


def compared(off: list[float], on: list[float]) -> dict[str, float | list[float]]:
    """Means of paired scores, and of their difference the 95 % confidence interval (Student's t, paired).

    Of fewer than `FEWEST` pairs there is no interval, but the range of their differences.
    """
    gain = np.subtract(on, off)
    found: dict[str, float | list[float]] = {
        "pairs": len(gain),
        "off": float(np.mean(off)),
        "on": float(np.mean(on)),
        "gain": float(gain.mean()),
        "better": int((gain > 0).sum()),
    }
    if len(gain) >= FEWEST and gain.std() > 0:
        low, high = ttest_rel(on, off).confidence_interval(0.95)
        found["gain_95"] = [float(low), float(high)]
    else:
        found["gain_range"] = [float(gain.min()), float(gain.max())]
    return found


def _headings(preset: Preset) -> list[str]:
    spread = "95 % interval" if "gain_95" in preset.about["held_out"] else "lowest to highest"
    return ["prompts", "n", "off", "on", f"gain ({spread})", "better"]


def _rows(preset: Preset) -> list[list[str]]:
    """Texts under the headings: for the hunt's own prompts, and for those that it did not see."""
    about = preset.about
    held, score = about["held_out"], about["score"]
    own = [f"{score['none']:.4f}", f"{score['all']:.4f}", f"{score['all'] - score['none']:+.4f}"]
    low, high = held.get("gain_95") or held["gain_range"]
    gain = f"{held['gain']:+.4f} ({low:+.4f} to {high:+.4f})"
    n, new = held["pairs"], [f"{held['off']:.4f}", f"{held['on']:.4f}", gain]
    return [["of the hunt", str(about["images"]), *own, ""], ["unseen", str(n), *new, f"{held['better']}/{n}"]]


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
    table = markdown_table(_headings(preset), _rows(preset))
    return f"{line}\n\nHeads, with the score of the set when each joined: {chosen}\n\n{table}\n"
