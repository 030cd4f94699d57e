"""Command-line options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsparse.errors import ConfigError
from diffsparse.schedule import Schedule

if TYPE_CHECKING:
    from diffsparse.preset import Preset

_MODEL, _SIZE, _SPARSE, _HEADS = "Model", "Size and sampling", "Strategy", "Head guidance"

DEFAULT_BLOCK = "128 with a GPU, else 64"
STRATEGIES = (
    "digest, adaspa, gna, random, dense, paro:PLAN or sparse-vdit:PLAN; all but digest also with +means or +tail"
)

Model = Annotated[
    str, typer.Option(help="A known name, a folder of a saved pipeline, or a hub id.", rich_help_panel=_MODEL)
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.", rich_help_panel=_MODEL)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.", rich_help_panel=_MODEL)]
Offload = Annotated[
    str, typer.Option(help="How weights wait on the CPU: none, model, sequential, group.", rich_help_panel=_MODEL)
]
VaeTiling = Annotated[
    bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory at large sizes.", rich_help_panel=_MODEL)
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default="model's", rich_help_panel=_SIZE)]
Height = Annotated[int | None, typer.Option(help="Pixels.", show_default="model's", rich_help_panel=_SIZE)]
Width = Annotated[int | None, typer.Option(help="Pixels.", show_default="model's", rich_help_panel=_SIZE)]
NumFrames = Annotated[
    int | None, typer.Option("--frames", help="Frames of a video.", show_default="model's", rich_help_panel=_SIZE)
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.", show_default="model's", rich_help_panel=_SIZE)]
NegativePrompt = Annotated[str | None, typer.Option(help="What should not be seen.", rich_help_panel=_SIZE)]
Strategy = Annotated[str, typer.Option(help=f"{STRATEGIES}.", rich_help_panel=_SPARSE)]
Sparsity = Annotated[float, typer.Option(help="Share of attention to drop, in [0, 1).", rich_help_panel=_SPARSE)]
Block = Annotated[
    int | None,
    typer.Option(help="Edge of a block in tokens.", show_default=DEFAULT_BLOCK, rich_help_panel=_SPARSE),
]
Order = Annotated[
    str | None,
    typer.Option(
        help="Of the tokens: FHW, FWH, ..., tile4x8x8, hilbert, or auto (each head's own).",
        show_default="the strategy's",
        rich_help_panel=_SPARSE,
    ),
]
Searches = Annotated[
    str | None,
    typer.Option(
        help="Later searches of adaspa and digest: steps (int) or fractions, separated by commas.",
        show_default="the strategy's",
        rich_help_panel=_SPARSE,
    ),
]
HeadAdaptive = Annotated[bool, typer.Option(help="AdaSpa's sparsity by head.", rich_help_panel=_SPARSE)]
RecallThreshold = Annotated[
    float, typer.Option(help="Retained mass above which a head may drop more.", rich_help_panel=_SPARSE)
]
Window = Annotated[
    str,
    typer.Option(
        help="GNA's: frames x rows x columns of tokens, such as 8x16x16; 0 is the whole axis.",
        show_default="by sparsity",
        rich_help_panel=_SPARSE,
    ),
]
Stride = Annotated[
    str,
    typer.Option(
        help="GNA's: neighbouring queries that share a window; 1x1x1 slides.",
        show_default="a tile's edges",
        rich_help_panel=_SPARSE,
    ),
]
Dilation = Annotated[
    str, typer.Option(help="GNA's: distance between tokens that see each other.", rich_help_panel=_SPARSE)
]
DenseFirst = Annotated[
    str, typer.Option(help="Dense steps at the start: a number, or a fraction such as 0.2.", rich_help_panel=_SPARSE)
]
DenseLast = Annotated[str, typer.Option(help="Dense steps at the end, likewise.", rich_help_panel=_SPARSE)]
DenseLayers = Annotated[
    str, typer.Option(help="Layers that stay dense: numbers separated by commas.", rich_help_panel=_SPARSE)
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Fail where a call would fall back to dense.", rich_help_panel=_SPARSE)
]

Heads = Annotated[
    str,
    typer.Option(
        help="Heads to guide away from: a preset of diffsparse hunt (.json), or names such as 5.3,12.0-7,single.4.*.",
        rich_help_panel=_HEADS,
    ),
]
GuidanceStrength = Annotated[
    float | None,
    typer.Option(
        help="How far the heads are perturbed, in [0, 1].", show_default="preset's, or 1", rich_help_panel=_HEADS
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(help="Weight of the head guidance.", show_default="preset's, or 3", rich_help_panel=_HEADS),
]


def preset(heads: str, strength: float | None, scale: float | None) -> Preset | None:
    """The head guidance that the three options describe; None without heads.

    Raises:
        ConfigError: a strength or scale without heads, or out of range. InputFileError: a preset that can't be read.
    """
    if not heads:
        if strength is not None or scale is not None:
            raise ConfigError("--guidance-strength and --guidance-scale want --heads")
        return None
    from diffsparse.preset import Preset

    return Preset.read(heads, strength=strength, scale=scale)


def amount(text: str, option: str) -> int | float:
    """A number of steps ("3") or a fraction ("0.2").

    Raises:
        ConfigError: neither.
    """
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ConfigError(f"{option} wants a number such as 3 or a fraction such as 0.2; got {text!r}") from None


def amounts(text: str, option: str) -> tuple[int | float, ...]:
    """Numbers or fractions, separated by commas; an empty text is an empty tuple."""
    return tuple(amount(part.strip(), option) for part in text.split(",") if part.strip())


def searches(text: str | None) -> tuple[int | float, ...] | None:
    """Of --searches; None, the strategy's own, where nothing is given."""
    return None if text is None else amounts(text, "--searches")


def cells(text: str, option: str, least: int) -> tuple[int, int, int] | None:
    """Frames, rows and columns ("8x16x16"), each at least `least`; None if the text is empty.

    Raises:
        ConfigError: anything else.
    """
    if not text.strip():
        return None
    parts = [part.strip() for part in text.split("x")]
    if len(parts) != 3 or not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ConfigError(
            f"{option} wants frames x rows x columns such as 8x16x16, each at least {least}; got {text!r}"
        )
    frames, rows, columns = map(int, parts)
    return frames, rows, columns


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def schedule(dense_first: str, dense_last: str, dense_layers: str) -> Schedule:
    """The schedule that the three options describe."""
    layers = amounts(dense_layers, "--dense-layers")
    if not all(isinstance(layer, int) for layer in layers):
        raise ConfigError(f"--dense-layers wants whole numbers separated by commas; got {dense_layers!r}")
    return Schedule(
        amount(dense_first, "--dense-first"),
        amount(dense_last, "--dense-last"),
        tuple(int(layer) for layer in layers),
    )


def sampling(
    steps: int | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    guidance: float | None,
    negative_prompt: str | None,
) -> dict[str, Any]:
    """Call arguments that were given; counts must be positive.

    Raises:
        ConfigError: a count below one.
    """
    counts = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    for name, value in counts.items():
        if value is not None and value < 1:
            option = {"num_inference_steps": "--steps", "num_frames": "--frames"}.get(name, f"--{name}")
            raise ConfigError(f"{option} wants a whole number of at least 1; got {value}")
    given = {**counts, "guidance_scale": guidance, "negative_prompt": negative_prompt}
    return {name: value for name, value in given.items() if value is not None}
