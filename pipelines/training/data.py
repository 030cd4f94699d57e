"""Captioned clips, drawn on demand: one coloured shape that crosses a plain, striped or gradient background.

The object leaves a fading trail. Rotary positions are relative, so without one a model has to find the sign of a
motion from pairs of frames alone; the trail shows in each frame where the object comes from. The background has a still
grain that cannot be predicted from one frame: as in real videos, the model must look at the same place in other frames.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsparse_pipelines.tiny.captions import CAPTIONS, COLOURS, DIRECTIONS, Caption

FASTEST = 0.075  # share of the frame that an object crosses between two frames, at most
TRAIL = 6  # earlier frames that still shine through
_GLOW = 0.55  # opacity of the latest of them; the others fall off in a straight line
CELL = 4  # pixels along the edge of one cell of a background's grain: a token of the model
_GRAIN = 0.5  # how much darker than its background a cell can be


def clips(batch: int, frames: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw captions and one clip for each.

    Args:
        batch: clips to draw.
        frames: frames of a clip.
        size: height and width in pixels.
        generator: the only source of randomness; its device is where the clips are drawn.

    Returns:
        video float32 [B, 3, F, H, W] in [-1, 1], and the place of each caption in `CAPTIONS`, int64 [B].
    """
    picked = torch.randint(len(CAPTIONS), (batch,), generator=generator, device=generator.device)
    return render([CAPTIONS[i] for i in picked.tolist()], frames, size, generator), picked


def render(captions: list[Caption], frames: int, size: int, generator: torch.Generator) -> Tensor:
    """One clip for each caption: place, speed, size and background colours are drawn from `generator`.

    Returns:
        video float32 [B, 3, F, H, W] in [-1, 1], on the device of the generator.
    """
    device = generator.device
    axis = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centre, radius = _paths(captions, frames, generator)
    dx = x - centre[:, :, 0, None, None]  # [B, TRAIL + F, H, W]
    dy = y - centre[:, :, 1, None, None]
    outside = _distance([c.shape for c in captions], dx, dy, radius[:, None, None, None])
    cover = _trailed((0.5 - outside * size).clamp(0, 1))[:, None]  # one pixel of soft edge
    paint = torch.tensor([COLOURS[c.colour] for c in captions], device=device)[:, :, None, None, None]
    behind = _backgrounds([c.background for c in captions], x, y, generator)[:, :, None]
    return (behind * (1 - cover) + paint * cover) * 2 - 1


def _trailed(cover: Tensor) -> Tensor:
    """Opacity [B, F, H, W] of object and trail, from the object's own on `TRAIL` more frames before the clip."""
    frames = cover.shape[1] - TRAIL
    fade = [1.0, *(_GLOW * (1 - lag / TRAIL) for lag in range(TRAIL))]
    shown = [share * cover[:, TRAIL - lag : TRAIL - lag + frames] for lag, share in enumerate(fade)]
    return torch.stack(shown).amax(0)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def _paths(captions: list[Caption], frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres [B, TRAIL + F, 2] as (x, y) and radii [B], in shares of the frame.

    Objects stay whole inside the frame in the F frames of the clip; those before it only feed the trail.
    """
    count, device = len(captions), generator.device
    radius = _uniform(count, 0.15, 0.2, generator)
    room = 1 - 2 * radius
    way = (room * _uniform(count, 0.6, 1.0, generator)).clamp(max=FASTEST * (frames - 1))
    start = radius + _uniform(count, 0, 1, generator) * (room - way)
    beside = radius + _uniform(count, 0, 1, generator) * room
    time = torch.arange(-TRAIL, frames, device=device) / max(frames - 1, 1)
    along = start[:, None] + way[:, None] * time  # [B, TRAIL + F]
    heading = torch.tensor([DIRECTIONS[c.direction] for c in captions], device=device)
    along = torch.where(heading.sum(1, keepdim=True) > 0, along, 1 - along)
    across = beside[:, None].expand(-1, len(time))
    level = (heading[:, 0] != 0)[:, None, None]
    return torch.where(level, torch.stack((along, across), -1), torch.stack((across, along), -1)), radius


def _distance(shapes: list[str], dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside; an upright triangle stands on its base."""
    sides = {
        "circle": (dx * dx + dy * dy).sqrt() - radius,
        "square": torch.maximum(dx.abs(), dy.abs()) - 0.85 * radius,
        "triangle": torch.maximum(0.894 * dx.abs() - 0.447 * (dy + 1.05 * radius), dy - 0.85 * radius),
    }
    return torch.stack([sides[shape][i] for i, shape in enumerate(shapes)])


def _backgrounds(kinds: list[str], x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Still pictures [B, 3, H, W] in [0, 1] of muted colours, always darker than the objects."""
    count = len(kinds)
    hue = _uniform(count, 0, 1, generator)
    dark = _rgb(hue, _uniform(count, 0.35, 0.75, generator), _uniform(count, 0.3, 0.5, generator))
    near = (hue + _uniform(count, 0, 0.15, generator)) % 1
    light = _rgb(near, _uniform(count, 0.3, 0.7, generator), _uniform(count, 0.45, 0.65, generator))
    level = (_uniform(count, 0, 1, generator) < 0.5)[:, None, None]
    along = torch.where(level, x, y)  # [B, H, W]
    period = _uniform(count, 0.35, 0.6, generator)[:, None, None]
    phase = _uniform(count, 0, 1, generator)[:, None, None]
    mixes = {
        "plain": torch.zeros_like(along),
        "striped": (3 * torch.sin(2 * math.pi * (along / period + phase)) + 0.5).clamp(0, 1),
        "gradient": along,
    }
    mix = torch.stack([mixes[kind][i] for i, kind in enumerate(kinds)])[:, None]
    return (dark[:, :, None, None] * (1 - mix) + light[:, :, None, None] * mix) * _grain(count, len(x), generator)


def _grain(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Brightness of each cell of a background, [B, 1, size, size] in [1 - _GRAIN, 1]."""
    cells = 1 - _GRAIN * torch.rand(
        count, 1, -(-size // CELL), -(-size // CELL), generator=generator, device=generator.device
    )
    return cells.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)[..., :size, :size]


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """HSV to RGB, all in [0, 1]: [B] each to [B, 3]."""
    sector = torch.stack([(hue * 6 + n) % 6 for n in (5, 3, 1)], -1)
    chroma = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * chroma)
