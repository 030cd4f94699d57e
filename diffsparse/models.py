"""What has to be said about model classes: on which side text stands, and how to read the token grid.

Every transformer of Diffusers that ends in scaled-dot-product attention works without a row here, if its
self-attention holds nothing but a latent's tokens; the table is for the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from diffsparse.layout import Layout


class Grid(NamedTuple):
    """Token grid of one forward pass; `after` counts text tokens behind it where others stand before it too."""

    frames: int
    height: int
    width: int
    after: int | None = None


class Patch(NamedTuple):
    """Latent cells that make one token: along time, and along height and width."""

    time: int
    space: int


Inputs = Mapping[str, Any]
GridReader = Callable[[Patch, Inputs], Grid | None]


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
        frames, height, width, after = grid
        extra = tokens - frames * height * width
        if tokens == height * width:  # attention within each frame: frames are in the batch
            return Layout(1, height, width)
        if extra < (after or 0) or (extra > 0 and self.text == "none"):
            return None
        if after is not None:
            return Layout(frames, height, width, extra - after, after)
        before = extra if self.text == "before" else 0
        return Layout(frames, height, width, before, extra - before)


def latent_grid(patch: Patch, inputs: Inputs) -> Grid | None:
    """Latents [B, C, F, H, W] or [B, C, H, W]; packed video [B, N, C] with its size beside it."""
    latents = inputs.get("hidden_states")
    if not torch.is_tensor(latents):
        return None
    if latents.ndim == 5:
        return _grid(patch, *latents.shape[2:])
    if latents.ndim == 4:
        return _grid(patch, 1, *latents.shape[2:])
    if latents.ndim == 3 and inputs.get("num_frames") and inputs.get("height") and inputs.get("width"):
        return Grid(inputs["num_frames"], inputs["height"], inputs["width"])
    return None


def frames_first_grid(patch: Patch, inputs: Inputs) -> Grid | None:
    """Latents [B, F, C, H, W]."""
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    return _grid(patch, frames, height, width)


def channels_last_grid(patch: Patch, inputs: Inputs) -> Grid | None:
    """Latents [B, F, H, W, C]."""
    return _grid(patch, *inputs["hidden_states"].shape[1:4])


def list_grid(patch: Patch, inputs: Inputs) -> Grid | None:
    """A list of latents [C, F, H, W], one for each sample; samples of different sizes have no common grid."""
    latents = inputs.get("x", inputs.get("hidden_states"))
    if not isinstance(latents, list | tuple) or not all(torch.is_tensor(x) for x in latents):
        return None
    if len({x.shape for x in latents}) != 1:
        return None
    patch = Patch(inputs.get("f_patch_size", 1), inputs.get("patch_size", patch.space))
    return _grid(patch, *latents[0].shape[-3:])


def packed_grid(patch: Patch, inputs: Inputs) -> Grid | None:
    """Packed image tokens [B, N, C] whose size stands in `img_shapes`, in `img_ids` or in `position_ids` [N, 3 or 4].

    Tokens of reference images, or ids that can't be read because the model is being compiled, leave a grid of
    one row: it has no geometry, but the right number of tokens.
    """
    tokens = inputs["hidden_states"].shape[1]
    size = _listed_size(inputs) or _size_of_ids(inputs.get("img_ids", inputs.get("position_ids")))
    if size is not None and size[0] * size[1] * size[2] == tokens:
        return Grid(*size)
    return Grid(1, 1, tokens)


def history_grid(patch: Patch, inputs: Inputs) -> Grid | None:
    """Latents [B, C, F, H, W] behind history tokens and ahead of the text: FramePack."""
    grid = latent_grid(patch, inputs)
    text = sum(x.shape[1] for name in ("encoder_hidden_states", "image_embeds") if (x := inputs.get(name)) is not None)
    return None if grid is None else grid._replace(after=text)


def _grid(patch: Patch, frames: int, height: int, width: int) -> Grid:
    return Grid(frames // patch.time, height // patch.space, width // patch.space)


def _listed_size(inputs: Inputs) -> tuple[int, int, int] | None:
    shapes = inputs.get("img_shapes")
    while isinstance(shapes, list) and shapes and isinstance(shapes[0], list):
        shapes = shapes[0]
    if isinstance(shapes, list) and len(shapes) == 1:
        return tuple(int(x) for x in shapes[0])  # type: ignore[return-value]
    return None


def _size_of_ids(ids: Any) -> tuple[int, int, int] | None:
    if not torch.is_tensor(ids) or torch.compiler.is_compiling():
        return None
    version, size = _SIZES.get(ids, (-1, (0, 0, 0)))
    if version != ids._version:  # the pipeline passes one tensor through all steps: one read, one device sync
        flat = ids[0] if ids.ndim == 3 else ids
        frames, height, width = [int(x) + 1 for x in (flat.amax(0) - flat.amin(0)).tolist()][:3]
        size = frames, height, width
        _SIZES[ids] = ids._version, size
    found: tuple[int, int, int] = size
    return found


_SIZES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_BEFORE = ModelSpec("before")
_AFTER = ModelSpec("after")
_BEFORE_PACKED = ModelSpec("before", packed_grid)

SPECS: dict[str, ModelSpec] = {
    "AnyFlowTransformer3DModel": ModelSpec(grid=frames_first_grid),
    "AuraFlowTransformer2DModel": _BEFORE,
    "BriaFiboTransformer2DModel": _BEFORE_PACKED,
    "BriaTransformer2DModel": _BEFORE_PACKED,
    "ChromaTransformer2DModel": _BEFORE_PACKED,
    "CogVideoXTransformer3DModel": ModelSpec("before", frames_first_grid),
    "CogView3PlusTransformer2DModel": _BEFORE,
    "CogView4Transformer2DModel": _BEFORE,
    "ConsisIDTransformer3DModel": ModelSpec("before", frames_first_grid),
    "EasyAnimateTransformer3DModel": _BEFORE,
    "ErnieImageTransformer2DModel": _AFTER,
    "Flux2Transformer2DModel": _BEFORE_PACKED,
    "FluxTransformer2DModel": _BEFORE_PACKED,
    "GlmImageTransformer2DModel": _BEFORE,
    "HeliosTransformer3DModel": _BEFORE,
    "HiDreamImageTransformer2DModel": _AFTER,
    "HunyuanImageTransformer2DModel": _AFTER,
    "HunyuanVideo15Transformer3DModel": _AFTER,
    "HunyuanVideoFramepackTransformer3DModel": ModelSpec("after", history_grid),
    "HunyuanVideoTransformer3DModel": _AFTER,
    "JoyImageEditTransformer3DModel": _AFTER,
    "Kandinsky5Transformer3DModel": ModelSpec(grid=channels_last_grid),
    "Krea2Transformer2DModel": _BEFORE_PACKED,
    "LongCatImageTransformer2DModel": _BEFORE_PACKED,
    "Lumina2Transformer2DModel": _BEFORE,
    "MochiTransformer3DModel": _AFTER,
    "MotifVideoTransformer3DModel": _AFTER,
    "NucleusMoEImageTransformer2DModel": ModelSpec("after", packed_grid),
    "OmniGenTransformer2DModel": _BEFORE,
    "OvisImageTransformer2DModel": _BEFORE_PACKED,
    "PRXTransformer2DModel": _BEFORE,
    "QwenImageTransformer2DModel": _BEFORE_PACKED,
    "SD3Transformer2DModel": _AFTER,
    "ZImageTransformer2DModel": ModelSpec("after", list_grid, cond_first=True),
}

LINEAR_ATTENTION = ("SanaTransformer2DModel", "SanaVideoTransformer3DModel")


def spec_of(model: torch.nn.Module) -> ModelSpec:
    """The row of `model`'s class or of the nearest base class; the default otherwise."""
    for cls in type(model).__mro__:
        if cls.__name__ in SPECS:
            return SPECS[cls.__name__]
    return ModelSpec()


def patch_of(model: torch.nn.Module) -> Patch:
    """Patch size from the model's configuration."""
    config = getattr(model, "config", None)
    space, time = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
    if space is None:  # Z-Image lists the sizes that it can take, its default first
        space, time = (next(iter(getattr(config, name, ())), None) for name in ("all_patch_size", "all_f_patch_size"))
    if isinstance(space, tuple | list):
        time, space = space[0], space[-1]
    return Patch(time or 1, space or 1)


def argument_names(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of the model's own `forward`."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]
