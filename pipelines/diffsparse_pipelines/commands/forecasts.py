"""Runs of known models on a device that isn't here, as rows: what they take, piece by piece, and on what it rests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from diffsparse.errors import ConfigError
from diffsparse.insight.cost import flops
from diffsparse.insight.device import Device
from diffsparse.insight.forecast import Call, Forecast
from diffsparse.schedule import Schedule
from diffsparse.strategies import STRATEGIES, Strategy, Tangent, name_of, parse
from diffsparse_kernels import Block, edges
from diffsparse_pipelines import families
from diffsparse_pipelines.architectures import architecture, heads_of
from diffsparse_pipelines.families import Call as Arguments
from diffsparse_pipelines.preflight import grid_tokens, layout
from diffsparse_pipelines.tables import significant

if TYPE_CHECKING:
    from diffusers import ModelMixin

Row = dict[str, str | float | None]


class Made(NamedTuple):
    """What a run makes, and in how many passes of the transformer.

    frames: in all.
    windows: how many runs make the video.
    window: frames of one.
    tokens: on the grid of one.
    passes: of a step, two with guidance.
    """

    width: int
    height: int
    frames: int
    windows: int
    window: int
    tokens: int
    steps: int
    passes: int

    def __str__(self) -> str:
        frames = f", {self.frames} frames" if self.frames > 1 else ""
        windows, each = (f" in {self.windows} windows of {self.window}", " a window") if self.windows > 1 else ("", "")
        passes = "two passes a step (guidance)" if self.passes > 1 else "one pass a step"
        made = f"{self.width}x{self.height} pixels{frames}{windows}"
        return f"{made}; {self.tokens:,} tokens and {self.steps} steps{each}, {passes}"


@dataclass(frozen=True)
class Foretold:
    """A strategy's run.

    over_fastest: the same where dense attention is the fastest kernel, in dense steps too.
    """

    strategy: Strategy
    schedule: Schedule
    run: Forecast
    over_fastest: Forecast
    made: Made

    def row(self) -> Row:
        """The whole run."""
        return {
            **self._named(),
            "dense_seconds": self.made.windows * self.run.dense_seconds,
            "seconds": self.made.windows * self.run.seconds,
            "attention_share": self.run.attention_share,
            "attention_speedup": self.run.attention_speedup,
            "speedup": self.run.speedup,
            "speedup_over_fastest_dense": self.over_fastest.speedup,
            "search_share": self.run.search_share,
            "beside_share": self.run.beside,
        }

    def pieces(self) -> Iterator[Row]:
        """What the steps of each kind do in a layer."""
        for each in self.run.stretches:
            for piece in each.pieces:
                share = piece.ms / each.of("blocks") if each.name == "sparse" else None
                yield {
                    **self._named(),
                    "step": each.name,
                    "steps": each.steps,
                    **piece._asdict(),
                    "share_of_blocks": share,
                }

    def _named(self) -> Row:
        return {"strategy": name_of(self.strategy), "dense_first": self.schedule.dense_first}


def foretell(
    name: str, size: Arguments, device: Device, strategies: Iterable[Strategy], schedules: list[Schedule]
) -> list[Foretold]:
    """Each strategy with each schedule on a model that is built without weights.

    size: what was given of height, width, frames and steps; the rest is the model's own.

    Raises:
        UnknownNameError: no such model, or one whose architecture is not listed.
        ConfigError: a size that it can't make, or a strategy whose time can't be told.
    """
    built = architecture(name)
    families.check_size(name, size)
    chosen: Arguments = {"num_frames": 1, **families.defaults(name), **size}
    model: ModelMixin = built.build(device="meta")
    frames, windows = families.FAMILIES[name].windows(chosen["num_frames"])
    latent = built.compression.latent(frames, chosen["height"], chosen["width"])
    tokens = grid_tokens(model, latent)
    seen, count = layout(model, latent, built.text), flops(model, tokens, built.text)
    if seen is None or count.head_dim is None:
        raise ConfigError(f"of {name!r} it is not known what its attention sees; name another model")
    made = Made(
        chosen["width"],
        chosen["height"],
        chosen["num_frames"],
        windows,
        frames,
        tokens,
        chosen["num_inference_steps"],
        1 + built.guided,
    )
    call = Call(device, seen.tokens, heads_of(model), count.head_dim, edges(device.block), built.masked)
    found = []
    for strategy in strategies:
        for schedule in schedules:
            runs = [
                Forecast.of(count, strategy, schedule, made.steps, seen, each, made.passes)
                for each in (call, replace(call, device=device.with_fastest_dense()))
            ]
            if runs[0] is None or runs[1] is None:
                raise ConfigError(f"the time of {name_of(strategy)} can't be told beforehand; leave it out")
            found.append(Foretold(strategy, schedule, runs[0], runs[1], made))
    return found


def on_device(names: Iterable[str], device: Device, **knobs: object) -> list[Strategy]:
    """Strategies as `diffsparse.strategies.parse` makes them, with the blocks that suit the device."""
    return [made for name in names for made in parse(name, **{"block": _block(name, device), **knobs})]


def _block(name: str, device: Device) -> Block:
    cls = STRATEGIES.get(name.partition(":")[0].partition("+")[0].lower(), Strategy)
    return device.block if issubclass(cls, Tangent) else edges(device.block)[0]


# --- tables -------------------------------------------------------------------------------------------------------

Columns = dict[str, tuple[str, Callable[[Any], str]]]
# key of a row -> (heading, its values as text)
RUNS: Columns = {
    "strategy": ("strategy", "{}".format),
    "dense_first": ("dense first", "{:g}".format),
    "dense_seconds": ("dense s", significant),
    "seconds": ("run s", significant),
    "attention_share": ("attention share", "{:.2f}".format),
    "attention_speedup": ("attention", "{:.2f}x".format),
    "speedup": ("end to end", "{:.2f}x".format),
    "speedup_over_fastest_dense": ("over fastest dense", "{:.2f}x".format),
    "search_share": ("searches", "{:.1%}".format),
    "beside_share": ("beside blocks", "{:.0%}".format),
}
OVER_FASTEST = (
    "over fastest dense: end to end where dense attention is the fastest kernel that was measured, in the dense run "
    "and in the dense steps of these runs alike"
)
PIECES: Columns = {
    "strategy": ("strategy", "{}".format),
    "step": ("step", "{}".format),
    "name": ("piece", "{}".format),
    "tflop": ("TFLOP", "{:.2f}".format),
    "gigabytes": ("GB", "{:.2f}".format),
    "ms": ("ms", "{:.2f}".format),
    "share_of_blocks": ("of blocks", "{:.0%}".format),
}
RATES: Columns = {
    "name": ("rate", "{}".format),
    "value": ("", "{:g}".format),
    "unit": ("", "{}".format),
    "source": ("source", "{}".format),
}


def cells(rows: Iterable[Row], columns: Columns) -> list[list[str]]:
    """Texts of a table; "-" where there is nothing to say."""
    return [["-" if row[key] is None else text(row[key]) for key, (_, text) in columns.items()] for row in rows]


def rates(device: Device) -> list[Row]:
    """What all of it rests on."""
    return [{"name": name.replace("_", " "), **rate._asdict(), "source": rate.source} for name, rate in device.rates()]
