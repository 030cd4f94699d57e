"""A picture of unselected clips: one row per prompt, with its text; time runs to the right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from diffsparse_pipelines import media, tiny
from diffsparse_pipelines.tiny.variants import VARIANTS


def generate(pipe: Any, prompt: str, seed: int, **options: Any) -> Tensor:
    """One clip float32 [F, 3, H, W] in [0, 1]; the same seed gives the same clip."""
    generator = torch.Generator().manual_seed(seed)
    frames = pipe(prompt, generator=generator, output_type="pt", **options).frames
    clip: Tensor = frames[0].float().cpu()
    return clip


def main() -> None:
    """Write a sheet of the first clips: prompts of seed 0, clip i drawn once with seed i."""
    parser = argparse.ArgumentParser(prog="python -m training.sheet", description=main.__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="default")
    parser.add_argument("--clips", type=int, default=10, help="number of clips (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="PNG to write (default: %(default)s)")
    chosen = parser.parse_args()
    pipe = tiny.load(chosen.variant)
    pipe.set_progress_bar_config(disable=True)
    jobs = list(enumerate(tiny.prompts(chosen.clips)))
    clips = {text: generate(pipe, text, i, **tiny.defaults(chosen.variant)) for i, text in track(jobs, "clips")}
    media.sheet({text: clip.permute(0, 2, 3, 1).numpy() for text, clip in clips.items()}, chosen.out)


if __name__ == "__main__":
    main()
