"""Where the tokens of a sequence come from: the only place that counts tokens and blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

from diffsparse_kernels import Block, edges

P = ParamSpec("P")
T = TypeVar("T")


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """For what is made once and kept: plain tensors on the CPU, whatever mode and default device the caller has."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.device("cpu"):
            return make(*args, **kwargs)

    return made


@dataclass(frozen=True)
class Layout:
    """A sequence of `frames x height x width` video tokens in raster order, with text before or after them.

    All counts are in tokens (after patching), not in pixels or latents. An image has one frame. "Text" is every
    token that is not on the grid: prompt rows, registers, padding, history, and next to the video `plain_before` and
    `plain_after` tokens of reference images or conditions, which are pixels too: no sink for attention. `references`
    are frames, height and width of what the latter make up, one behind the other, if that is known.
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0
    plain_before: int = 0
    plain_after: int = 0
    references: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "references", tuple(map(tuple, self.references)))  # JSON makes lists of them

    @property
    def video(self) -> int:
        """Number of tokens on the grid."""
        return self.frames * self.height * self.width

    @property
    def span(self) -> slice:
        """Where the video lies in the sequence."""
        return slice(self.text_before, self.text_before + self.video)

    @property
    def tokens(self) -> int:
        """Length N of the whole sequence."""
        return self.text_before + self.video + self.text_after

    @property
    def grid(self) -> Layout:
        """The video without the text."""
        return Layout(self.frames, self.height, self.width)

    def text_last(self) -> Layout:
        """The same tokens with all text behind the video, as `HeadOrders` puts them."""
        return replace(self.grid, text_after=self.tokens - self.video)

    @property
    def has_text(self) -> bool:
        """Whether any token is off the grid."""
        return self.text_before + self.text_after > 0

    def cells(self) -> torch.Tensor:
        """int64 [frames, height, width]: which token lies where, -1 where none does.

        References are further frames, each from the first row and column on, as positions are counted.
        """
        sizes = [(self.frames, self.height, self.width), *self.references]
        frames, heights, widths = zip(*sizes, strict=True)
        cells = torch.full((sum(frames), max(heights), max(widths)), -1, device="cpu")
        token, frame = self.text_before, 0
        for f, h, w in sizes:
            cells[frame : frame + f, :h, :w] = torch.arange(token, token + f * h * w, device="cpu").view(f, h, w)
            token, frame = token + f * h * w, frame + f
        return cells

    def blocks(self, block: int) -> int:
        """Number of blocks of `block` tokens; the last one may be ragged."""
        return -(-self.tokens // block)

    def text_blocks(self, block: int) -> torch.Tensor:
        """bool [blocks]: the blocks that hold at least one text token that is not plain."""
        return _text_blocks(self, block)

    def text_sink(self, block: Block, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """bool [nQ, nK]: rows and columns that hold text and so are never dropped (None without text)."""
        if self.text_before + self.text_after == self.plain_before + self.plain_after:
            return None
        return _text_sink(self, block, torch.device(device))

    def __str__(self) -> str:
        text = f" + {self.text_before}|{self.text_after} text" if self.has_text else ""
        return f"{self.frames}x{self.height}x{self.width}{text} = {self.tokens} tokens"


@lru_cache(maxsize=8)
@kept
def _text_sink(layout: Layout, block: Block, device: torch.device) -> torch.Tensor:
    rows, columns = (layout.text_blocks(edge) for edge in edges(block))
    return (rows[:, None] | columns).to(device)


@lru_cache(maxsize=64)
@kept
def _text_blocks(layout: Layout, block: int) -> torch.Tensor:
    first = torch.arange(layout.blocks(block), device="cpu") * block
    last = (first + block).clamp(max=layout.tokens) - 1
    end = layout.tokens - layout.text_after + layout.plain_after
    return (first < layout.text_before - layout.plain_before) | (last >= end)
