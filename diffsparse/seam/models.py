"""The table of model classes: where text stands, and how to read the token grid. Add a model here, by a row of `SPECS`.

A transformer of Diffusers that ends in scaled-dot-product attention needs no row if its self-attention is over the
tokens of one latent alone, and the latent's axes can't be confused. Others need one `ModelSpec` under its class's
name: the side of its text, and which of the readers below (or a new one) fits the arguments of its `forward`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from diffsparse.orders.layout import Kind, Layout, Span
from diffsparse.seam.geometry import Beside, Geometry, Grid, cells_of

Inputs = Mapping[str, Any]  # the arguments of a model's `forward`, by name


class Patch(NamedTuple):
    """Latent cells that make one token.

    Attributes:
        time: along the frames.
        space: along height and width.
        channels: how many channels the latents may have.
    """

    time: int
    space: int
    channels: frozenset[int] = frozenset()


_SINK = 4  # images beside the output that are a quarter of it or less are a sink for attention
GridReader = Callable[[Patch, Inputs], Geometry]


@dataclass(frozen=True)
class ModelSpec:
    """How to find the tokens of one transformer class: a row of `SPECS`.

    Attributes:
        text: the side of the sequence on which tokens stand that are not on the grid; "none" if self-attention has no
            such tokens.
        grid: reads the token grid from the arguments of `forward`.
        cond_first: in a batch for classifier-free guidance, the conditional half is the first.
        partial: the queries of an attention may be of a part of its keys' tokens: those on the grid, or all but
            references.
        ahead: what they are, where it is no text that stands before the grid.
        skip: parts of the names of attention modules that stay as they are (text refiners, audio, attention along
            time).
    """

    text: Literal["none", "before", "after"] = "none"
    grid: GridReader = lambda patch, inputs: latent_grid(patch, inputs)
    cond_first: bool = False
    partial: bool = False
    ahead: Kind = "text"
    skip: tuple[str, ...] = (
        "context_embedder",
        "context_refiner",
        "token_refiner",
        "perceiver",
        "text_",
        "audio",
        "temporal_",
    )

    def layout(self, grid: Grid | None, tokens: int, queries: int | None = None) -> Layout | None:
        """Layout of a self-attention over `tokens` tokens, or None if it can't be one over `grid`.

        Args:
            queries: how many of them ask, where these may be fewer.
        """
        found = None if grid is None else self._layout(grid, tokens)
        if found is None or queries in (None, tokens):
            return found
        if not self.partial or not queries:
            return None
        kept = tokens - queries
        if self.text == "before" and not found.spans and found.video < queries:  # keys of references, of another step
            span = Span(queries - found.video, kept, _kind(kept, found.video))
            found = replace(found, spans=(span,)) if span.stop == found.text_before else found
        spans = tuple(span._replace(grid=None) for span in found.spans)  # later steps don't know the grids
        return replace(found, spans=spans).asked_by(queries)

    def _layout(self, grid: Grid, tokens: int) -> Layout | None:
        cells = math.prod(grid.size)
        if self.partial and self.text == "none" and tokens != grid.tokens:  # of a prefix, however long it is
            return None
        if tokens == cells:
            return Layout(*grid.size)
        if tokens == grid.height * grid.width and self.text == "none":  # within each frame: frames are in the batch
            return Layout(1, grid.height, grid.width)
        before, after = (sum(run.tokens for run in runs) for runs in (grid.before, grid.after))
        text = tokens - cells - before - after
        if text < 0 or (text > 0 and self.text == "none"):
            return _alone(grid, tokens)
        ahead = text if self.text == "before" else 0
        first = ahead + before
        history = (Span(0, ahead, self.ahead),) if self.ahead != "text" and ahead else ()
        images = sum(run.tokens for run in (*grid.before, *grid.after) if run.part == "image")
        kind = _kind(images, cells)
        spans = (*history, *_spans(grid.before, ahead, kind), *_spans(grid.after, first + cells, kind))
        return Layout(*grid.size, first, after + text - ahead, spans)


def _kind(images: int, cells: int) -> Kind:
    """Of images beside a grid of so many cells, from their tokens in all.

    Small ones are a sink for attention. Larger ones compete: a sink of more keys than are to be computed would leave
    nothing to choose.
    """
    return "condition" if images * _SINK <= cells else "reference"


def _spans(runs: tuple[Beside, ...], start: int, kind: Kind) -> Iterator[Span]:
    """Runs beside the grid from the token `start` on; images are of that kind."""
    for run in runs:
        if run.part != "text":
            yield Span(start, run.tokens, kind if run.part == "image" else run.part, run.grid)
        start += run.tokens


def _alone(grid: Grid, tokens: int) -> Layout | None:
    """Layout of an attention within references alone."""
    for runs in (grid.before, grid.after):
        first, *rest = [run for run in runs if run.grid] or [Beside(0)]
        if first.grid and tokens == sum(run.tokens for run in (first, *rest)):
            cells = math.prod(first.grid)
            return Layout(*first.grid, 0, tokens - cells, tuple(_spans(tuple(rest), cells, "reference")))
    return None


def latent_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Latents [B, C, F, H, W] or [B, C, H, W]; packed video [B, N, C] with its size or coordinates beside it."""
    latents = inputs.get("hidden_states", inputs.get("latents"))
    if not torch.is_tensor(latents):
        return Geometry()
    if latents.ndim == 5:
        return _geometry(patch, *latents.shape[2:])
    if latents.ndim == 4:
        return _geometry(patch, 1, *latents.shape[2:])
    places, size = inputs.get("video_coords"), [inputs.get(name) for name in ("num_frames", "height", "width")]
    edges = [edge for edge in size if edge is not None]
    known = len(edges) == len(size)
    if latents.ndim != 3 or not (known or torch.is_tensor(places)):
        return Geometry()
    return Geometry(edges if known else (), latents.shape[1], _tensors(places), coordinates=True)


