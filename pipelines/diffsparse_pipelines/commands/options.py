"""Options that several commands share, as four dataclasses: model, sampling, sparsity, head guidance.

A command takes them as parameters (`model: ModelOptions = ModelOptions()`), the command line shows one option for each
field (`diffsparse.cli.parser.flat`). A field is what was typed; methods and properties give the values made of it. A
command that wants other defaults, or not all of the options, subclasses: a field without `typer.Option` is no option.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Self, cast

import typer

from diffsparse.errors import ConfigError
from diffsparse.schedule import Schedule
from diffsparse_pipelines import values
from diffsparse_pipelines.commands import checks
from diffsparse_pipelines.known import FAMILIES

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffsparse.guidance.preset import Preset
    from diffsparse.seam.caching import Caching
    from diffsparse.strategies import Strategy
    from diffsparse_pipelines.families import Call

_MODEL, _SIZE, _SPARSE, _HEADS = "Model", "Size and sampling", "Strategy", "Head guidance"
_STRATEGY = "digest"  # unless another is named
DEFAULT_BLOCK = "64; with a GPU 128, of tangent and digest 128x64"
STRATEGIES = (
    "digest, tangent, adaspa, gna, random, dense, paro:PLAN or sparse-vdit:PLAN; from adaspa on also with +means, "
    "+first-order or +tail; all with +int8, +fp8, +int8-int8 or +int8-fp8 in eight bits; for comparison sol, pisa, "
    "svg-ear, dit-fast"
)
CACHED = "; with a step cache CACHE/STRATEGY, such as taylor-seer:interval=2/digest or first-block:threshold=0.1/dense"

_NAMES = {kind: ", ".join(n for n, each in FAMILIES.items() if each.output == kind) for kind in ("video", "image")}
KNOWN = f"Models of videos: {_NAMES['video']}.\n\nModels of images: {_NAMES['image']}.\n\ndiffsparse models tells more."

# --- options of more than one command, or of one of the four and a command ------------------------------------------

Seed = Annotated[int, typer.Option(help="Of the initial noise.", callback=checks.whole(0, values.MOST_SEED))]
Prompts = Annotated[
    str, typer.Option(help="How many built-in prompts, or a file with one a line.", callback=checks.text)
]
Seeds = Annotated[str, typer.Option(help="Numbers separated by commas.")]
Height = Annotated[
    int | None,
    typer.Option(help="Pixels.", show_default="model's", rich_help_panel=_SIZE, callback=checks.whole(1, values.MOST)),
]
Width = Height
Frames = Annotated[
    int | None,
    typer.Option(
        help="Frames of a video.",
        show_default="model's",
        rich_help_panel=_SIZE,
        callback=checks.whole(1, values.MOST),
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        help="Share of attention to drop, in [0, 1).",
        show_default="0.8; of distilled models less",
        rich_help_panel=_SPARSE,
        callback=checks.number(below=1),
    ),
]
Block = Annotated[
    str | None,
    typer.Option(
        help="Tokens of a block, or queries x keys such as 128x64.",
        show_default=DEFAULT_BLOCK,
        rich_help_panel=_SPARSE,
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
Dilation = Annotated[
    str | None,
    typer.Option(
        help="GNA's: distance between tokens that see each other.", show_default="1x1x1", rich_help_panel=_SPARSE
    ),
]


# --- the four -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    epilog: ClassVar[str] = KNOWN
    name: Annotated[
        str,
        typer.Option(
            "--model",
            help="A known name (all are below), a folder of a saved pipeline, or a hub id.",
            rich_help_panel=_MODEL,
            callback=checks.text,
        ),
    ] = "tiny"
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, or auto.", rich_help_panel=_MODEL, callback=checks.number_format
        ),
    ] = "auto"
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.", rich_help_panel=_MODEL)] = "auto"
    offload: Annotated[
        str,
        typer.Option(help="How weights wait on the CPU: none, model, sequential, group.", rich_help_panel=_MODEL),
    ] = "none"
    vae_tiling: Annotated[
        bool,
        typer.Option("--vae-tiling", help="Decode in tiles: less memory at large sizes.", rich_help_panel=_MODEL),
    ] = False

    def admit(self, call: Call, prompts: Iterable[str] = ()) -> None:
        """Refuse what can't run, before anything is loaded, as `preflight.admit` does."""
        from diffsparse_pipelines.preflight import admit

        admit(self.name, call, prompts, device=self.device, dtype=self.dtype, offload=self.offload)

    def load(self, with_image: bool = False) -> DiffusionPipeline:
        """The pipeline, in its place; meanwhile the terminal says so."""
        from diffsparse_pipelines import families
        from diffsparse_pipelines.progress import status

        with status(f"loading {self.name}"):
            return families.load(
                self.name,
                dtype=self.dtype,
                device=self.device,
                offload=self.offload,
                vae_tiling=self.vae_tiling,
                with_image=with_image,
            )

    def call_arguments(self, pipe: DiffusionPipeline, call: Call) -> dict[str, object]:
        """What to call the loaded pipeline with: the model's own arguments, overruled by those of `call`."""
        from diffsparse_pipelines import families
        from diffsparse_pipelines.generation import call_arguments

        return call_arguments(pipe, families.defaults(self.name), call)


