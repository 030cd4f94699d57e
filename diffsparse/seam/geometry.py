"""The token grid of a forward pass, as the arguments of the pass describe it.

Reading has two halves. A reader (`models.py`) collects what the arguments say (`Geometry`) and decides nothing: it is
traced when the model is compiled, and each decision would bind the graph to one size. `Geometry.grid` decides when the
pass runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from diffsparse.orders.layout import Size

Part = Literal["image", "text", "audio"]  # what a run of tokens is made of
_PARTS: tuple[Part, ...] = ("image", "text", "audio")
T = TypeVar("T")


class Beside(NamedTuple):
    """A run of tokens beside the grid, as the arguments tell it."""

    tokens: int
    part: Part = "image"
    grid: Size | None = None


class Grid(NamedTuple):
    """Token grid of one forward pass.

    Attributes:
        frames: of the output; 1 for an image.
        height: rows of tokens.
        width: tokens in a row; the length of the sequence if the grid is not `known`.
        before: what stands before the grid, in order, besides text of which the arguments say nothing.
        after: the same after it.
        known: False if the sequence has a grid whose shape is not known.
    """

    frames: int
    height: int
    width: int
    before: tuple[Beside, ...] = ()
    after: tuple[Beside, ...] = ()
    known: bool = True

    @property
    def size(self) -> Size:
        """Of the output."""
        return self.frames, self.height, self.width

    @property
    def tokens(self) -> int:
        """Of the output and of all that the arguments tell beside it."""
        return math.prod(self.size) + sum(run.tokens for run in (*self.before, *self.after))

    @property
    def note(self) -> str:
        """What the report says about the grid; empty for most."""
        if not self.known:
            return f"the grid of {self.width} tokens is not known: they are taken as one line"
        counts: dict[str, int] = {}
        for run in (*self.before, *self.after):
            if run.part != "text":
                name = "audio" if run.part == "audio" else "references or conditions"
                counts[name] = counts.get(name, 0) + run.tokens
        if not counts:
            return ""
        others = " and ".join(f"{tokens} tokens of {name}" for name, tokens in counts.items())
        return f"{others} lie beside the grid of {'x'.join(map(str, self.size))}"


@dataclass(frozen=True)
class Geometry:
    """What the arguments of one forward pass say about its tokens; numbers may be a compiler's symbols.

    Attributes:
        sizes: frames, height and width of latents whose tokens follow each other, that of the output first; flat.
        tokens: length of the whole sequence, if it may hold other tokens too.
        places: frame, row and column of each token, [N, 3 or more] or [B, N, 3 or more]; of several tensors one by one.
            Three tensors of one axis are of a grid of them: frames, rows, columns.
        coordinates: `places` are a video's coordinates instead, [B, 3, N] or [B, 3, N, 2].
        history: tokens of earlier frames before the grid.
        text_before: text tokens before all else, where the arguments tell how many.
        text_after: text tokens after the grid, in models whose text stands on both sides.
        axes: lengths of the latents' axes after the batch's.
        channels: how many channels the latents may have. The grid is read only if the first of `axes`, and no other,
            has such a length: else it isn't certain which axis is which.
        last: the output is the last image of a sequence.
        parts: which of the tokens are text and which are audio, int [n] each; the output is then the last image.
    """

    sizes: Sequence[int] = ()
    tokens: int | None = None
    places: Sequence[Tensor] = ()
    coordinates: bool = False
    history: int = 0
    text_before: int = 0
    text_after: int = 0
    axes: Sequence[int] = ()
    channels: Sequence[int] = ()
    parts: Sequence[Tensor] = ()
    last: bool = False

    def grid(self) -> Grid | None:
        """The token grid; None if there is none. Reads `places` once for a tensor, which waits for its device."""
        if self.axes and [i for i, length in enumerate(self.axes) if length in self.channels] != [0]:
            return None
        if self.parts:
            text, audio = self.parts
            return _once((*self.places, text, audio), lambda: _arranged(_flat(self.places[0]), text, audio))
        sizes = list(zip(*(self.sizes[axis::3] for axis in range(3)), strict=True))
        if self.tokens is None:
            return self._with_more(Grid(*sizes[0])) if sizes else None
        if cells_of(self.sizes) == self.tokens:
            rasters = _joined([(0, f, h, w, 0.0, 0.0, place) for place, (f, h, w) in enumerate(sizes)])
        else:
            rasters = self._rasters(self.tokens) if self.places else []
        return self._among(rasters, self.tokens) if rasters else Grid(1, 1, self.tokens, known=False)

    def _among(self, rasters: list[_Raster], tokens: int) -> Grid:
        """The output's grid among the rasters of a sequence: images come first or last, videos are the largest."""
        ours = max(rasters, key=_cells) if self.coordinates else rasters[-1 if self.last else 0]
        place, end = rasters.index(ours), ours[0] + _cells(ours)
        before, after = _covering(rasters[:place], ours[0]), _covering(rasters[place + 1 :], tokens - end)
        return self._with_more(Grid(*ours[1:], before=before, after=after))

    def _with_more(self, grid: Grid) -> Grid:
        """With the history that stands before all else, and the text that stands after it."""
        before = (Beside(self.text_before, "text"), Beside(self.history))
        after = (Beside(self.text_after, "text"),)
        return grid._replace(
            before=(*(run for run in before if run.tokens), *grid.before),
            after=(*grid.after, *(run for run in after if run.tokens)),
        )

    def _rasters(self, tokens: int) -> list[_Raster]:
        """Of the last `tokens` places."""

        def read() -> list[_Raster]:
            found: list[_Raster] = []
            start = 0
            axes = self.places[0].ndim == 1
            for x in (torch.cartesian_prod(*self.places),) if axes else self.places:
                places = _flat(_tokens_last(x) if self.coordinates else x)[-tokens:]
                found += [(start + first, f, h, w) for first, f, h, w in _rasters(places)]
                start += len(places)
            return found

        return _once(self.places, read, tokens)


