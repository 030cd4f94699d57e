"""Whether a pipeline call can run and what it will cost, before it runs; and the cost found afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from diffsparse.errors import ConfigError
from diffsparse.guidance.preset import Preset
from diffsparse.insight.cost import FEWEST, Estimate, flops
from diffsparse.orders.layout import Layout
from diffsparse.schedule import Schedule
from diffsparse.seam.added import prepare
from diffsparse.seam.caches import Outlook, Passes, outlook
from diffsparse.seam.caching import BLOCKS
from diffsparse.seam.geometry import Grid
from diffsparse.seam.models import patch_of, spec_of, understood_grid
from diffsparse.seam.targets import attentions, models_of
from diffsparse.site.report import Report
from diffsparse.strategies.dense import Dense
from diffsparse.wrappers import class_of
from diffsparse_pipelines import families, machine
from diffsparse_pipelines.drawn import PACKED
from diffsparse_pipelines.generation import parameters
from diffsparse_pipelines.known import chunked

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

    from diffsparse.strategies import Strategy

_SMALLER = "lower --height, --width or --frames"
FEW_TOKENS = 10_000  # below which sparse attention on a GPU is expected to take longer than dense
_PIXEL = 24  # bytes: three channels in float32, as the VAE gives them and as an array
_ACTIVATIONS = 6  # as large as the hidden states, alive together in an attention: input, normed, q, k, v, output
_SPACE = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")
_CHUNK = ("vae_frames_per_chunk", "vae_latents_per_chunk")
_TIME = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


class Tokens(NamedTuple):
    """Tokens of one sample.

    Attributes:
        video: on the grid.
        text: of the prompt.
    """

    video: int
    text: int


class Compression(NamedTuple):
    """Pixels that make one latent cell.

    Attributes:
        time: along frames.
        space: along height and width.
        chunk: as `Family.chunk`.
    """

    time: int
    space: int
    chunk: tuple[int, int] | None = None

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> Compression | None:
        """As the pipeline's VAE has it; None if it doesn't say."""
        space = next((getattr(pipe, name) for name in _SPACE if getattr(pipe, name, None)), None)
        time = next((getattr(pipe, name) for name in _TIME if getattr(pipe, name, None)), 1)
        chunk = tuple(getattr(pipe, name, None) or 0 for name in _CHUNK)
        return None if space is None else cls(time, space, (chunk[0], chunk[1]) if all(chunk) else None)

    def latent(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent cells of a video of so many frames and pixels; the first frame has a cell of its own."""
        along = (frames - 1) // self.time + 1 if self.chunk is None else chunked(frames, *self.chunk)
        return along, height // self.space, width // self.space


