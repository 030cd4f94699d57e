"""The captions that the model was trained on, and the words that they are made of."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

COLOURS = {"red": (1.0, 0.12, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.15, 0.3, 1.0), "yellow": (1.0, 0.9, 0.1)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
BACKGROUNDS = ("plain", "striped", "gradient")


@dataclass(frozen=True)
class Caption:
    """What a clip shows; `str()` gives the words that the model is trained on."""

    colour: str
    shape: str
    direction: str
    background: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} on a {self.background} background"


CAPTIONS = tuple(Caption(*words) for words in itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS))
WORDS = (
    *("<pad>", "</s>", "<unk>", "a", "moving", "on", "background", "and", "over", "the"),
    *(*COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS),
)


def sample(count: int, seed: int) -> list[Caption]:
    """`count` captions, drawn with equal chance and without repeats as long as there are enough of them."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(CAPTIONS), generator=generator) for _ in range(-(-count // len(CAPTIONS)))]
    return [CAPTIONS[int(i)] for i in torch.cat(rounds or [torch.empty(0)])[:count]]
