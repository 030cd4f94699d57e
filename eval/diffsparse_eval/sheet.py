"""One picture of an experiment: for each method its frames between the dense ones and the difference of the two."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from diffsparse.files import whole
from diffsparse_pipelines.media import Frames, to_bytes
from diffsparse_pipelines.tables import broken

_PAPER, _INK, _PALE, _LINE = "#f7f5f0", "#1d1d1f", "#5c5c60", "#d8d4ca"
_MARGIN, _GAP, _BETWEEN = 44, 6, 32  # pixels: around, between frames, between groups of frames and between rows
_LABEL, _GROUP = 430, 444  # widths of the names, and of a group of frames
_TITLE, _FIGURES, _TEXT = 40, 34, 27  # sizes of type; half of the smallest is legible
_LEADING = 1.3
_FRAMES = 3
_FACTORS = (2, 4, 8, 16, 32, 64)  # by which a difference is amplified: the largest that saturates almost nowhere
_SATURATED = 99.5  # percentile


class Strip(NamedTuple):
    """One row: a method, its figures, and its frames, float [F, H, W, C] in [0, 1]."""

    name: str
    figures: str
    frames: Frames


def draw(title: str, facts: str, dense: Frames, strips: list[Strip], path: Path) -> None:
    """Write a PNG with a row for each method: a few dense frames, its own, and the amplified difference.

    Args:
        title: what is seen.
        facts: what holds for all rows.
        dense: frames, float [F, H, W, C] in [0, 1].
        strips: the methods.
        path: the file.

    Raises:
        OutputFileError: it can't be written.
    """
    differences = [np.abs(strip.frames - dense) for strip in strips]
    factor = _factor(differences)
    page = _Page(len(strips), _tiles(dense), title, facts)
    page.headings(["dense", "with the method", f"difference, times {factor}"])
    for strip, difference in zip(strips, differences, strict=True):
        page.row(strip, [dense, strip.frames, np.clip(difference * factor, 0, 1)])
    with whole(path) as temporary:
        page.image.save(temporary, format="png")


def _factor(differences: list[Frames]) -> int:
    """One for all rows, so that they can be compared."""
    highest = max(float(np.percentile(difference, _SATURATED)) for difference in differences)
    return max((factor for factor in _FACTORS if factor * highest <= 1), default=1)


def _tiles(frames: Frames) -> tuple[int, int, int]:
    """How many frames a group shows, and their width and height on the page."""
    count = min(_FRAMES, len(frames))
    width = (_GROUP - _GAP * (count - 1)) // count
    return count, width, round(width * frames.shape[1] / frames.shape[2])


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The one that comes with matplotlib."""
    weight = "bold" if bold else "normal"
    return ImageFont.truetype(
        font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight)), size
    )


class _Page:
    """A sheet of paper that fills from the top."""

    def __init__(self, rows: int, tiles: tuple[int, int, int], title: str, facts: str) -> None:
        self.count, self.width, self.height = tiles
        wide = 2 * _MARGIN + _LABEL + 3 * (_GROUP + _BETWEEN)
        texts = [(title, _font(_TITLE, bold=True), _INK), (facts, _font(_TEXT), _PALE)]
        lines = [(line, font, ink) for text, font, ink in texts for line in _fitted(text, font, wide - 2 * _MARGIN)]
        step = max(self.height, round((3 * _TEXT + _FIGURES) * _LEADING)) + _BETWEEN
        top = _MARGIN + sum(round(font.size * _LEADING) for _, font, _ in lines)
        tall = top + _BETWEEN + round(_TEXT * 1.6) + rows * step + _MARGIN - _BETWEEN
        self.step, self.y = step, _MARGIN
        self.image = Image.new("RGB", (wide, tall), _PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self.pen.rectangle((0, 0, wide - 1, tall - 1), outline=_LINE, width=2)
        self._write(_MARGIN, lines)
        self.y = top + _BETWEEN

    def headings(self, texts: list[str]) -> None:
        """Above the three groups of frames."""
        for number, text in enumerate(texts):
            self.pen.text((self._left(number), self.y), text, _INK, _font(_TEXT))
        self.y += round(_TEXT * 1.6)

    def row(self, strip: Strip, groups: list[Frames]) -> None:
        """A name and its figures, and three groups of frames."""
        name, font = _font(_TEXT, bold=True), _font(_FIGURES)
        lines = [(line, name, _INK) for line in _fitted(strip.name, name, _LABEL)]
        self._write(_MARGIN, [*lines, (strip.figures, font, _INK)])
        for number, frames in enumerate(groups):
            chosen = np.linspace(0, len(frames) - 1, self.count).round().astype(int)
            for place, frame in enumerate(to_bytes(frames[chosen])):
                tile = Image.fromarray(frame).resize((self.width, self.height), Image.Resampling.BOX)
                self.image.paste(tile, (self._left(number) + place * (self.width + _GAP), self.y))
        self.y += self.step

    def _left(self, group: int) -> int:
        return _MARGIN + _LABEL + _BETWEEN + group * (_GROUP + _BETWEEN)

    def _write(self, left: int, lines: list[tuple[str, ImageFont.FreeTypeFont, str]]) -> None:
        """Lines from the top of what is free, which stays as it is."""
        y = self.y
        for text, font, ink in lines:
            self.pen.text((left, y), text, ink, font)
            y += round(font.size * _LEADING)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """The lines of a text that is so many pixels wide; no more than `most`."""
    letters = int(4 * width / font.size)
    lines = broken(text, letters)
    while letters > 1 and max(map(font.getlength, lines)) > width:
        letters -= 1
        lines = broken(text, letters)
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][:-1]}…"]