def cells_of(sizes: Sequence[int]) -> int:
    """Tokens of grids whose frames, heights and widths follow each other, flat."""
    return sum(f * h * w for f, h, w in zip(*(sizes[axis::3] for axis in range(3)), strict=True))


def _covering(rasters: list[_Raster], tokens: int) -> tuple[Beside, ...]:
    """So many tokens as these rasters; as one run whose grid isn't known, if these aren't all; as text without any."""
    if not rasters and tokens:
        return (Beside(tokens, "text"),)
    if sum(map(_cells, rasters)) == tokens:
        return tuple(Beside(_cells(raster), grid=raster[1:]) for raster in rasters)
    return (Beside(tokens),)


_Raster = tuple[int, int, int, int]  # first token, frames, height, width
_Plane = tuple[int, int, int, int, float, float, float]  # a raster, and its first row, column and frame
_KEPT: dict[tuple[tuple[StorageWeakRef, Hashable], ...], Any] = {}


def _once(tensors: Sequence[Tensor], read: Callable[[], T], *more: Hashable) -> T:
    """`read()`, remembered for as long as the storages of the tensors that it reads live: it waits for their device."""
    key = tuple((StorageWeakRef(x.untyped_storage()), (x.storage_offset(), x.shape, more)) for x in tensors)
    if key not in _KEPT:
        for old in [old for old in _KEPT if any(storage.expired() for storage, _ in old)]:
            del _KEPT[old]
        _KEPT[key] = read()
    found: T = _KEPT[key]
    return found


def _tokens_last(places: Tensor) -> Tensor:
    """Coordinates [B, 3, N] or [B, 3, N, 2] as places [N, 3]: where each token begins, in the first sample."""
    flat = places[0]
    return (flat[..., 0] if flat.ndim == 3 else flat).T


def _flat(places: Tensor) -> Tensor:
    """Frame, row and column [N, 3] of tokens, of the first sample."""
    return (places[0] if places.ndim > 2 else places)[:, :3].detach().double().cpu()


def _arranged(places: Tensor, text: Tensor, audio: Tensor) -> Grid:
    """The grid of a sequence of many parts, of which the last image is the output."""
    which = torch.zeros(len(places), dtype=torch.int64, device="cpu")
    which[text.detach().cpu()], which[audio.detach().cpu()] = 1, 2
    starts = _starts(which[1:] != which[:-1]).tolist()
    runs: list[Beside] = []
    for start, stop in zip(starts, [*starts[1:], len(places)], strict=True):
        part = _PARTS[int(which[start])]
        rasters = _rasters(places[start:stop]) if part == "image" else []
        runs += _covering(rasters, stop - start) if rasters else (Beside(stop - start, part),)
    last = max((place for place, run in enumerate(runs) if run.grid), default=None)
    size = None if last is None else runs[last].grid
    if last is None or size is None:
        return Grid(1, 1, len(places), known=False)
    return Grid(*size, before=tuple(runs[:last]), after=tuple(runs[last + 1 :]))


def _rasters(places: Tensor) -> list[_Raster]:
    """The rasters that tokens at `places` [N, 3] (frame, row, column) form, one after the other.

    A row is a run of tokens along the columns, a plane a run of rows of one width; neighbouring planes of one shape
    and position are one raster. Single tokens are none.
    """
    frame, row, column = places.unbind(1)
    rows = _starts((frame[1:] != frame[:-1]) | (row[1:] != row[:-1]) | (column[1:] <= column[:-1]))
    width = torch.diff(rows, append=rows.new_tensor([len(places)]))
    f, r, c = frame[rows], row[rows], column[rows]
    planes = _starts((f[1:] != f[:-1]) | (r[1:] <= r[:-1]) | (width[1:] != width[:-1]) | (c[1:] != c[:-1]))
    height = torch.diff(planes, append=planes.new_tensor([len(rows)]))
    of = (x[planes].tolist() for x in (rows, width, r, c, f))
    found = [
        (start, 1, h, w, y, x, t) for h, (start, w, y, x, t) in zip(height.tolist(), zip(*of, strict=True), strict=True)
    ]
    return [raster for raster in _joined(found) if raster[2] * raster[3] > 1]


def _starts(breaks: Tensor) -> Tensor:
    """Where runs begin: at 0, and after each break."""
    return torch.cat([torch.zeros(1, dtype=torch.int64, device=breaks.device), breaks.nonzero()[:, 0] + 1])


def _joined(planes: list[_Plane]) -> list[_Raster]:
    """Neighbours that differ only in their number of frames, as one, unless time goes back between them."""
    found: list[_Raster] = []
    for before, (start, frames, *rest) in zip([None, *planes], planes, strict=False):
        if before is not None and before[2:6] == tuple(rest[:4]) and before[6] < rest[4]:
            first, count, h, w = found[-1]
            found[-1] = first, count + frames, h, w
        else:
            found.append((start, frames, int(rest[0]), int(rest[1])))
    return found


def _cells(raster: _Raster) -> int:
    return raster[1] * raster[2] * raster[3]
