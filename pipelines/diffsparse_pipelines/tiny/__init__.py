"""A small, really trained text-to-video model inside the package: `load()` needs no network and no GPU.

Its numbers rank methods and catch bugs; they predict nothing about Wan 2.1 (see README.md in this folder).
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import WanPipeline

from diffsparse_pipelines.loading import from_pretrained, no_bars
from diffsparse_pipelines.tiny.captions import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, WORDS, sample
from diffsparse_pipelines.tiny.variants import TEXT_LENGTH, VARIANTS

if TYPE_CHECKING:
    from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

__all__ = ["TinyPipeline", "defaults", "folder", "known_words", "load", "prompts", "strange_words"]

_ROUNDING = "`num_frames - 1` has to be divisible by 1"
_LOG = logging.getLogger("diffusers.pipelines.wan.pipeline_wan")


class TinyPipeline(WanPipeline):  # type: ignore[misc]
    """The stock pipeline, called with the number of frames that is wanted.

    With a VAE that keeps every frame, the stock `n % 1 != 1` is always true, and n frames asked for give n + 1.
    """

    @functools.wraps(WanPipeline.__call__)
    def __call__(
        self, prompt: str | list[str] | None = None, *, num_frames: int = 17, **options: object
    ) -> WanPipelineOutput:
        """Generate `num_frames` frames; all other options are those of `WanPipeline`."""
        _LOG.addFilter(_not_about_rounding)
        try:
            return super().__call__(prompt, num_frames=num_frames - 1, **options)
        finally:
            _LOG.removeFilter(_not_about_rounding)


def _not_about_rounding(record: logging.LogRecord) -> bool:
    return _ROUNDING not in record.getMessage()


def folder(variant: str = "default") -> Path:
    """Where a variant lies, in the layout of `WanPipeline.from_pretrained`.

    Raises:
        LookupError: no such variant.
    """
    _known(variant)
    return Path(__file__).parent / "weights" / variant


def load(variant: str = "default", dtype: torch.dtype = torch.float32) -> TinyPipeline:
    """The embedded pipeline, in evaluation mode on the CPU.

    Args:
        variant: "default" (64x64 pixels, 17 frames, 4352 tokens) or "twin" (32x32, 9 frames, 576 tokens, for tests).
        dtype: of transformer and text encoder; the weights are kept as bfloat16, the VAE always runs in float32.

    Raises:
        LookupError: no such variant.

    Examples:
        >>> from diffsparse_pipelines import tiny
        >>> pipe, call = tiny.load("twin"), tiny.defaults("twin")
        >>> (prompt,) = tiny.prompts(1)
        >>> video = pipe(prompt, **call).frames[0]
        >>> video.shape
        (9, 32, 32, 3)
    """
    path = folder(variant)
    with no_bars():
        pipe: TinyPipeline = from_pretrained(TinyPipeline, str(path), dtype, local_files_only=True)
    return pipe


def defaults(variant: str = "default") -> dict[str, int | float | str]:
    """The call arguments that a variant was trained for, without prompt and generator.

    Raises:
        LookupError: no such variant.
    """
    _known(variant)
    sizes = VARIANTS[variant]
    return {
        "height": sizes.pixels,
        "width": sizes.pixels,
        "num_frames": sizes.frames,
        "num_inference_steps": 15,
        "guidance_scale": 1.0,
        "negative_prompt": "",
        "max_sequence_length": TEXT_LENGTH,
    }


def prompts(n: int, seed: int = 0) -> list[str]:
    """Captions of the kind that the model knows; the same arguments give the same captions.

    Args:
        n: how many.
        seed: of the draw.
    """
    return [str(caption) for caption in sample(n, seed)]


def strange_words(texts: Iterable[str]) -> list[str]:
    """The words of some prompts that the model was never shown, and reads as one and the same."""
    words = (word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower()))  # as its tokenizer cuts
    return [word for word in dict.fromkeys(words) if word not in WORDS]


def known_words() -> str:
    """What a prompt can be made of, as people read it."""
    listed = (COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)
    colours, shapes, directions, backgrounds = ("|".join(words) for words in listed)
    return f"a {colours} {shapes} moving {directions} on a {backgrounds} background"


def _known(variant: str) -> None:
    if variant not in VARIANTS:
        raise LookupError(f"wanted one of the tiny model's variants {', '.join(VARIANTS)}; got {variant!r}")
