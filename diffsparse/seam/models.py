"""What has to be said about model classes: on which side text stands, and how to read the token grid.

A transformer of Diffusers that ends in scaled-dot-product attention works without a row here, if its self-attention
holds nothing but a latent's tokens and its latents leave no doubt about which axis is which; the table is for the
others.

Reading has two halves. A reader collects what the arguments of a forward pass tell (`Geometry`) and decides nothing,
for it is traced when the model is compiled and each decision would bind the graph to one size. `Geometry.grid` decides
when the pass runs.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from diffsparse.orders.layout import Layout

Size = tuple[int, int, int]  # frames, height, width


class Grid(NamedTuple):
    """Token grid of one forward pass.

    before, after: tokens next to it that are neither on it nor text: of reference images and conditions.
    behind: text tokens behind all these, where text stands before them too.
    references: frames, height and width of what the tokens `after` it make up, one behind the other, if known.
    known: False if the sequence has a grid that nothing tells: `width` then is its length.
    """

    frames: int
    height: int
    width: int
    before: int = 0
    after: int = 0
    behind: int = 0
    references: tuple[Size, ...] = ()
    known: bool = True

    @property
    def note(self) -> str:
        """What the user should know of it; empty for most."""
        if not self.known:
            return f"the grid of {self.width} tokens is not known: they are taken as one line"
        beside = self.before + self.after
        if not beside:
            return ""
        return f"{beside} tokens of references or conditions lie beside the grid of {'x'.join(map(str, self[:3]))}"


class Patch(NamedTuple):
    """Latent cells that make one token: along time, and along height and width; channels that latents may have."""

    time: int
    space: int
    channels: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Geometry:
    """What the arguments of one forward pass tell of its tokens; numbers may be a compiler's symbols.

    sizes: frames, height and width of latents whose tokens follow each other, that of the output first; flat.
    tokens: length of the whole sequence, if it may hold others.
    places: frame, row and column of each token, [N, 3 or more] or [B, N, 3 or more]; with `coordinates`, [B, 3, N] or
        [B, 3, N, 2].
    behind: text tokens behind the grid where others stand before it too.
    axes, channels: lengths of the latents' axes behind the batch's, and how many channels there may be: to be sure
        that the first of these axes, and no other, is the channels'.
    """

    sizes: Sequence[int] = ()
    tokens: int | None = None
    places: Tensor | None = None
    coordinates: bool = False
    behind: int = 0
    axes: Sequence[int] = ()
    channels: Sequence[int] = ()

    def grid(self) -> Grid | None:
        """The token grid, or None if there is none. Places are read once for a tensor: that waits for its device."""
        if self.axes and [i for i, length in enumerate(self.axes) if length in self.channels] != [0]:
            return None
        sizes = list(zip(*(self.sizes[axis::3] for axis in range(3)), strict=True))
        runs = _joined([(0, f, h, w, 0.0, 0.0) for f, h, w in sizes])
        total = sum(f * h * w for f, h, w in sizes)
        if self.tokens is None:
            return Grid(*sizes[0])._replace(behind=self.behind) if sizes else None
        if total != self.tokens:
            runs = [] if self.places is None else _runs(self.places, self.tokens, self.coordinates)
        if not runs:
            return Grid(1, 1, self.tokens, known=False)
        # Images have their references behind them, videos their conditions on either side.
        ours = max(runs, key=_cells) if self.coordinates else runs[0]
        after = self.tokens - ours[0] - _cells(ours)
        others = runs[runs.index(ours) + 1 :]
        references = tuple(run[1:] for run in others) if sum(map(_cells, others)) == after else ()
        return Grid(*ours[1:], before=ours[0], after=after, references=references)


Inputs = Mapping[str, Any]
GridReader = Callable[[Patch, Inputs], Geometry]


@dataclass(frozen=True)
class ModelSpec:
    """How to find the tokens of one transformer class.

    text: the side of the joint sequence on which tokens stand that are not on the grid; "none" if self-attention
        has no such tokens.
    cond_first: in a batch for classifier-free guidance, the conditional half is the first.
    skip: parts of module names whose attention is left alone (text refiners, audio, attention along time alone).
    """

    text: Literal["none", "before", "after"] = "none"
    grid: GridReader = lambda patch, inputs: latent_grid(patch, inputs)
    cond_first: bool = False
    skip: tuple[str, ...] = (
        "context_embedder",
        "context_refiner",
        "token_refiner",
        "perceiver",
        "text_",
        "audio",
        "temporal_",
    )

    def layout(self, grid: Grid | None, tokens: int) -> Layout | None:
        """Layout of a self-attention over `tokens` tokens, or None if it can't be one over `grid`."""
        if grid is None:
            return None
        frames, height, width, before, after, behind, references, _ = grid
        cells = frames * height * width
        if tokens == cells:
            return Layout(frames, height, width)
        if tokens == height * width and self.text == "none":  # attention within each frame: frames are in the batch
            return Layout(1, height, width)
        text = tokens - cells - before - after - behind
        if text < 0 or (text > 0 and self.text == "none"):
            return None
        ahead = text if self.text == "before" else 0
        rest = after + behind + text - ahead
        return Layout(frames, height, width, ahead + before, rest, before, after, references)


