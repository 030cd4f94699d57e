"""What a pipeline call will cost, told before it runs: an estimate from shapes, and the same figures afterwards."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

from diffsparse.cost import Estimate, flops
from diffsparse.layout import Layout
from diffsparse.models import Grid, packed_grid, patch_of, spec_of
from diffsparse.patch import models_of
from diffsparse.report import Report
from diffsparse.schedule import Schedule

_SPACE = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")
_TIME = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


class Tokens(NamedTuple):
    """Tokens of one sample: on the grid, and of the prompt."""

    video: int
    text: int


class Compression(NamedTuple):
    """Pixels that make one latent cell, along time, and along height and width."""

    time: int
    space: int

    @classmethod
    def of(cls, pipe: Any) -> Compression | None:
        """As the pipeline's VAE has it; None where it doesn't say."""
        space = next((getattr(pipe, name) for name in _SPACE if getattr(pipe, name, None)), None)
        time = next((getattr(pipe, name) for name in _TIME if getattr(pipe, name, None)), 1)
        return None if space is None else cls(time, space)

    def latent(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent cells of a video of so many frames and pixels; the first frame has a cell of its own."""
        return (frames - 1) // self.time + 1, height // self.space, width // self.space


def grid(model: Any, latent: tuple[int, int, int]) -> Grid:
    """The token grid that `model` makes of a latent of frames x height x width cells."""
    patch = patch_of(model)
    space = 2 if spec_of(model).grid is packed_grid else patch.space  # pipelines of packed images pack 2 x 2 cells
    frames, height, width = latent
    return Grid(-(-frames // patch.time), height // space, width // space)


def grid_tokens(model: Any, latent: tuple[int, int, int]) -> int:
    """Tokens of that grid."""
    return math.prod(grid(model, latent)[:3])


def layout(model: Any, latent: tuple[int, int, int], text: int) -> Layout | None:
    """What self-attention of `model` sees of a latent and `text` tokens of the prompt."""
    spec = spec_of(model)
    return spec.layout(grid(model, latent), grid_tokens(model, latent) + (0 if spec.text == "none" else text))


def tokens(pipe: Any, arguments: dict[str, Any]) -> Tokens | None:
    """Tokens of a call of `pipe`; None where sizes are left to the pipeline."""
    latent = _latent(pipe, arguments)
    if latent is None:
        return None
    model = next(iter(models_of(pipe).values()))
    return Tokens(grid_tokens(model, latent), argument(pipe, arguments, "max_sequence_length") or 0)


def _latent(pipe: Any, arguments: dict[str, Any]) -> tuple[int, int, int] | None:
    """Latent cells of a call of `pipe` along frames, height and width; None where sizes are left to the pipeline."""
    frames, height, width = (argument(pipe, arguments, name) for name in ("num_frames", "height", "width"))
    compression = Compression.of(pipe)
    if compression is None or not height or not width:
        return None
    return compression.latent(frames or 1, height, width)


def argument(pipe: Any, arguments: dict[str, Any], name: str) -> int | None:
    """A whole number that `pipe` is called with: the one given, or else its own default; None where it has none."""
    known = inspect.signature(type(pipe).__call__).parameters
    value = arguments.get(name, known[name].default if name in known else None)
    return value if isinstance(value, int) else None


def preflight(pipe: Any, arguments: dict[str, Any], strategy: Any, schedule: Schedule) -> Estimate | None:
    """What sparse attention can be expected to save of a call.

    None where the call's size or its steps are not known, or what the strategy will compute.
    """
    latent, steps = _latent(pipe, arguments), argument(pipe, arguments, "num_inference_steps")
    counted = tokens(pipe, arguments)
    if latent is None or counted is None or not steps:
        return None
    model = next(iter(models_of(pipe).values()))
    seen = layout(model, latent, counted.text)
    return Estimate.before(flops(model, *counted), strategy, schedule, steps, seen)


def announce(expected: Estimate | None) -> str:
    """The line before a run."""
    if expected is None:
        return "expected speed-up: unknown (of this call's size and steps and the strategy's density, one is not known)"
    return (
        f"attention is {expected.attention_share:.0%} of your step; expected {expected.speedup:.1f}x "
        "(an estimate from the count of operations)"
    )


def compare(expected: Estimate, report: Report, seconds: float) -> str | None:
    """The line after it; None where the run has no dense calls to compare with."""
    found = Estimate.after(report, seconds)
    if found is None:
        return None
    return (
        f"attention was {found.attention_share:.0%} of a dense call (expected {expected.attention_share:.0%}), sparse "
        f"saved {found.speedup:.2f}x (expected {expected.speedup:.2f}x), by the time of this call's own dense steps"
    )
