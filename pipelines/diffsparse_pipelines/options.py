"""Command-line options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsparse.errors import ConfigError
from diffsparse.schedule import Schedule

if TYPE_CHECKING:
    from diffsparse.guidance.preset import Preset

_MODEL, _SIZE, _SPARSE, _HEADS = "Model", "Size and sampling", "Strategy", "Head guidance"

DEFAULT_BLOCK = "128 with a GPU, else 64"
STRATEGIES = (
    "digest, adaspa, gna, random, dense, paro:PLAN or sparse-vdit:PLAN; all but digest also with +means or +tail"
)
MOST = 1_000_000  # pixels, frames: what the machine holds is asked elsewhere
MOST_STEPS = 10_000
MOST_COUNT = 10_000  # of rounds, images, looks, groups, ...
MOST_BLOCK = 4096  # tokens of a block
MOST_SEED = 2**64 - 1  # what a generator of torch takes
_DIGITS = 64  # more than any of these has

# --- what a value must be, asked while the command line is read -----------------------------------------------------


def whole(least: int, most: int) -> Callable[..., int | None]:
    """For `typer.Option(callback=)`: a whole number in [least, most], or None."""

    def check(param: typer.CallbackParam, value: int | None) -> int | None:
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{_name(param)} wants a whole number from {least} to {most}; got {value}")
        return value

    return check


def number(least: float = 0.0, most: float = math.inf, below: float = math.inf) -> Callable[..., float | None]:
    """For `typer.Option(callback=)`: a finite number in [least, most], under `below`, or None."""
    limits = f"in [{least:g}, {below:g})" if below < math.inf else f"in [{least:g}, {most:g}]"
    wanted = limits if min(most, below) < math.inf else f"of at least {least:g}"

    def check(param: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and least <= value <= most and value < below):
            raise ConfigError(f"{_name(param)} wants a number {wanted}; got {value}")
        return value

    return check


def text(param: typer.CallbackParam, value: str | None) -> str | None:
    """For `typer.Option(callback=)`: anything but nothing."""
    if value is not None and not value.strip():
        raise ConfigError(f"{_name(param)} wants a value; got an empty text")
    return value


def file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """For `typer.Option(callback=)`: the name of a file or folder; an empty one would be the working folder."""
    if value is not None and value == Path():
        raise ConfigError(f"{_name(param)} wants the name of a file or folder; got an empty one")
    return value


def _name(param: typer.CallbackParam) -> str:
    return str(param.opts[0])


# --- options that several commands have -----------------------------------------------------------------------------

Model = Annotated[
    str,
    typer.Option(
        help="A known name, a folder of a saved pipeline, or a hub id.", rich_help_panel=_MODEL, callback=text
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.", rich_help_panel=_MODEL)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.", rich_help_panel=_MODEL)]
Offload = Annotated[
    str, typer.Option(help="How weights wait on the CPU: none, model, sequential, group.", rich_help_panel=_MODEL)
]
VaeTiling = Annotated[
    bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory at large sizes.", rich_help_panel=_MODEL)
]
Seed = Annotated[int, typer.Option(help="Of the initial noise.", callback=whole(0, MOST_SEED))]
Prompts = Annotated[str, typer.Option(help="How many built-in prompts, or a file with one a line.", callback=text)]
Seeds = Annotated[str, typer.Option(help="Numbers separated by commas.")]
Steps = Annotated[
    int | None,
    typer.Option(help="Denoising steps.", show_default="model's", rich_help_panel=_SIZE, callback=whole(1, MOST_STEPS)),
]
Height = Annotated[
    int | None,
    typer.Option(help="Pixels.", show_default="model's", rich_help_panel=_SIZE, callback=whole(1, MOST)),
]
Width = Annotated[
    int | None,
    typer.Option(help="Pixels.", show_default="model's", rich_help_panel=_SIZE, callback=whole(1, MOST)),
]
NumFrames = Annotated[
    int | None,
    typer.Option(
        "--frames",
        help="Frames of a video.",
        show_default="model's",
        rich_help_panel=_SIZE,
        callback=whole(1, MOST),
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        help="Weight of classifier-free guidance, as Diffusers' guidance_scale; 1 is none.",
        show_default="model's",
        rich_help_panel=_SIZE,
        callback=number(),
    ),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What should not be seen.", rich_help_panel=_SIZE)]
Strategy = Annotated[str, typer.Option(help=f"{STRATEGIES}.", rich_help_panel=_SPARSE, callback=text)]
Sparsity = Annotated[
    float | None,
    typer.Option(
        help="Share of attention to drop, in [0, 1).",
        show_default="0.8",
        rich_help_panel=_SPARSE,
        callback=number(below=1),
    ),
]
Block = Annotated[
    int | None,
    typer.Option(
        help="Edge of a block in tokens.",
        show_default=DEFAULT_BLOCK,
        rich_help_panel=_SPARSE,
        callback=whole(1, MOST_BLOCK),
    ),
]
Order = Annotated[
    str | None,
    typer.Option(
        help="Of the tokens: FHW, FWH, ..., tile4x8x8, hilbert, or auto (each head's own).",
        show_default="the strategy's",
        rich_help_panel=_SPARSE,
        callback=text,
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
HeadAdaptive = Annotated[
    bool | None,
    typer.Option(
        "--head-adaptive/--no-head-adaptive",
        help="AdaSpa's sparsity by head.",
        show_default="on",
        rich_help_panel=_SPARSE,
    ),
]
RecallThreshold = Annotated[
    float | None,
    typer.Option(
        help="AdaSpa's: retained mass above which a head may drop more.",
        show_default="0.8",
        rich_help_panel=_SPARSE,
        callback=number(most=1),
    ),
]
Window = Annotated[
    str | None,
    typer.Option(
        help="GNA's: frames x rows x columns of tokens, such as 8x16x16; 0 is the whole axis.",
        show_default="by sparsity",
        rich_help_panel=_SPARSE,
    ),
]
Stride = Annotated[
    str | None,
    typer.Option(
        help="GNA's: neighbouring queries that share a window; 1x1x1 slides.",
        show_default="a tile's edges",
        rich_help_panel=_SPARSE,
    ),
]
Dilation = Annotated[
    str | None,
    typer.Option(
        help="GNA's: distance between tokens that see each other.", show_default="1x1x1", rich_help_panel=_SPARSE
    ),
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
    str | None,
    typer.Option(
        help="Heads to guide away from: a preset of diffsparse hunt (.json), or names such as 5.3,12.0-7,single.4.*.",
        rich_help_panel=_HEADS,
        callback=text,
    ),
]
HeadStrength = Annotated[
    float | None,
    typer.Option(
        help="How far the heads are perturbed, in [0, 1].",
        show_default="preset's, or 1",
        rich_help_panel=_HEADS,
        callback=number(most=1),
    ),
]
HeadScale = Annotated[
    float | None,
    typer.Option(
        help="Weight of the head guidance.",
        show_default="preset's, or 3",
        rich_help_panel=_HEADS,
        callback=number(),
    ),
]


# --- options together -----------------------------------------------------------------------------------------------


def preset(heads: str | None, strength: float | None, scale: float | None) -> Preset | None:
    """The head guidance that the three options describe; None without heads.

    Raises:
        ConfigError: a strength or scale without heads, or out of range. InputFileError: a preset that can't be read.
    """
    if heads is None:
        if strength is not None or scale is not None:
            raise ConfigError("--head-strength and --head-scale want --heads")
        return None
    from diffsparse.guidance.preset import Preset

    return Preset.read(heads, strength=strength, scale=scale)


def strategies(listed: str, sparsities: Iterable[float | None], knobs: dict[str, Any]) -> list[Any]:
    """Each named strategy at each sparsity, None for its own, with those of the `knobs` that it has; none twice.

    Raises:
        ConfigError: a knob was given that none of them has. UnknownNameError, ...: as `diffsparse.strategies.parse`.
    """
    from diffsparse.strategies import STRATEGIES as KNOWN
    from diffsparse.strategies import parse

    shares = list(sparsities)
    known = {name: {field.name for field in fields(cls)} for name, cls in KNOWN.items()}
    asked = [part.partition(":")[0].partition("+")[0].lower() for part in names(listed)]
    own = {name: set(known[name]) for name in asked if name in known}
    if knobs.get("window") is not None and "gna" in own:
        own["gna"].remove("sparsity")  # its windows say what they keep
    if own:
        given = next((share for share in shares if share is not None), None)
        check_knobs({**knobs, "sparsity": given}, own, known)
    return list(dict.fromkeys(x for share in shares for x in parse(listed, **{**knobs, "sparsity": share})))


def check_knobs(given: dict[str, Any], own: dict[str, set[str]], known: dict[str, set[str]]) -> None:
    """Raise ConfigError for a knob that was given (is not None) and that nobody in `own` has.

    own, known: names of knobs by who has them: of those that were asked for, and of all that there are.
    """
    for knob, value in given.items():
        if value is None or any(knob in knobs for knobs in own.values()):
            continue
        option = f"--{'no-' if value is False else ''}{knob.replace('_', '-')}"
        if any("plan" in knobs for knobs in own.values()):
            raise ConfigError(
                f"{', '.join(own)} takes no {option}: its plan fixes that; leave it out, or calibrate anew"
            )
        if any(knob in known[name] for name in own):
            raise ConfigError(f"{', '.join(own)} takes no {option} beside --window; leave one of the two out")
        able = ", ".join(name for name, knobs in known.items() if knob in knobs)
        raise ConfigError(f"{', '.join(own)} takes no {option}; leave it out, or take one that does: {able}")


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
    return tuple(amount(part, option) for part in names(text))


def searches(text: str | None) -> tuple[int | float, ...] | None:
    """Of --searches; None, the strategy's own, where nothing is given."""
    return None if text is None else amounts(text, "--searches")


