"""Models by name: what is known of them, whether they can do what is asked, and how they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from diffsparse.cli.table import missing
from diffsparse.errors import ConfigError, InputFileError, UnknownNameError
from diffsparse.files import first_line
from diffsparse.schedule import Schedule
from diffsparse_pipelines import machine
from diffsparse_pipelines.known import FAMILIES as FAMILIES
from diffsparse_pipelines.known import LEFT_OUT
from diffsparse_pipelines.known import Call as Call
from diffsparse_pipelines.known import Family as Family
from diffsparse_pipelines.known import suggested as suggested

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin

Offload = Literal["none", "model", "sequential", "group"]
OFFLOADS: tuple[str, ...] = ("none", "model", "sequential", "group")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Most steps of a run -> sparsity, of models that were distilled to few; see docs/few-steps.md.
_MILD = {5: 0.6, 9: 0.7}


class FewSteps(NamedTuple):
    """What serves a run of few steps.

    Attributes:
        dense: steps at the start that stay dense.
        sparsity: of the others.
    """

    dense: int
    sparsity: float


def resolve(name: str, with_image: bool = False) -> tuple[str, Family]:
    """Where to load `name` from (a folder, a hub id, or "" for the embedded models) and what is known about it.

    Args:
        name: a key of `FAMILIES`, a folder with a pipeline, or a hub id.
        with_image: whether it is to take an input image.

    Raises:
        UnknownNameError: neither a known name, nor a folder with a pipeline, nor a hub id "owner/name".
        ConfigError: an input image for a model that takes none.
    """
    if name in FAMILIES:
        family = FAMILIES[name]
        if with_image and not family.image_hub:
            able = [key for key, row in FAMILIES.items() if row.image_hub]
            which = f"{suggested(name, able)}, and in its column image input which do"
            raise ConfigError(f"model {name!r} takes no input image; {which}")
        return (family.image_hub if with_image else family.hub), family
    if name in LEFT_OUT:
        raise ConfigError(f"model {name!r} is left out: {LEFT_OUT[name]}; diffsparse models lists the others")
    if variant(name):  # a saved embedded model
        return name, FAMILIES["tiny"]
    if Path(name).is_dir():
        return name, Family(name, dtype="auto")
    if name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists():
        return name, Family(name, dtype="auto")
    raise UnknownNameError(f"no model is called {name!r}, and it is no folder of a saved pipeline; {suggested(name)}")


def check_inputs(name: str, with_image: bool = False) -> None:
    """Refuse a known model that wants what it is not given.

    Raises:
        ConfigError: what it wants, and the remedy.
    """
    family = FAMILIES.get(name)
    if family is not None and family.by_hand:
        raise ConfigError(
            f"model {name!r} wants {family.by_hand}, which no option gives: pipelines/{family.script} shows the call"
        )
    if family is not None and family.wants_image and not with_image:
        raise ConfigError(f"model {name!r} wants an input image: generate --image FILE")


def few_steps(name: str, steps: int | None) -> FewSteps | None:
    """What serves a run of a model that was distilled to few steps.

    Args:
        name: of the model.
        steps: length of the run; None if it is unknown.

    Returns:
        Dense steps and sparsity; None for other models, and for longer runs.
    """
    family = FAMILIES.get(name)
    if family is None or not family.distilled or not steps:
        return None
    sparsity = next((share for most, share in _MILD.items() if steps <= most), None)
    return None if sparsity is None else FewSteps(Schedule().bounds(steps)[0], sparsity)


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
        UnknownNameError: no such model.
        ConfigError: an option that doesn't exist, or a model that wants what it isn't given.
        InputFileError: weights that can't be read.
    """
    source, family = resolve(name, with_image)
    check_inputs(name, with_image)
    device, number_format = target(name, device, dtype, offload)
    pipe = _tiny(name, number_format) if not source else _pretrained(source, family, number_format, with_image)
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
    """Tokens of a known model along frames, rows and columns; of one window, where it makes a video in several.

    Args:
        name: a key of `FAMILIES`.
        size: `height`, `width` and `num_frames` in pixels and frames; what is missing is the model's own.

    Raises:
        UnknownNameError: no known model.
        ConfigError: frames for an image model.
    """
    if name not in FAMILIES:
        raise UnknownNameError(f"no known model is called {name!r}; {suggested(name)}")
    family = FAMILIES[name]
    check_size(name, size)
    pixels: Call = {"num_frames": 1, **defaults(name), **size}
    _, rows, columns = family.token
    frames, _ = family.windows(pixels["num_frames"])
    return family.frames_of_tokens(frames), -(-pixels["height"] // rows), -(-pixels["width"] // columns)


def check_size(name: str, size: Call) -> None:
    """Refuse a size in pixels that a known model can't make; of others, nothing is known before they are loaded.

    Raises:
        ConfigError: frames for an image model, or so many that its VAE makes another number of them; a height or width
            that is no multiple of what the model wants.
    """
    family = FAMILIES.get("tiny" if variant(name) else name)
    if family is None:
        return
    if family.output == "image" and "num_frames" in size:
        raise ConfigError(f"model {name!r} makes images; leave out --frames")
    frames, step = size.get("num_frames", 1), family.token[0]
    if not family.makes(frames):
        near = round((frames - 1) / step) * step + 1
        wanted = f"a multiple of {step}{', or' if family.whole else ' and'} one more"
        raise ConfigError(f"--frames of {name!r} wants {wanted}, such as {near}; got {frames}")
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


def _pretrained(source: str, family: Family, dtype: torch.dtype, with_image: bool) -> DiffusionPipeline:
    if Path(source).is_dir() and not _index(source):
        raise InputFileError(f"{source} holds no model_index.json; wanted a folder written by save_pretrained")
    from diffsparse_pipelines.loading import quiet_hub

    load = _blocks if family.modular or _index(source).startswith("modular") else _classical
    try:
        with quiet_hub():
            pipe = load(source, family, dtype, with_image)
            _adapt(pipe, family)
        return pipe
    except MemoryError:
        raise
    except Exception as error:  # broken files raise errors of any kind
        if isinstance(error, ImportError) and missing(error):
            raise
        raise InputFileError(_why_not(source, error)) from error


def _why_not(source: str, error: Exception) -> str:
    """One line on a source that can't be loaded."""
    from diffsparse_pipelines.loading import unreachable

    if not Path(source).is_dir() and (cause := unreachable(error)):
        return (
            f"can't load {source!r}: the hub can't be reached: {cause}; wanted a connection, or a folder written by "
            "save_pretrained"
        )
    return (
        f"can't load {source!r}: {first_line(error)} Wanted a folder written by save_pretrained, or a hub id and a "
        "connection to the hub (or its files in the local cache)"
    )


def _index(source: str) -> str:
    """Name of the index that a folder has; empty for a hub id, and where there is none."""
    names = ("model_index.json", "modular_model_index.json")
    return next((name for name in names if (Path(source) / name).is_file()), "")


def _blocks(source: str, family: Family, dtype: torch.dtype, with_image: bool) -> DiffusionPipeline:
    from diffsparse_pipelines.loading import modular

    workflow = family.workflows[with_image] if family.workflows else None
    return modular(source, dtype, workflow)


def _classical(source: str, family: Family, dtype: torch.dtype, with_image: bool) -> DiffusionPipeline:
    import diffusers
    import torch

    from diffsparse_pipelines.loading import from_pretrained

    parts: dict[str, ModelMixin] = {}
    named = family.image_class if with_image else family.text_class
    cls = getattr(diffusers, named or "DiffusionPipeline")
    if variant(source):
        from diffsparse_pipelines.tiny import TinyPipeline as cls  # noqa: N813 - Diffusers doesn't know it by name
    options = {"revision": family.revision} if family.revision and not Path(source).is_dir() else {}
    if family.float32_vae:
        parts["vae"] = from_pretrained(diffusers.AutoencoderKLWan, source, torch.float32, subfolder="vae", **options)
    return from_pretrained(cls, source, dtype, **parts, **options)


def _adapt(pipe: DiffusionPipeline, family: Family) -> None:
    """Put the LoRAs on that go with the model."""
    for adapter in family.adapters:
        second = {"load_into_transformer_2": True} if adapter.second else {}
        pipe.load_lora_weights(adapter.hub, weight_name=adapter.file, **second)


def _tile(pipe: DiffusionPipeline) -> None:
    enable = getattr(getattr(pipe, "vae", None), "enable_tiling", None)
    if enable is None:
        raise ConfigError(f"{type(pipe).__name__} has no VAE that can decode in tiles; leave out --vae-tiling")
    enable()


def _place(pipe: DiffusionPipeline, device: str, offload: str) -> None:
    if offload == "none":
        pipe.to(device)
        return
    ways: dict[str, tuple[str, dict[str, object]]] = {
        "model": ("enable_model_cpu_offload", {"device": device}),
        "sequential": ("enable_sequential_cpu_offload", {"device": device}),
        "group": (
            "enable_group_offload",
            {"onload_device": device, "offload_type": "leaf_level", "use_stream": True},
        ),
    }
    method, arguments = ways[offload]
    if not hasattr(pipe, method):
        raise ConfigError(
            f"{type(pipe).__name__} has no offload {offload!r}: leave it at 'none', or give its blocks a "
            "ComponentsManager in Python"
        )
    getattr(pipe, method)(**arguments)