@dataclass(frozen=True)
class SamplingOptions:
    """Size and length of what is generated, and how it is sampled; None is the model's own."""

    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps.",
            show_default="model's",
            rich_help_panel=_SIZE,
            callback=checks.whole(1, values.MOST_STEPS),
        ),
    ] = None
    height: Height = None
    width: Width = None
    frames: Frames = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Weight of classifier-free guidance, as Diffusers' guidance_scale; 1 is none.",
            show_default="model's",
            rich_help_panel=_SIZE,
            callback=checks.number(),
        ),
    ] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What should not be seen.", rich_help_panel=_SIZE)] = None

    def arguments(self) -> Call:
        """Call arguments that were given."""
        given = {
            "num_inference_steps": self.steps,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
        }
        return cast("Call", {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class SparsityOptions:
    """Which strategy, with which knobs, at which steps and layers; None is the strategy's own."""

    strategy: Annotated[
        str | None,
        typer.Option(
            help=f"{STRATEGIES}{CACHED}.", show_default=_STRATEGY, rich_help_panel=_SPARSE, callback=checks.text
        ),
    ] = None
    sparsity: Sparsity = None
    block: Block = None
    order: Annotated[
        str | None,
        typer.Option(
            help="Of the tokens: FHW, FWH, ..., tile4x8x8, hilbert, or auto (each head's own).",
            show_default="the strategy's",
            rich_help_panel=_SPARSE,
            callback=checks.text,
        ),
    ] = None
    searches: Annotated[
        str | None,
        typer.Option(
            help="Later searches of adaspa: steps (int) or fractions, separated by commas.",
            show_default="the strategy's",
            rich_help_panel=_SPARSE,
        ),
    ] = None
    equal_heads: Annotated[
        bool,
        typer.Option("--no-head-adaptive", help="AdaSpa's: the same sparsity for all heads.", rich_help_panel=_SPARSE),
    ] = False
    recall_threshold: Annotated[
        float | None,
        typer.Option(
            help="AdaSpa's: retained mass above which a head may drop more.",
            show_default="0.8",
            rich_help_panel=_SPARSE,
            callback=checks.number(most=1),
        ),
    ] = None
    window: Window = None
    stride: Annotated[
        str | None,
        typer.Option(
            help="GNA's: neighbouring queries that share a window; 1x1x1 slides.",
            show_default="a tile's edges",
            rich_help_panel=_SPARSE,
        ),
    ] = None
    dilation: Dilation = None
    dense_first: Annotated[
        str,
        typer.Option(help="Dense steps at the start: a number, or a fraction such as 0.2.", rich_help_panel=_SPARSE),
    ] = "0.2"
    dense_last: Annotated[str, typer.Option(help="Dense steps at the end, likewise.", rich_help_panel=_SPARSE)] = "0"
    dense_layers: Annotated[
        str, typer.Option(help="Layers that stay dense: numbers separated by commas.", rich_help_panel=_SPARSE)
    ] = ""
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a call would fall back to dense.", rich_help_panel=_SPARSE)
    ] = False

    @property
    def named(self) -> str:
        """The strategy that was named, or the one that serves unless another is."""
        return _STRATEGY if self.strategy is None else self.strategy

    @property
    def schedule(self) -> Schedule:
        """The steps and layers that stay dense."""
        return Schedule(
            values.amount(self.dense_first, "--dense-first"),
            values.amount(self.dense_last, "--dense-last"),
            values.layers(self.dense_layers, "--dense-layers"),
        )

    @property
    def later_searches(self) -> tuple[int | float, ...] | None:
        """Steps (int) or fractions at which is searched again; None, the strategy's own, if not given."""
        return None if self.searches is None else values.amounts(self.searches, "--searches")

    @property
    def knobs(self) -> dict[str, object]:
        """Knobs of strategies by their names, all but the sparsity; None if not given."""
        return {
            "block": values.block(self.block, "--block"),
            "order": self.order,
            "searches": self.later_searches,
            "head_adaptive": False if self.equal_heads else None,
            "recall_threshold": self.recall_threshold,
            "window": values.cells(self.window, "--window", 0),
            "stride": values.cells(self.stride, "--stride", 1),
            "dilation": values.cells(self.dilation, "--dilation", 1),
        }

    def mild(self, model: str, call: Call) -> Self:
        """With the sparsity of a run of few steps, if it is one (`families.few_steps`) and none was given."""
        from diffsparse_pipelines import families

        steps = {**families.defaults(model), **call}.get("num_inference_steps")
        few = families.few_steps(model, steps if isinstance(steps, int) else None)
        if few is None or self.sparsity is not None or not self._takes_sparsity():
            return self
        return replace(self, sparsity=few.sparsity)

    def _takes_sparsity(self) -> bool:
        from diffsparse.strategies import STRATEGIES, knobs_of

        known = (STRATEGIES.get(name.rpartition("/")[2].partition("+")[0]) for name in values.names(self.named))
        return self.window is None and any(cls is not None and "sparsity" in knobs_of(cls) for cls in known)

    def strategies(self, sparsities: Sequence[float | None] = ()) -> list[Strategy]:
        """Each named strategy at each sparsity, with those of the knobs that it has; none twice.

        Args:
            sparsities: instead of the one sparsity; None is the strategy's own.

        Raises:
            ConfigError: a knob was given that none of them has, or a step cache.
            UnknownNameError, ...: as `diffsparse.strategies.parse`.
        """
        stacks = self.stacks(sparsities)
        if cached := next((cache for cache, _ in stacks if cache is not None), None):
            raise ConfigError(f"no step cache serves here; leave {str(cached)!r} and the slash out")
        return [strategy for _, strategy in stacks]

    def stacks(self, sparsities: Sequence[float | None] = ()) -> list[tuple[Caching | None, Strategy]]:
        """`strategies`, each with the step cache that stands before it: `taylor-seer:interval=2/digest`."""
        from diffsparse.strategies import parse

        shares, knobs = sparsities or [self.sparsity], self.knobs
        given = next((share for share in shares if share is not None), None)
        entries = [_cache_of(entry) for entry in values.names(self.named)]
        _check_strategies(",".join(name for _, name in entries), {**knobs, "sparsity": given})
        if not entries:
            parse(self.named)
        made = (
            (cache, strategy)
            for share in shares
            for cache, name in entries
            for strategy in parse(name, **{**knobs, "sparsity": share})
        )
        return list(dict.fromkeys(made))


@dataclass(frozen=True)
class GuidanceOptions:
    """Heads to guide away from, and how strongly; None is the preset's own."""

    heads: Annotated[
        str | None,
        typer.Option(
            help="Heads to guide away from: a preset of diffsparse hunt (.json), or names such as "
            "5.3,12.0-7,single.4.*.",
            rich_help_panel=_HEADS,
            callback=checks.text,
        ),
    ] = None
    head_strength: Annotated[
        float | None,
        typer.Option(
            help="How far the heads are perturbed, in [0, 1].",
            show_default="preset's, or 1",
            rich_help_panel=_HEADS,
            callback=checks.number(most=1),
        ),
    ] = None
    head_scale: Annotated[
        float | None,
        typer.Option(
            help="Weight of the head guidance.",
            show_default="preset's, or 3",
            rich_help_panel=_HEADS,
            callback=checks.number(),
        ),
    ] = None

    def preset(self) -> Preset | None:
        """The head guidance that was asked for; None without heads.

        Raises:
            ConfigError: a strength or scale without heads, or out of range. InputFileError: a preset that can't be
                read.
        """
        if self.heads is None:
            if self.head_strength is not None or self.head_scale is not None:
                raise ConfigError("--head-strength and --head-scale want --heads")
            return None
        from diffsparse.guidance.preset import Preset

        return Preset.read(self.heads, head_strength=self.head_strength, head_scale=self.head_scale)


# what commands take by default
MODEL, SAMPLING, SPARSITY, GUIDANCE = ModelOptions(), SamplingOptions(), SparsityOptions(), GuidanceOptions()


# --- knobs that were given, and those who have them -----------------------------------------------------------------


def _cache_of(entry: str) -> tuple[Caching | None, str]:
    """The step cache before a slash, and the strategy behind it; a slash may also be in the path of a plan."""
    from diffsparse.seam.caching import CACHES, Caching
    from diffsparse.strategies import STRATEGIES

    cache, slash, strategy = entry.partition("/")
    name = cache.partition(":")[0].lower()
    if slash and (name in CACHES or name.partition("+")[0] not in STRATEGIES):  # else the slash is of a plan's path
        return Caching.parse(cache.lower()), strategy
    return None, entry


def known_knobs() -> dict[str, set[str]]:
    """Names of the knobs of each strategy."""
    from diffsparse.strategies import STRATEGIES as KNOWN
    from diffsparse.strategies import knobs_of

    return {name: set(knobs_of(cls)) for name, cls in KNOWN.items()}


def _check_strategies(listed: str, given: dict[str, object]) -> None:
    """Raise ConfigError for a knob that was given and that none of the listed strategies has."""
    known = known_knobs()
    asked = [part.partition(":")[0].partition("+")[0].lower() for part in values.names(listed)]
    own = {name: set(known[name]) for name in asked if name in known}
    if given.get("window") is not None and "gna" in own:
        own["gna"].remove("sparsity")  # its windows say what they keep
    if own:
        check_knobs(given, own, known)


def check_knobs(given: Mapping[str, object], own: dict[str, set[str]], known: dict[str, set[str]]) -> None:
    """Raise ConfigError for a knob that was given (is not None) and that none in `own` has.

    Args:
        given: values by the names of knobs.
        own: names of knobs by who has them, of those that were asked for.
        known: likewise, of all that there are.
    """
    for knob, value in given.items():
        if value is None or any(knob in knobs for knobs in own.values()):
            continue
        option = f"--{'no-' if value is False else ''}{knob.replace('_', '-')}"
        if any("plan" in knobs for knobs in own.values()):
            raise ConfigError(
                f"{', '.join(own)} takes no {option}: its plan fixes that; leave it out, or calibrate again"
            )
        if any(knob in known[name] for name in own):
            raise ConfigError(f"{', '.join(own)} takes no {option} beside --window; leave one of the two out")
        able = ", ".join(name for name, knobs in known.items() if knob in knobs)
        raise ConfigError(f"{', '.join(own)} takes no {option}; leave it out, or take one that does: {able}")
