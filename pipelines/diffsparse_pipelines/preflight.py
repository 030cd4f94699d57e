"""What a pipeline call will cost, told before it runs: an estimate from shapes, and the same figures afterwards."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from diffsparse.cost import Estimate, flops
from diffsparse.models import packed_grid, patch_of, spec_of
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


def grid_tokens(model: Any, latent: tuple[int, int, int]) -> int:
    """Tokens that `model` makes of a latent of frames x height x width cells."""
    patch = patch_of(model)
    space = 2 if spec_of(model).grid is packed_grid else patch.space  # pipelines of packed images pack 2 x 2 cells
    frames, height, width = latent
    return -(-frames // patch.time) * (height // space) * (width // space)


def tokens(pipe: Any, arguments: dict[str, Any]) -> Tokens | None:
    """Tokens of a call of `pipe`; None where sizes are left to the pipeline."""
    names = ("num_frames", "height", "width", "max_sequence_length")
    frames, height, width, text = (argument(pipe, arguments, name) for name in names)
    compression = Compression.of(pipe)
    if compression is None or not height or not width:
        return None
    model = next(iter(models_of(pipe).values()))
    return Tokens(grid_tokens(model, compression.latent(frames or 1, height, width)), text or 0)


def argument(pipe: Any, arguments: dict[str, Any], name: str) -> int | None:
    """A whole number that `pipe` is called with: the one given, or else its own default; None where it has none."""
    known = inspect.signature(type(pipe).__call__).parameters
    value = arguments.get(name, known[name].default if name in known else None)
    return value if isinstance(value, int) else None


def preflight(pipe: Any, arguments: dict[str, Any], strategy: Any, schedule: Schedule) -> Estimate | None:
    """What sparse attention can be expected to save of a call; None where its size or its steps are not known."""
    counted, steps = tokens(pipe, arguments), argument(pipe, arguments, "num_inference_steps")
    if counted is None or not steps:
        return None
    return Estimate.before(flops(next(iter(models_of(pipe).values())), *counted), strategy, schedule, steps)


def announce(expected: Estimate) -> str:
    """The line before a run."""
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