def grid(model: ModelMixin, latent: tuple[int, int, int]) -> Grid:
    """The token grid that `model` makes of a latent of frames x height x width cells."""
    patch = patch_of(model)
    reader, (frames, height, width) = spec_of(model).grid, latent
    if reader is understood_grid:  # whose last cells are filled up
        return Grid(frames, -(-height // 2), -(-width // 2))
    space = 2 if reader in PACKED else patch.space
    return Grid(-(-frames // patch.time), height // space, width // space)


def grid_tokens(model: ModelMixin, latent: tuple[int, int, int]) -> int:
    """Tokens of that grid."""
    return math.prod(grid(model, latent)[:3])


def layout(model: ModelMixin, latent: tuple[int, int, int], text: int) -> Layout | None:
    """What self-attention of a model sees.

    Args:
        model: a transformer of Diffusers.
        latent: cells of the latent along frames, height and width.
        text: tokens of the prompt.
    """
    spec = spec_of(model)
    return spec.layout(grid(model, latent), grid_tokens(model, latent) + (0 if spec.text == "none" else text))


def tokens(pipe: DiffusionPipeline, arguments: Mapping[str, object]) -> Tokens | None:
    """Tokens of a call; None if sizes are left to the pipeline.

    Args:
        pipe: a Diffusers pipeline.
        arguments: of the call; what is missing is the pipeline's own default.
    """
    latent = _latent(pipe, arguments)
    if latent is None:
        return None
    model = next(iter(models_of(pipe).values()))
    return Tokens(grid_tokens(model, latent), argument(pipe, arguments, "max_sequence_length") or 0)


def _latent(pipe: DiffusionPipeline, arguments: Mapping[str, object]) -> tuple[int, int, int] | None:
    """Latent cells of a call of `pipe` along frames, height and width; None if sizes are left to the pipeline."""
    frames, height, width = (argument(pipe, arguments, name) for name in ("num_frames", "height", "width"))
    compression = Compression.of(pipe)
    if compression is None or not height or not width:
        return None
    return compression.latent(frames or 1, height, width)


def admit(
    model: str,
    chosen: families.Call,
    texts: Iterable[str] = (),
    *,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "none",
) -> None:
    """Refuse, before anything is loaded, what can't run: a device, a size, words that the embedded model can't read.

    Args:
        model: name, folder or hub id.
        chosen: call arguments that were given.
        texts: prompts.
        device: as `families.load` takes it.
        dtype: likewise.
        offload: likewise.

    Raises:
        ConfigError: what is wrong, and the remedy.
        UnknownNameError: no such model.
    """
    families.target(model, device, dtype, offload)
    families.check_size(model, chosen)
    call: families.Call = {"num_frames": 1, **families.defaults(model), **chosen}
    frames, height, width = call["num_frames"], call.get("height", 0), call.get("width", 0)
    what = f"{width}x{height}x{frames} pixels"
    machine.hold(frames * height * width * _PIXEL, "cpu", what, _SMALLER)
    if families.variant(model):
        _check_words([*texts, call.get("negative_prompt") or ""])


def _check_words(texts: list[str]) -> None:
    from diffsparse_pipelines import tiny

    unknown = tiny.strange_words(texts)
    if unknown:
        raise ConfigError(
            f"the embedded model doesn't know {', '.join(map(repr, unknown[:8]))}; it was trained on: "
            f"{tiny.known_words()}"
        )


def check(
    pipe: DiffusionPipeline,
    arguments: Mapping[str, object],
    schedule: Schedule | None = None,
    preset: Preset | None = None,
    searches: Sequence[int | float] | None = None,
) -> None:
    """Refuse, before a loaded pipeline runs, what it can't do: sizes, searches, dense steps and layers, heads.

    Raises:
        ConfigError: what is wrong, and the remedy.
        UnknownNameError: the model has none of the preset's heads.
        PlanError: the preset is another model's.
    """
    if preset is not None:
        preset.of(models_of(pipe))
    _check_searches(searches or (), argument(pipe, arguments, "num_inference_steps"))
    model: ModelMixin
    for model in models_of(pipe).values():
        if schedule is not None:
            _check_schedule(model, schedule, argument(pipe, arguments, "num_inference_steps"))
        latent = _latent(pipe, arguments)
        if latent is not None:
            _check_sides(model, grid(model, latent))
            count = grid_tokens(model, latent)
            heads, dim = (model.config.get(name) for name in ("num_attention_heads", "attention_head_dim"))
            width = heads * dim if isinstance(heads, int) and isinstance(dim, int) else 0  # unknown for some
            need = count * width * model.dtype.itemsize * _ACTIVATIONS
            machine.hold(need, pipe._execution_device, f"{count} tokens of {class_of(model).__name__}", _SMALLER)


def _check_searches(searches: Sequence[int | float], steps: int | None) -> None:
    late = [search for search in searches if isinstance(search, int) and steps is not None and search >= steps]
    if late:
        raise ConfigError(f"--searches wants steps before the run's {steps}, counted from 0; got {late[0]}")


def _check_schedule(model: ModelMixin, schedule: Schedule, steps: int | None) -> None:
    count = sum(1 for _ in attentions(model))
    wrong = [layer for layer in schedule.dense_layers if not -count <= layer < count]
    if wrong:
        raise ConfigError(
            f"--dense-layers wants numbers from {-count} to {count - 1}: {class_of(model).__name__} has {count} "
            f"attention layers; got {', '.join(map(str, wrong))}"
        )
    for name in ("dense_first", "dense_last"):
        dense = getattr(schedule, name)
        if isinstance(dense, int) and steps is not None and dense > steps:
            raise ConfigError(f"--{name.replace('_', '-')} wants at most the run's {steps} steps; got {dense}")


def _check_sides(model: ModelMixin, made: Grid) -> None:
    most = model.config.get("rope_max_seq_len", math.inf)
    for option, cells in zip(("--frames", "--height", "--width"), made[:3], strict=True):
        if not 1 <= cells <= most:
            raise ConfigError(
                f"{option} makes {cells} tokens along that side; {class_of(model).__name__} wants at least 1"
                f"{f', and at most {most}' if most < math.inf else ''}"
            )


def argument(pipe: DiffusionPipeline, arguments: Mapping[str, object], name: str) -> int | None:
    """A whole number that `pipe` is called with: the one given, or else its own default; None if it has none."""
    value = arguments.get(name, parameters(pipe).get(name))
    return value if isinstance(value, int) else None


def preflight(
    pipe: DiffusionPipeline, arguments: Mapping[str, object], strategy: Strategy, schedule: Schedule
) -> Estimate | None:
    """What sparse attention can be expected to save of a call.

    Args:
        pipe: a Diffusers pipeline.
        arguments: of the call; what is missing is the pipeline's own default.
        strategy: what computes attention.
        schedule: steps and layers that stay dense.

    Returns:
        The estimate; None if the call's size, its steps, or what the strategy will compute is unknown.
    """
    latent, steps = _latent(pipe, arguments), argument(pipe, arguments, "num_inference_steps")
    counted = tokens(pipe, arguments)
    if latent is None or counted is None or not steps:
        return None
    model = next(iter(models_of(pipe).values()))
    seen, left = layout(model, latent, counted.text), _outlook(pipe, steps)
    return Estimate.before(flops(model, *counted), strategy, schedule, steps, seen, left)


def warm_up_of(pipe: DiffusionPipeline, steps: int) -> int:
    """Steps at the start of a run of `steps` from which a step cache extrapolates; 0 without one."""
    return max(each.warm_up for each in _outlook(pipe, steps))


def _outlook(pipe: DiffusionPipeline, steps: int) -> list[Outlook]:
    """What step caches will leave of the attention modules of a pipeline's first transformer."""
    model, *experts = models_of(pipe).values()
    prepare(model, steps)
    modules = [module for _, module in attentions(model)]
    left = outlook(model, modules, Passes(steps, timesteps=_timesteps(pipe, steps)))
    # how many steps each expert has, and which of them its cache skips, only the run tells
    every = tuple(range(steps))
    return [each._replace(executed=every, is_known=each.executed == every) for each in left] if experts else left


def _timesteps(pipe: DiffusionPipeline, steps: int) -> tuple[float, ...] | None:
    """Of a run; None where its scheduler can't tell without the call."""
    scheduler = copy.deepcopy(pipe.scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError):
        return None
    return tuple(map(float, scheduler.timesteps.tolist()))


def announce(expected: Estimate | None) -> str:
    """The line before a run."""
    if expected is None:
        return "expected speed-up: unknown (of this call's size and steps and the strategy's density, one is not known)"
    cached = ""
    if not expected.is_known:
        cached = " (more with what the step cache skips, which it decides as it goes)"
    elif expected.executed < 1:
        cached = f" (with {expected.executed:.0%} of the steps' attention left by the step cache)"
    bound = f"at most {expected.speedup:.1f}x, by operations"
    return f"attention is {expected.attention_share:.0%} of your step; {bound}{cached}"


def few_tokens(pipe: DiffusionPipeline, arguments: Mapping[str, object], strategy: Strategy) -> str | None:
    """The line that a run has too few tokens for sparse attention to be faster; None if it has enough of them.

    On a CPU there is no such number: its kernels pay from a few hundred tokens on.
    """
    counted = tokens(pipe, arguments)
    if counted is None or counted.video >= FEW_TOKENS or isinstance(strategy, Dense):
        return None
    if pipe._execution_device.type == "cpu":
        return None
    cached = all(class_of(model).__name__ in BLOCKS for model in models_of(pipe).values())
    return (
        f"{counted.video} tokens: under {FEW_TOKENS} on a GPU sparse attention is expected to be slower than dense. "
        f"Take --strategy dense{', or a step cache: --strategy taylor-seer:interval=3/dense' if cached else ''}"
    )


def compare(expected: Estimate, report: Report, seconds: float) -> str | None:
    """The line after it; None if nothing was sparse."""
    if not report.sparse_calls:
        return None
    found = Estimate.after(report, seconds)
    if found is None:
        return (
            f"no verdict on the speed: that takes {FEWEST} dense steps to compare with; diffsparse evaluate times both"
        )
    return (
        f"attention was {found.attention_share:.0%} of a dense run ({expected.attention_share:.0%} by operations), "
        f"the run was {pace(found.speedup)} than a dense one, by the time of its {found.dense_steps} dense steps"
    )


def pace(speedup: float) -> str:
    """A speed-up in words: "1.30x faster", "1.30x slower"."""
    return f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"
