"""Where the tokens of a sequence come from: the only place that counts tokens and blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

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


Size = tuple[int, int, int]  # frames, height, width
Kind = Literal["text", "audio", "condition", "reference"]
_EXACT_ROWS = ("text", "audio")
_EXACT_KEYS = ("text", "audio", "condition")


class Span(NamedTuple):
    """A run of tokens beside the output's grid.

    Attributes:
        start: its first token, in the sequence.
        tokens: how many.
        kind: rows and keys of "text" and "audio" are always computed; of a "condition" the keys are, a sink for
            attention; a "reference" is an image or a video as the output is, and competes with it.
        grid: its frames, height and width, if they are known.
    """

    start: int
    tokens: int
    kind: Kind
    grid: Size | None = None

    @property
    def stop(self) -> int:
        """The token behind it."""
        return self.start + self.tokens


@dataclass(frozen=True)
class Layout:
    """A sequence of `frames x height x width` tokens of the output in raster order, with others before or after them.

    All counts are in tokens (after patching), not in pixels or latents. An image has one frame. What lies beside the
    grid is text, or is treated as such (registers, padding, history), unless one of `spans` says otherwise.

    Attributes:
        frames: frames of the output's grid, in tokens; 1 for an image.
        height: its rows of tokens.
        width: its columns of tokens.
        text_before: tokens before the grid.
        text_after: tokens after it.
        spans: those of them that are no text, in order.
        asked: runs of tokens, first and last + 1, whose queries are asked for, where these are not all: the keys of the
            others were kept from an earlier step, or come from another stream.
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0
    spans: tuple[Span, ...] = ()
    asked: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:  # JSON makes lists of tuples
        spans = (Span(start, n, kind, grid and tuple(grid)) for start, n, kind, grid in self.spans)  # type: ignore[arg-type]
        object.__setattr__(self, "spans", tuple(spans))
        object.__setattr__(self, "asked", tuple((first, last) for first, last in self.asked))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Layout:
        """The layout that `dataclasses.asdict` made these values of, in this or an earlier release.

        Raises:
            TypeError: no layout was made into these.
            ValueError: likewise.
        """
        values = dict(values)
        before, after = values.pop("plain_before", 0), values.pop("plain_after", 0)
        values.pop("references", None)  # they were of the tokens `plain_after`
        found = cls(**values)
        spans = (Span(found.text_before - before, before, "reference"), Span(found.span.stop, after, "reference"))
        return replace(found, spans=tuple(span for span in spans if span.tokens)) if before or after else found

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
        """The same tokens with all that are not on the grid behind it, as text, as `HeadOrders` puts them."""
        asked = sorted(run for first, last in self.asked for run in self._moved(first, last))
        return replace(self.grid, text_after=self.tokens - self.video, asked=_merged(asked))

    def _moved(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where the tokens of a run stand in `text_last`, as runs."""
        first, last = _ends(self.span)
        parts = (0, first, self.video), (first, last, -first), (last, self.tokens, 0)
        found = ((max(start, first), min(stop, last), by) for first, last, by in parts)
        return [(first + by, last + by) for first, last, by in found if first < last]

    @property
    def queries(self) -> int:
        """How many tokens ask: all but those of whom only keys are there."""
        return sum(last - first for first, last in self._asked)

    @property
    def _asked(self) -> tuple[tuple[int, int], ...]:
        return self.asked or ((0, self.tokens),)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """Of x [B, H, N, D] the rows that are asked for; no copy where they are one run."""
        parts = [x[:, :, first:last] for first, last in self._asked]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def scattered(self, x: torch.Tensor) -> torch.Tensor:
        """Rows that are asked for, [B, H, queries, D], among zeros: [B, H, N, D]."""
        out, done = x.new_zeros(*x.shape[:2], self.tokens, x.shape[3]), 0
        for first, last in self._asked:
            out[:, :, first:last] = x[:, :, done : done + last - first]
            done += last - first
        return out

    def asked_by(self, queries: int) -> Layout | None:
        """The same tokens where only so many ask: those on the grid, those from there on, or all but images beside it.

        None if they can be none of these.
        """
        runs: list[tuple[int, int]] = []
        first = 0
        for span in self.spans:
            if span.kind not in _EXACT_ROWS:
                runs, first = [*runs, (first, span.start)], span.stop
        for asked in ([_ends(self.span)], [*runs, (first, self.tokens)], [(self.text_before, self.tokens)]):
            found = replace(self, asked=_merged(asked))
            if found.queries == queries:
                return found
        return None

    @property
    def has_text(self) -> bool:
        """Whether any token is off the grid."""
        return self.text_before + self.text_after > 0

    @property
    def references(self) -> tuple[Span, ...]:
        """Images or videos that compete with the output, and whose grids are known."""
        return tuple(span for span in self.spans if span.kind == "reference" and span.grid)

    def cells(self) -> torch.Tensor:
        """int64 [frames, height, width]: which token lies where, -1 where none does.

        References are further frames, each from the first row and column on, as positions are counted.
        """
        ours = self.text_before, (self.frames, self.height, self.width)
        grids = [ours, *((span.start, span.grid) for span in self.references if span.grid)]
        frames, heights, widths = zip(*(grid for _, grid in grids), strict=True)
        cells, frame = torch.full((sum(frames), max(heights), max(widths)), -1, device="cpu"), 0
        for token, (f, h, w) in grids:
            cells[frame : frame + f, :h, :w] = torch.arange(token, token + f * h * w, device="cpu").view(f, h, w)
            frame += f
        return cells

    def blocks(self, block: int) -> int:
        """Number of blocks of `block` tokens; the last one may be ragged."""
        return -(-self.tokens // block)

    def exact_rows(self, block: int) -> torch.Tensor:
        """bool [blocks]: those with a token whose row is always computed, where it is asked for."""
        return _exact(self, block, _EXACT_ROWS) & self.asked_blocks(block)

    def exact_keys(self, block: int) -> torch.Tensor:
        """bool [blocks]: those with a token whose key is never dropped."""
        return _exact(self, block, _EXACT_KEYS)

    def asked_blocks(self, block: int) -> torch.Tensor:
        """bool [blocks]: those with a token that asks."""
        return _holding(self, block, self._asked)

    def asks(self) -> torch.Tensor:
        """bool [N]: the tokens whose queries are asked for."""
        return self.asked_blocks(1)

    def sink(self, block: Block, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """What is never dropped, bool [nQ, nK]: rows and columns; None if there is none.

        Args:
            block: tokens of a block, or its queries and keys.
            device: of the result.
        """
        if not _runs(self, _EXACT_KEYS):
            return None
        return _sink(self, block, torch.device(device))

    def __str__(self) -> str:
        text = f" + {self.text_before}|{self.text_after} text" if self.has_text else ""
        return f"{self.frames}x{self.height}x{self.width}{text} = {self.tokens} tokens"


@lru_cache(maxsize=8)
@kept
def _sink(layout: Layout, block: Block, device: torch.device) -> torch.Tensor:
    q_block, kv_block = edges(block)
    return (layout.exact_rows(q_block)[:, None] | layout.exact_keys(kv_block)).to(device)


def _exact(layout: Layout, block: int, kinds: tuple[str, ...]) -> torch.Tensor:
    return _holding(layout, block, _runs(layout, kinds))


def _runs(layout: Layout, kinds: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """The tokens beside the grid that are of these kinds, text among them, as runs."""
    others = [(span.start, span.stop) for span in layout.spans if span.kind not in kinds]
    starts = [0, *(stop for _, stop in sorted([*others, _ends(layout.span)]))]
    stops = [*(start for start, _ in sorted([*others, _ends(layout.span)])), layout.tokens]
    return tuple((start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop)


def _ends(span: slice) -> tuple[int, int]:
    return span.start, span.stop


def _merged(runs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbours as one, and none that is empty."""
    found: list[tuple[int, int]] = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        elif start < stop:
            found.append((start, stop))
    return tuple(found)


@lru_cache(maxsize=64)
@kept
def _holding(layout: Layout, block: int, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """bool [blocks]: those that hold a token of one of the runs."""
    first = torch.arange(layout.blocks(block), device="cpu") * block
    last = (first + block).clamp(max=layout.tokens)
    found = torch.zeros_like(first, dtype=torch.bool)
    for start, stop in runs:
        found |= (first < stop) & (last > start)
    return found