def latent_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Latents [B, C, F, H, W] or [B, C, H, W]; packed video [B, N, C] with its size or coordinates beside it."""
    latents = inputs.get("hidden_states")
    if not torch.is_tensor(latents):
        return Geometry()
    if latents.ndim == 5:
        return _geometry(patch, *latents.shape[2:])
    if latents.ndim == 4:
        return _geometry(patch, 1, *latents.shape[2:])
    size, places = (inputs.get("num_frames"), inputs.get("height"), inputs.get("width")), inputs.get("video_coords")
    known = all(edge is not None for edge in size)
    if latents.ndim != 3 or not (known or torch.is_tensor(places)):
        return Geometry()
    return Geometry(size if known else (), latents.shape[1], places, coordinates=True)  # type: ignore[arg-type]


def unlisted_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """`latent_grid` of a class that has no row, if the axis that must be the channels' has as many, and no other."""
    latents = inputs.get("hidden_states")
    found = latent_grid(patch, inputs)
    if not torch.is_tensor(latents) or latents.ndim == 3:
        return found
    return replace(found, axes=tuple(latents.shape[1:]), channels=tuple(patch.channels))


def frames_first_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Latents [B, F, C, H, W]."""
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    return _geometry(patch, frames, height, width)


def channels_last_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Latents [B, F, H, W, C]."""
    return _geometry(patch, *inputs["hidden_states"].shape[1:4])


def list_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """A list of latents [C, F, H, W], one for each sample; samples of different sizes have no common grid."""
    latents = inputs.get("x", inputs.get("hidden_states"))
    if not isinstance(latents, list | tuple) or not latents or not all(torch.is_tensor(x) for x in latents):
        return Geometry()
    if any(x.shape != latents[0].shape for x in latents[1:]):
        return Geometry()
    patch = Patch(inputs.get("f_patch_size", 1), inputs.get("patch_size", patch.space))
    return _geometry(patch, *latents[0].shape[-3:])


def packed_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Packed image tokens [B, N, C] whose size stands in `img_shapes`, in `img_ids` or in `position_ids` [N, 3 or 4].

    Images that a model is shown follow the one that it makes.
    """
    places = inputs.get("img_ids", inputs.get("position_ids"))
    places = places if torch.is_tensor(places) else None
    return Geometry(_listed_sizes(inputs.get("img_shapes")), inputs["hidden_states"].shape[1], places)


def history_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Latents [B, C, F, H, W] behind history tokens and ahead of the text: FramePack."""
    text = sum(x.shape[1] for name in ("encoder_hidden_states", "image_embeds") if (x := inputs.get(name)) is not None)
    return Geometry(latent_grid(patch, inputs).sizes, behind=text)


