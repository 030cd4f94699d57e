"""Known models: where they live on the hub, and the call arguments that their authors recommend."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from diffsparse.cli.table import missing
from diffsparse.errors import ConfigError, InputFileError, UnknownNameError, closest
from diffsparse_pipelines import machine

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin
    from PIL.Image import Image

Offload = Literal["none", "model", "sequential", "group"]
OFFLOADS: tuple[str, ...] = ("none", "model", "sequential", "group")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Call(TypedDict, total=False):
    """Arguments of a pipeline call, by the names that Diffusers has for them."""

    prompt: str
    negative_prompt: str
    image: Image
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float
    max_sequence_length: int


@dataclass(frozen=True)
class Family:
    """A model that can be loaded by name.

    hub: checkpoint for text input.
    defaults: call arguments.
    image_hub: checkpoint for image input.
    image_class: its pipeline class, if not the one that the checkpoint names.
    fps: frames in a second.
    dtype: number format of the weights on a GPU.
    output: what it makes.
    flow_shift: of the scheduler, where it depends on the size.
    float32_vae: keep the VAE in float32, as the model's authors do.
    token: frames, rows and columns of pixels that one token stands for.
    multiple: pixels of which height and width are multiples; 0 if that is the token's.
    """

    hub: str
    defaults: Call = field(default_factory=Call)
    image_hub: str = ""
    image_class: str = ""
    fps: int = 16
    dtype: str = "bfloat16"
    output: Literal["video", "image"] = "video"
    flow_shift: float | None = None
    float32_vae: bool = False
    token: tuple[int, int, int] = (4, 16, 16)
    multiple: int = 0


def _call(height: int, width: int, frames: int | None, steps: int, guidance: float | None) -> Call:
    call = Call(height=height, width=width)
    if frames is not None:
        call["num_frames"] = frames
    call["num_inference_steps"] = steps
    if guidance is not None:
        call["guidance_scale"] = guidance
    return call


FAMILIES: dict[str, Family] = {
    "tiny": Family("", fps=8, dtype="float32", token=(1, 4, 4), multiple=16),
    "tiny-twin": Family("", fps=8, dtype="float32", token=(1, 4, 4), multiple=16),
    "wan2.1-1.3b": Family(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _call(480, 832, 81, 50, 5.0), flow_shift=3.0, fps=16, float32_vae=True
    ),
    "wan2.1-14b": Family(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        _call(720, 1280, 81, 50, 5.0),
        image_hub="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        flow_shift=5.0,
        fps=16,
        float32_vae=True,
    ),
    "wan2.2-a14b": Family(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        _call(720, 1280, 81, 40, 4.0),
        image_hub="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        fps=16,
        float32_vae=True,
    ),
    "wan2.2-5b": Family(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        _call(704, 1280, 121, 50, 5.0),
        image_hub="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        image_class="WanImageToVideoPipeline",
        fps=24,
        float32_vae=True,
        token=(4, 32, 32),
    ),
    "hunyuan-video": Family(
        "hunyuanvideo-community/HunyuanVideo",
        _call(720, 1280, 129, 50, 6.0),
        image_hub="hunyuanvideo-community/HunyuanVideo-I2V",
        fps=24,
    ),
    "hunyuan-video-1.5": Family(
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
        _call(480, 832, 121, 50, None),
        image_hub="hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
        fps=24,
    ),
    "cogvideox1.5-5b": Family(
        "THUDM/CogVideoX1.5-5B",
        _call(768, 1360, 81, 50, 6.0),
        image_hub="THUDM/CogVideoX1.5-5B-I2V",
        fps=16,
        token=(8, 16, 16),
    ),
    "ltx-video": Family(
        "Lightricks/LTX-Video",
        _call(480, 704, 161, 50, 3.0),
        image_hub="Lightricks/LTX-Video",
        image_class="LTXImageToVideoPipeline",
        fps=24,
        token=(8, 32, 32),
    ),
    "mochi": Family("genmo/mochi-1-preview", _call(480, 848, 85, 64, 4.5), fps=30, token=(6, 16, 16)),
    "flux": Family("black-forest-labs/FLUX.1-dev", _call(1024, 1024, None, 28, 3.5), output="image", token=(1, 16, 16)),
    "sd3.5": Family(
        "stabilityai/stable-diffusion-3.5-large", _call(1024, 1024, None, 28, 4.5), output="image", token=(1, 16, 16)
    ),
    "qwen-image": Family(
        "Qwen/Qwen-Image",
        {**_call(1024, 1024, None, 50, None), "true_cfg_scale": 4.0},
        output="image",
        token=(1, 16, 16),
    ),
}


def resolve(name: str, with_image: bool = False) -> tuple[str, Family]:
    """Where to load `name` from (a folder, a hub id, or "" for the embedded models) and what is known about it.

    Raises:
        UnknownNameError: neither a known name, nor a folder with a pipeline, nor a hub id "owner/name".
        ConfigError: an input image for a model that takes none.
    """
    if name in FAMILIES:
        family = FAMILIES[name]
        if with_image and not family.image_hub:
            able = ", ".join(key for key, row in FAMILIES.items() if row.image_hub)
            raise ConfigError(f"model {name!r} takes no input image; those that do: {able}")
        return (family.image_hub if with_image else family.hub), family
    if variant(name):  # a saved embedded model
        return name, FAMILIES["tiny"]
    if Path(name).is_dir():
        return name, Family(name, dtype="auto")
    if name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists():
        return name, Family(name, dtype="auto")
    raise UnknownNameError(
        f"no model is called {name!r}, and it is no folder of a saved pipeline; known: {closest(name, FAMILIES)}"
    )


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    offload: str = "none",
    vae_tiling: bool = False,
    with_image: bool = False,
) -> DiffusionPipeline:
    """Load a pipeline, ready to be called.

    Args:
        name: a key of `FAMILIES`, a folder written by `save_pretrained`, or a hub id.
        dtype: "float32", "bfloat16", "float16", or "auto": the family's, float32 on a CPU.
        device: such as "cuda" or "cpu"; "auto" takes a CUDA device if there is one.
        offload: "none", "model", "sequential" or "group": how weights wait on the CPU.
        vae_tiling: decode in tiles, which saves memory at large sizes.
        with_image: load the variant that takes an input image.

    Raises:
        UnknownNameError, ConfigError: a name or option that doesn't exist. InputFileError: weights that can't be read.
    """
    source, family = resolve(name, with_image)
    device, number_format = target(name, device, dtype, offload)
    pipe = _tiny(name, number_format) if not source else _pretrained(source, family, number_format)
    if family.flow_shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=family.flow_shift)
    if vae_tiling:
        _tile(pipe)
    _place(pipe, device, offload)
    return pipe


def target(name: str, device: str = "auto", dtype: str = "auto", offload: str = "none") -> tuple[str, torch.dtype]:
    """Where and in which number format `name` runs; see `load`.

    Raises:
        ConfigError: no such device, number format or way to offload.
    """
    if offload not in OFFLOADS:
        raise ConfigError(f"offload wants one of {', '.join(OFFLOADS)}; got {offload!r}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype wants one of {', '.join(DTYPES)}; got {dtype!r}")
    device = machine.place(device)
    if offload != "none" and device == "cpu":
        raise ConfigError(f"offload {offload!r} wants a GPU to offload from; got device 'cpu'. Leave it at 'none'")
    return device, _dtype(dtype, resolve(name)[1], device)


def defaults(name: str) -> Call:
    """Call arguments for `name`: the family's, the embedded model's own, or none for an unknown pipeline."""
    if embedded := variant(name):
        from diffsparse_pipelines import tiny

        return cast("Call", tiny.defaults(embedded))
    return FAMILIES[name].defaults.copy() if name in FAMILIES else {}


def grid(name: str, size: Call) -> tuple[int, int, int]:
    """Tokens of a known model along frames, rows and columns, at the size given in pixels or else at its own.

    Raises:
        UnknownNameError: no known model. ConfigError: frames for an image model.
    """
    if name not in FAMILIES:
        raise UnknownNameError(f"no known model is called {name!r}; known: {closest(name, FAMILIES)}")
    family = FAMILIES[name]
    check_size(name, size)
    pixels: Call = {"num_frames": 1, **defaults(name), **size}
    frames, rows, columns = family.token
    return -(-(pixels["num_frames"] - 1) // frames) + 1, pixels["height"] // rows, pixels["width"] // columns


def check_size(name: str, size: Call) -> None:
    """Refuse a size in pixels that a known model can't make; of others, nothing is known before they are loaded.

    Raises:
        ConfigError: frames for an image model; a height or width that is no multiple of what the model wants.
    """
    family = FAMILIES.get("tiny" if variant(name) else name)
    if family is None:
        return
    if family.output == "image" and "num_frames" in size:
        raise ConfigError(f"model {name!r} makes images; leave out --frames")
    sides = {"height": size.get("height", 0), "width": size.get("width", 0)}
    for (side, pixels), token in zip(sides.items(), family.token[1:], strict=True):
        edge = family.multiple or token
        if pixels % edge:
            near = max(edge, pixels // edge * edge)
            raise ConfigError(f"--{side} of {name!r} wants a multiple of {edge}, such as {near}; got {pixels}")


def variant(name: str) -> str | None:
    """Which embedded model `name` is, also in a folder where it was saved; None if it is none."""
    if name in ("tiny", "tiny-twin"):
        return "twin" if name == "tiny-twin" else "default"
    if _config(name, "model_index.json").get("_class_name") != "TinyPipeline":
        return None
    from diffsparse_pipelines.tiny.variants import VARIANTS

    heads = _config(name, "transformer/config.json").get("num_attention_heads")
    return next((key for key, sizes in VARIANTS.items() if sizes.heads == heads), "default")


def _config(folder: str, file: str) -> dict[str, object]:
    """A file of a saved pipeline; empty where there is none that can be read."""
    try:
        found = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tiny(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    from diffsparse_pipelines import tiny

    return tiny.load(variant(name) or "default", dtype=dtype)


def _dtype(asked: str, family: Family, device: str) -> torch.dtype:
    import torch

    if asked == "auto":
        named = "bfloat16" if family.dtype == "auto" else family.dtype
        asked = "float32" if device == "cpu" else named
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]


def _pretrained(source: str, family: Family, dtype: torch.dtype) -> DiffusionPipeline:
    import diffusers
    import torch

    from diffsparse_pipelines.loading import from_pretrained

    parts: dict[str, ModelMixin] = {}
    cls = getattr(diffusers, family.image_class) if family.image_class and source == family.image_hub else None
    if variant(source):
        from diffsparse_pipelines.tiny import TinyPipeline as cls  # noqa: N813 - Diffusers doesn't know it by name
    cls = cls or diffusers.DiffusionPipeline
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise InputFileError(f"{source} holds no model_index.json; wanted a folder written by save_pretrained")
    try:
        if family.float32_vae:
            vae = diffusers.AutoencoderKLWan
            parts["vae"] = from_pretrained(vae, source, torch.float32, subfolder="vae")
        return from_pretrained(cls, source, dtype, **parts)
    except MemoryError:
        raise
    except Exception as error:  # broken files raise errors of any kind
        if isinstance(error, ImportError) and missing(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputFileError(
            f"can't load {source!r}: {reason} Wanted a folder written by save_pretrained, or a hub id and a connection "
            "to the hub (or its files in the local cache)"
        ) from error


def _tile(pipe: DiffusionPipeline) -> None:
    enable = getattr(getattr(pipe, "vae", None), "enable_tiling", None)
    if enable is None:
        raise ConfigError(f"{type(pipe).__name__} has no VAE that can decode in tiles; leave out --vae-tiling")
    enable()


def _place(pipe: DiffusionPipeline, device: str, offload: str) -> None:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
    else:
        pipe.to(device)