def unlisted_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """`latent_grid` of a class without a row: only if the channels' axis is certain (see `Geometry.channels`)."""
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


def placed_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Latents [B, F, H, W, C] of which a given frame may be the last, as its time tells: Kandinsky 6."""
    axes, found = _tensors(*(inputs.get("visual_rope_pos") or ())), channels_last_grid(patch, inputs)
    if len(axes) != 3 or any(axis.ndim != 1 for axis in axes):
        return found
    return Geometry(tokens=math.prod(found.sizes), places=axes)


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

    Reference images follow the one that the model makes, or come first where `num_ref_tokens` counts them.
    """
    places = _tensors(inputs.get("img_ids", inputs.get("position_ids")))
    sizes = _listed_sizes(inputs.get("img_shapes", inputs.get("shape_list")))
    return Geometry(sizes, inputs["hidden_states"].shape[1], places, last=bool(inputs.get("num_ref_tokens")))


def understood_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Videos in patches of known sizes, with text before them and sound or actions after: Cosmos 3."""
    sizes = tuple(edge for size in inputs["vision_token_shapes"] for edge in size)
    cells = cells_of(sizes)
    return Geometry(sizes, cells, text_after=inputs["sequence_length"] - inputs["und_len"] - cells)


def gist_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Latents [B, C, H, W] and those of images to edit, after tokens made of the text: Bria Fibo 2.

    In a batch of prompts of several lengths the order isn't certain.
    """
    if inputs.get("encoder_attention_mask") is not None and inputs["hidden_states"].shape[0] > 1:
        return Geometry()
    images = (inputs["hidden_states"], *(inputs.get("context_latents") or ()))
    sizes = tuple(edge for x in images for edge in (1, x.shape[2] // patch.space, x.shape[3] // patch.space))
    return Geometry(sizes, cells_of(sizes))


def tail_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """A sequence of text and then an image, with the places of all of its tokens in `position_ids`."""
    return Geometry(tokens=inputs["hidden_states"].shape[1], places=_tensors(inputs.get("position_ids")), last=True)


def target_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Packed images of which the last of `img_shapes` is the model's; those before it stand among the text.

    `img_mask` has one place for each word, and one for four tokens of an image: Qwen-Image 2.1.
    """
    sizes, packed = _listed_sizes(inputs.get("img_shapes"))[-3:], inputs["hidden_states"].shape[1]
    if len(sizes) != 3 or inputs.get("img_mask") is None:
        return Geometry()
    return Geometry(sizes, text_before=inputs["img_mask"].shape[1] - packed // 4 + packed - math.prod(sizes))


def modes_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Packed image tokens [B, N, C], and references in a tensor of their own that stand behind them: Flux 3."""
    names = ("hidden_states", "image_cond_hidden_states")
    tokens = sum(x.shape[1] for name in names if (x := inputs.get(name)) is not None)
    return Geometry(tokens=tokens, places=_tensors(inputs.get("img_ids"), inputs.get("image_cond_ids")))


def parts_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """One sequence of text, conditions, references, audio and video, whose rows the arguments list: MiniMax-H3."""
    parts = _tensors(inputs.get("text_indices"), inputs.get("audio_indices"))
    return Geometry(places=_tensors(inputs.get("position_ids")), parts=parts)


_HISTORY = {"latents_clean": (1, 2), "latents_history_2x": (2, 4), "latents_history_4x": (4, 8)}  # frames, edge


def history_grid(patch: Patch, inputs: Inputs) -> Geometry:
    """Latents [B, C, F, H, W] after those of earlier frames, in larger patches the older they are: FramePack."""
    tokens = 0
    for name, (frames, edge) in _HISTORY.items():
        latents = inputs.get(name)
        if latents is not None and inputs.get(f"indices_{name}") is not None:
            f, h, w = latents.shape[2:]
            tokens += -(-f // frames) * -(-h // edge) * -(-w // edge)
    return replace(latent_grid(patch, inputs), history=tokens)


def _tensors(*values: object) -> tuple[torch.Tensor, ...]:
    return tuple(value for value in values if torch.is_tensor(value))


def _geometry(patch: Patch, frames: int, height: int, width: int) -> Geometry:
    return Geometry((frames // patch.time, height // patch.space, width // patch.space))


def _listed_sizes(shapes: object) -> tuple[int, ...]:
    """The sizes of the first sample, flat; `shapes` is [(1, 4, 5), ...], or a list of such lists, one a sample."""
    while isinstance(shapes, list) and shapes and isinstance(shapes[0], list):
        shapes = shapes[0]
    if not isinstance(shapes, list):
        return ()
    return tuple(edge for size in shapes for edge in size)


# One row a class: ModelSpec(side of the text, reader of the grid).
_NONE = ModelSpec()
_BEFORE = ModelSpec("before")
_AFTER = ModelSpec("after")
_BEFORE_PACKED = ModelSpec("before", packed_grid)

SPECS: dict[str, ModelSpec] = {
    "AllegroTransformer3DModel": _NONE,
    "AnyFlowTransformer3DModel": ModelSpec(grid=frames_first_grid),
    "AuraFlowTransformer2DModel": _BEFORE,
    "BriaFibo2Transformer2DModel": ModelSpec("before", gist_grid),
    "BriaFiboTransformer2DModel": _BEFORE_PACKED,
    "BriaTransformer2DModel": _BEFORE_PACKED,
    "ChromaTransformer2DModel": _BEFORE_PACKED,
    "ChronoEditTransformer3DModel": _NONE,
    "CogVideoXTransformer3DModel": ModelSpec("before", frames_first_grid),
    "CogView3PlusTransformer2DModel": _BEFORE,
    "CogView4Transformer2DModel": _BEFORE,
    "ConsisIDTransformer3DModel": ModelSpec("before", frames_first_grid),
    "Cosmos3OmniTransformer": ModelSpec("before", understood_grid, partial=True),
    "CosmosControlNetModel": _NONE,
    "CosmosTransformer3DModel": _NONE,
    "DiTTransformer2DModel": _NONE,
    "DreamLiteTransformer2DModel": _NONE,
    "EasyAnimateTransformer3DModel": _BEFORE,
    "ErnieImageTransformer2DModel": _AFTER,
    "Flux2Transformer2DModel": ModelSpec("before", packed_grid, partial=True),
    "Flux3Transformer2DModel": ModelSpec("before", modes_grid, skip=(*ModelSpec.skip, "txt_mode_blocks")),
    "FluxControlNetModel": _BEFORE_PACKED,
    "FluxTransformer2DModel": _BEFORE_PACKED,
    "GlmImageTransformer2DModel": _BEFORE,
    "HeliosTransformer3DModel": ModelSpec("before", ahead="condition"),
    "HiDreamImageTransformer2DModel": _AFTER,
    "HunyuanDiT2DControlNetModel": _NONE,
    "HunyuanDiT2DModel": _NONE,
    "HunyuanImageTransformer2DModel": _AFTER,
    "HunyuanVideo15Transformer3DModel": _AFTER,
    "HunyuanVideoFramepackTransformer3DModel": ModelSpec("after", history_grid),
    "HunyuanVideoTransformer3DModel": _AFTER,
    "Ideogram4Transformer2DModel": ModelSpec("before", tail_grid),
    "JoyImageEditPlusTransformer3DModel": ModelSpec("after", packed_grid),
    "JoyImageEditTransformer3DModel": _AFTER,
    "Kandinsky5Transformer3DModel": ModelSpec(grid=channels_last_grid),
    "Kandinsky6Transformer3DModel": ModelSpec(grid=placed_grid),
    "Krea2Transformer2DModel": _BEFORE_PACKED,
    "LatteTransformer3DModel": _NONE,
    "LongCatImageTransformer2DModel": _BEFORE_PACKED,
    "LTX2VideoTransformer3DModel": _NONE,
    "LTXVideoTransformer3DModel": _NONE,
    "Lumina2Transformer2DModel": _BEFORE,
    "LuminaNextDiT2DModel": _NONE,
    "MiniMaxH3Transformer3DModel": ModelSpec("before", parts_grid),
    "MochiTransformer3DModel": _AFTER,
    "MotifVideoTransformer3DModel": _AFTER,
    "NucleusMoEImageTransformer2DModel": ModelSpec("after", packed_grid, partial=True),
    "OmniGenTransformer2DModel": _BEFORE,
    "OvisImageTransformer2DModel": _BEFORE_PACKED,
    "PixArtTransformer2DModel": _NONE,
    "PRXTransformer2DModel": ModelSpec("before", partial=True),
    "QwenImage21Transformer2DModel": ModelSpec("none", target_grid, partial=True),
    "QwenImageControlNetModel": _BEFORE_PACKED,
    "QwenImageTransformer2DModel": _BEFORE_PACKED,
    "SD3ControlNetModel": _AFTER,
    "SD3Transformer2DModel": _AFTER,
    "SkyReelsV2Transformer3DModel": _NONE,
    "Transformer2DModel": _NONE,
    "WanAnimate2Transformer3DModel": ModelSpec(grid=list_grid),
    "WanAnimateTransformer3DModel": _NONE,
    "WanTransformer3DModel": _NONE,
    "WanVACETransformer3DModel": _NONE,
    "ZImageControlNetModel": ModelSpec("after", list_grid, cond_first=True),
    "ZImageTransformer2DModel": ModelSpec("after", list_grid, cond_first=True),
}

# Classes whose heads can't be perturbed, and why.
UNGUIDED = {
    "WanAnimate2Transformer3DModel": "the passes that make its video compute attention in FlexAttention alone",
}

# Classes whose attention modules look like any other, and have no softmax.
LINEAR_ATTENTION = ("SanaTransformer2DModel", "SanaVideoTransformer3DModel")


def spec_of(model: torch.nn.Module) -> ModelSpec:
    """The row of `model`'s class or of the nearest base class; if there is none, a spec that reads `unlisted_grid`."""
    for cls in type(model).__mro__:
        if cls.__name__ in SPECS:
            return SPECS[cls.__name__]
    return ModelSpec(grid=unlisted_grid)


def patch_of(model: torch.nn.Module) -> Patch:
    """Patch size from the model's configuration; channels from there and from the convolutions."""
    config = getattr(model, "config", None)
    space, time = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
    if space is None:  # Z-Image lists the sizes that it supports, the default first
        space, time = (next(iter(getattr(config, name, ())), None) for name in ("all_patch_size", "all_f_patch_size"))
    if isinstance(space, tuple | list):
        time, space = space[0], space[-1]
    convolutions = (module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d))
    channels = {module.in_channels for module in convolutions} | {getattr(config, "in_channels", 0)} - {0, None}
    return Patch(time or 1, space or 1, frozenset(channels))


def argument_names(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of the model's own `forward`."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]
