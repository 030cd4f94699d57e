"""What small transformers are described with: shapes, pieces of inputs and layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Latent cells along frames, height and width, and text tokens."""

    frames: int = 3
    height: int = 8
    width: int = 12
    text: int = 6


OTHER = Shape(2, 12, 16, 9)
Inputs = dict[str, Any]
Expected = tuple[int, int, int, int, int]  # frames, height, width, text before, text after


@dataclass(frozen=True)
class Case:
    """One class. `layout` is what its joint attention must be read as, None where there is none to check."""

    config: dict[str, Any]
    inputs: Callable[[Shape], Inputs]
    layout: Callable[[Shape], Expected] | None = None
    text: str = "encoder_hidden_states"
    extra: dict[str, Any] = field(default_factory=dict)


# --- pieces of inputs ---------------------------------------------------------------------------------------------


def n(*shape: int) -> Tensor:
    return torch.randn(shape)


def now() -> Tensor:
    return torch.tensor([500])


def soon() -> Tensor:
    return torch.tensor([0.5])


def video(s: Shape, channels: int = 4) -> Tensor:
    return n(1, channels, s.frames, s.height, s.width)


def image(s: Shape, channels: int = 4) -> Tensor:
    return n(1, channels, s.height, s.width)


def words(s: Shape, width: int = 16) -> Tensor:
    return n(1, s.text, width)


def all_words(s: Shape) -> Tensor:
    return torch.ones(1, s.text, dtype=torch.bool)


def packed(s: Shape, channels: int) -> Tensor:
    return n(1, s.height // 2 * (s.width // 2), channels)


def grid_ids(s: Shape, axes: int = 3) -> Tensor:
    """Ids (0, row, column) of packed tokens, with more zeros where a model has more axes."""
    rows, columns = torch.arange(s.height // 2), torch.arange(s.width // 2)
    ids = torch.zeros(len(rows), len(columns), axes)
    ids[..., 1], ids[..., 2] = rows[:, None], columns
    return ids.flatten(0, 1)


def rotary(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(tokens, dim)
    return angles.cos(), angles.sin()


# --- layouts ------------------------------------------------------------------------------------------------------


def video2(s: Shape) -> Expected:
    """Patches of 1 x 2 x 2, no text."""
    return s.frames, s.height // 2, s.width // 2, 0, 0


def video2_before(s: Shape) -> Expected:
    return s.frames, s.height // 2, s.width // 2, s.text, 0


def video2_after(s: Shape) -> Expected:
    return s.frames, s.height // 2, s.width // 2, 0, s.text


def video1_after(s: Shape) -> Expected:
    return s.frames, s.height, s.width, 0, s.text


def image2(s: Shape) -> Expected:
    return 1, s.height // 2, s.width // 2, 0, 0


def image2_before(s: Shape) -> Expected:
    return 1, s.height // 2, s.width // 2, s.text, 0


def image2_after(s: Shape) -> Expected:
    return 1, s.height // 2, s.width // 2, 0, s.text


# --- pieces of configurations -------------------------------------------------------------------------------------

HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
LATENT = {"in_channels": 4, "out_channels": 4}