def shares(text: str, option: str) -> tuple[float, ...]:
    """One or more numbers in [0, 1), separated by commas.

    Raises:
        ConfigError: none, or something else.
    """
    try:
        found = tuple(float(part) for part in names(text))
    except ValueError:
        found = ()
    if not found or not all(0 <= share < 1 for share in found):
        raise ConfigError(f"{option} wants numbers in [0, 1), separated by commas, such as 0.5,0.8; got {text!r}")
    return found


def wholes(text: str, option: str, least: int, most: int) -> tuple[int, ...]:
    """One or more whole numbers in [least, most], separated by commas.

    Raises:
        ConfigError: none, or something else.
    """
    parts = names(text)
    if not parts or not all(_is_whole(part, least, most) for part in parts):
        raise ConfigError(f"{option} wants whole numbers from {least} to {most}, separated by commas; got {text!r}")
    return tuple(map(int, parts))


def cells(text: str | None, option: str, least: int) -> tuple[int, int, int] | None:
    """Frames, rows and columns ("8x16x16"), each from `least` to a million; None where nothing is given.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split("x")]
    if len(parts) != 3 or not all(_is_whole(part, least, MOST) for part in parts):
        raise ConfigError(
            f"{option} wants frames x rows x columns such as 8x16x16, each from {least} to {MOST}; got {text!r}"
        )
    frames, rows, columns = map(int, parts)
    return frames, rows, columns


def _is_whole(text: str, least: int, most: int) -> bool:
    """Whether a text is a whole number in [least, most]; Python reads no number of thousands of digits."""
    return text.isdecimal() and len(text) <= _DIGITS and least <= int(text) <= most


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
    guidance_scale: float | None,
    negative_prompt: str | None,
) -> Any:
    """Call arguments that were given."""
    given = {
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "num_frames": frames,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    return {name: value for name, value in given.items() if value is not None}
