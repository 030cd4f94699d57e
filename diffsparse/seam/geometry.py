"""The token grid of a forward pass, as the arguments of the pass describe it.

Reading has two halves. A reader (`models.py`) collects what the arguments say (`Geometry`) and decides nothing: it is
traced when the model is compiled, and each decision would bind the graph to one size. `Geometry.grid` decides when the
pass runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Size = tuple[int, int, int]  # frames, height, width


class Grid(NamedTuple):
    """Token grid of one forward pass.

    frames: of the video; 1 for an image.
    height: rows of tokens.
    width: tokens in a row; the length of the sequence if the grid is not `known`.
    before: tokens before the grid that are not text: reference images and conditions.
    after: the same after the grid.
    text_after: text tokens after all these, in models whose text stands on both sides.
    references: frames, height and width of the grids that the `after` tokens form, in order, if known.
    known: False if the sequence has a grid whose shape is not known.
    """

    frames: int
    height: int
    width: int
    before: int = 0
    after: int = 0
    text_after: int = 0
    references: tuple[Size, ...] = ()
    known: bool = True

    @property
    def note(self) -> str:
        """What the report says about the grid; empty for most."""
        if not self.known:
            return f"the grid of {self.width} tokens is not known: they are taken as one line"
        others = self.before + self.after
        if not others:
            return ""
        return f"{others} tokens of references or conditions lie beside the grid of {'x'.join(map(str, self[:3]))}"


@dataclass(frozen=True)
class Geometry:
    """What the arguments of one forward pass say about its tokens; numbers may be a compiler's symbols.

    sizes: frames, height and width of latents whose tokens follow each other, that of the output first; flat.
    tokens: length of the whole sequence, if it may hold other tokens too.
    places: frame, row and column of each token, [N, 3 or more] or [B, N, 3 or more].
    coordinates: `places` are a video's coordinates instead, [B, 3, N] or [B, 3, N, 2].
    text_after: text tokens after the grid, in models whose text stands on both sides.
    axes: lengths of the latents' axes after the batch's.
    channels: how many channels the latents may have. The grid is read only if the first of `axes`, and no other, has
        such a length: else it isn't certain which axis is which.
    """

    sizes: Sequence[int] = ()
    tokens: int | None = None
    places: Tensor | None = None
    coordinates: bool = False
    text_after: int = 0
    axes: Sequence[int] = ()
    channels: Sequence[int] = ()

    def grid(self) -> Grid | None:
        """The token grid; None if there is none. Reads `places` once for a tensor, which waits for its device."""
        if self.axes and [i for i, length in enumerate(self.axes) if length in self.channels] != [0]:
            return None
        sizes = list(zip(*(self.sizes[axis::3] for axis in range(3)), strict=True))
        if self.tokens is None:
            return Grid(*sizes[0])._replace(text_after=self.text_after) if sizes else None
        if sum(f * h * w for f, h, w in sizes) == self.tokens:
            rasters = _joined([(0, f, h, w, 0.0, 0.0) for f, h, w in sizes])
        else:
            rasters = [] if self.places is None else _rasters_of(self.places, self.tokens, self.coordinates)
        return self._among(rasters, self.tokens) if rasters else Grid(1, 1, self.tokens, known=False)

    def _among(self, rasters: list[_Raster], tokens: int) -> Grid:
        """The output's grid among the rasters of a sequence: images come first, videos are the largest."""
        ours = max(rasters, key=_cells) if self.coordinates else rasters[0]
        after = tokens - ours[0] - _cells(ours)
        others = rasters[rasters.index(ours) + 1 :]
        references = tuple(raster[1:] for raster in others) if sum(map(_cells, others)) == after else ()
        return Grid(*ours[1:], before=ours[0], after=after, references=references)


_Raster = tuple[int, int, int, int]  # first token, frames, height, width
_Plane = tuple[int, int, int, int, float, float]  # a raster, and its first row and column
_Key = tuple[StorageWeakRef, Hashable, torch.Size, int]  # storage, offset and shape of a tensor, and tokens
_RASTERS: dict[_Key, list[_Raster]] = {}


def _rasters_of(places: Tensor, tokens: int, coordinates: bool) -> list[_Raster]:
    """`_rasters` of the last `tokens` places, remembered for as long as their storage lives."""
    key: _Key = StorageWeakRef(places.untyped_storage()), places.storage_offset(), places.shape, tokens
    if key not in _RASTERS:
        for old in [old for old in _RASTERS if old[0].expired()]:
            del _RASTERS[old]
        flat = places[0] if places.ndim > 2 else places
        if coordinates:
            flat = (flat[..., 0] if flat.ndim == 3 else flat).T
        _RASTERS[key] = _rasters(flat[-tokens:, :3].detach().double().cpu())
    return _RASTERS[key]


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
    of = [x[planes].tolist() for x in (rows, width, r, c)]
    found = [(start, 1, h, w, y, x) for h, (start, w, y, x) in zip(height.tolist(), zip(*of, strict=True), strict=True)]
    return [raster for raster in _joined(found) if raster[2] * raster[3] > 1]


def _starts(breaks: Tensor) -> Tensor:
    """Where runs begin: at 0, and after each break."""
    return torch.cat([torch.zeros(1, dtype=torch.int64, device=breaks.device), breaks.nonzero()[:, 0] + 1])


def _joined(planes: list[_Plane]) -> list[_Raster]:
    """Neighbours that differ only in their number of frames, as one."""
    groups = (list(group) for _, group in itertools.groupby(planes, key=lambda plane: plane[2:]))
    return [(group[0][0], sum(plane[1] for plane in group), *group[0][2:4]) for group in groups]


def _cells(raster: _Raster) -> int:
    return raster[1] * raster[2] * raster[3]