def _geometry(patch: Patch, frames: int, height: int, width: int) -> Geometry:
    return Geometry((frames // patch.time, height // patch.space, width // patch.space))


def _listed_sizes(shapes: Any) -> tuple[int, ...]:
    """Of the first sample: [(1, 4, 5), ...], in a list for each sample or not."""
    while isinstance(shapes, list) and shapes and isinstance(shapes[0], list):
        shapes = shapes[0]
    if not isinstance(shapes, list):
        return ()
    return tuple(edge for size in shapes for edge in size)


# --- tokens by place -------------------------------------------------------------------------------------------------

_Run = tuple[int, int, int, int]  # first token, frames, height, width
_Plane = tuple[int, int, int, int, float, float]  # a run, and its first row and column


def _runs(places: Tensor, tokens: int, coordinates: bool) -> list[_Run]:
    """`_rasters` of the last `tokens` places, remembered for as long as their storage lives."""
    key = StorageWeakRef(places.untyped_storage()), places.storage_offset(), places.shape, tokens
    if key not in _RUNS:
        for old in [old for old in _RUNS if old[0].expired()]:
            del _RUNS[old]
        flat = places[0] if places.ndim > 2 else places
        if coordinates:
            flat = (flat[..., 0] if flat.ndim == 3 else flat).T
        _RUNS[key] = _rasters(flat[-tokens:, :3].detach().double().cpu())
    return _RUNS[key]


_RUNS: dict[tuple[Any, ...], list[_Run]] = {}


def _rasters(places: Tensor) -> list[_Run]:
    """The rasters that tokens at `places` [N, 3] (frame, row, column) form, one behind the other.

    Rows are runs along the columns, planes are runs of like rows; planes of one shape that lie one above the other
    are one raster. Single tokens are none.
    """
    frame, row, column = places.unbind(1)
    rows = _starts((frame[1:] != frame[:-1]) | (row[1:] != row[:-1]) | (column[1:] <= column[:-1]))
    width = torch.diff(rows, append=rows.new_tensor([len(places)]))
    f, r, c = frame[rows], row[rows], column[rows]
    planes = _starts((f[1:] != f[:-1]) | (r[1:] <= r[:-1]) | (width[1:] != width[:-1]) | (c[1:] != c[:-1]))
    height = torch.diff(planes, append=planes.new_tensor([len(rows)]))
    of = [x[planes].tolist() for x in (rows, width, r, c)]
    found = [(start, 1, h, w, y, x) for h, (start, w, y, x) in zip(height.tolist(), zip(*of, strict=True), strict=True)]
    return [run for run in _joined(found) if run[2] * run[3] > 1]


def _starts(breaks: Tensor) -> Tensor:
    """Where runs begin: at 0, and behind each break."""
    return torch.cat([torch.zeros(1, dtype=torch.int64, device=breaks.device), breaks.nonzero()[:, 0] + 1])


def _joined(planes: list[_Plane]) -> list[_Run]:
    """Neighbours that differ in nothing but their frames, as one."""
    groups = (list(group) for _, group in itertools.groupby(planes, key=lambda plane: plane[2:]))
    return [(group[0][0], sum(plane[1] for plane in group), *group[0][2:4]) for group in groups]


def _cells(run: _Run) -> int:
    return run[1] * run[2] * run[3]


_NONE = ModelSpec()
_BEFORE = ModelSpec("before")
_AFTER = ModelSpec("after")
_BEFORE_PACKED = ModelSpec("before", packed_grid)

SPECS: dict[str, ModelSpec] = {
    "AllegroTransformer3DModel": _NONE,
    "AnyFlowTransformer3DModel": ModelSpec(grid=frames_first_grid),
    "AuraFlowTransformer2DModel": _BEFORE,
    "BriaFiboTransformer2DModel": _BEFORE_PACKED,
    "BriaTransformer2DModel": _BEFORE_PACKED,
    "ChromaTransformer2DModel": _BEFORE_PACKED,
    "ChronoEditTransformer3DModel": _NONE,
    "CogVideoXTransformer3DModel": ModelSpec("before", frames_first_grid),
    "CogView3PlusTransformer2DModel": _BEFORE,
    "CogView4Transformer2DModel": _BEFORE,
    "ConsisIDTransformer3DModel": ModelSpec("before", frames_first_grid),
    "CosmosTransformer3DModel": _NONE,
    "DiTTransformer2DModel": _NONE,
    "EasyAnimateTransformer3DModel": _BEFORE,
    "ErnieImageTransformer2DModel": _AFTER,
    "Flux2Transformer2DModel": _BEFORE_PACKED,
    "FluxTransformer2DModel": _BEFORE_PACKED,
    "GlmImageTransformer2DModel": _BEFORE,
    "HeliosTransformer3DModel": _BEFORE,
    "HiDreamImageTransformer2DModel": _AFTER,
    "HunyuanDiT2DModel": _NONE,
    "HunyuanImageTransformer2DModel": _AFTER,
    "HunyuanVideo15Transformer3DModel": _AFTER,
    "HunyuanVideoFramepackTransformer3DModel": ModelSpec("before", history_grid),
    "HunyuanVideoTransformer3DModel": _AFTER,
    "JoyImageEditTransformer3DModel": _AFTER,
    "Kandinsky5Transformer3DModel": ModelSpec(grid=channels_last_grid),
    "Kandinsky6Transformer3DModel": ModelSpec(grid=channels_last_grid),
    "Krea2Transformer2DModel": _BEFORE_PACKED,
    "LatteTransformer3DModel": _NONE,
    "LongCatImageTransformer2DModel": _BEFORE_PACKED,
    "LTX2VideoTransformer3DModel": _NONE,
    "LTXVideoTransformer3DModel": _NONE,
    "Lumina2Transformer2DModel": _BEFORE,
    "LuminaNextDiT2DModel": _NONE,
    "MochiTransformer3DModel": _AFTER,
    "MotifVideoTransformer3DModel": _AFTER,
    "NucleusMoEImageTransformer2DModel": ModelSpec("after", packed_grid),
    "OmniGenTransformer2DModel": _BEFORE,
    "OvisImageTransformer2DModel": _BEFORE_PACKED,
    "PixArtTransformer2DModel": _NONE,
    "PRXTransformer2DModel": _BEFORE,
    "QwenImageTransformer2DModel": _BEFORE_PACKED,
    "SD3Transformer2DModel": _AFTER,
    "SkyReelsV2Transformer3DModel": _NONE,
    "Transformer2DModel": _NONE,
    "WanAnimateTransformer3DModel": _NONE,
    "WanTransformer3DModel": _NONE,
    "WanVACETransformer3DModel": _NONE,
    "ZImageTransformer2DModel": ModelSpec("after", list_grid, cond_first=True),
}

LINEAR_ATTENTION = ("SanaTransformer2DModel", "SanaVideoTransformer3DModel")


def spec_of(model: torch.nn.Module) -> ModelSpec:
    """The row of `model`'s class or of the nearest base class; `unlisted_grid` alone otherwise."""
    for cls in type(model).__mro__:
        if cls.__name__ in SPECS:
            return SPECS[cls.__name__]
    return ModelSpec(grid=unlisted_grid)


def patch_of(model: torch.nn.Module) -> Patch:
    """Patch size from the model's configuration; channels from there and from its convolutions."""
    config = getattr(model, "config", None)
    space, time = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
    if space is None:  # Z-Image lists the sizes that it can take, its default first
        space, time = (next(iter(getattr(config, name, ())), None) for name in ("all_patch_size", "all_f_patch_size"))
    if isinstance(space, tuple | list):
        time, space = space[0], space[-1]
    convolutions = (module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d))
    channels = {module.in_channels for module in convolutions} | {getattr(config, "in_channels", 0)} - {0, None}
    return Patch(time or 1, space or 1, frozenset(channels))


def argument_names(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of the model's own `forward`."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]
