"""Real attention on file: q, k and v of some calls of a run, for methods to be tried on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from diffsparse.errors import ConfigError, InputFileError, PlanError
from diffsparse.orders.layout import Layout
from diffsparse.plans import sealed
from diffsparse.plans.sealed import Values
from diffsparse.schedule import evenly_spread
from diffsparse.site.compute import Method, Site
from diffsparse.site.place import Place
from diffsparse.strategies.base import Attending, Strategy, Wrapper, as_strategy, in_order
from diffsparse_kernels.masks import is_bias

FORMAT = 1  # of recordings; counts up when what is written changes so that an earlier release would misread it
DTYPE = torch.bfloat16
_REMEDY = "record again with `diffsparse inspect --record FILE`"
_PLACE = ("model", "layer", "index", "step", "steps", "end", "branch", "layers")  # of what a file says of a place


def paired_steps(steps: int, pairs: int) -> frozenset[int]:
    """Pairs of consecutive steps, evenly spread over a run, counted from 0.

    Args:
        steps: length of the run.
        pairs: how many at most.

    Raises:
        ConfigError: the run is shorter than a pair.
    """
    if steps < 2:
        raise ConfigError(f"a recording wants pairs of consecutive steps, so a run of at least 2; got {steps}")
    return frozenset(step + later for step in evenly_spread(pairs, steps - 1) for later in (0, 1))


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One self-attention call of one sample.

    Attributes:
        place: where it was.
        number: of the layer among its model's self-attention layers, in the order of running.
        heads: which of the layer's heads these are.
        all_heads: how many the layer has.
        scale: of the scores; None is 1/sqrt(D).
        q: queries, bfloat16 [1, H, N, D] after rotary embedding, tokens in raster order, on the CPU.
        k: keys, as `q`.
        v: values, as `q`.
        key_mask: bool [1, N], True = attend, or float32, added to scores; None: every token may be attended to.
    """

    place: Place
    number: int
    heads: tuple[int, ...]
    all_heads: int
    scale: float | None
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (1, len(self.heads), self.place.layout.tokens)
        for x in (self.q, self.k, self.v):
            if x.shape[:-1] != shape or x.dtype != DTYPE:
                raise ValueError(f"wanted q, k, v as {DTYPE} of {shape} and channels; got {x.dtype} of {(*x.shape,)}")
        mask = self.key_mask
        kinds = torch.bool, torch.float32
        if mask is not None and (mask.dtype not in kinds or mask.shape != (1, shape[2])):
            raise ValueError(
                f"wanted a key mask as bool or float32 of {(1, shape[2])}; got {mask.dtype} of {(*mask.shape,)}"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """q, k, v, and the mask if there is one."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        return found if self.key_mask is None else {**found, "key_mask": self.key_mask}

    def header(self) -> Values:
        """All but the tensors, as plain values."""
        place = {name: getattr(self.place, name) for name in _PLACE}
        own = {"number": self.number, "heads": list(self.heads), "all_heads": self.all_heads, "scale": self.scale}
        return {"layout": asdict(self.place.layout), "place": place, **own}

    @classmethod
    def of(cls, header: Values, tensors: dict[str, Tensor]) -> Self:
        """The call that `header` and `tensors` describe.

        Args:
            header: what `RecordedCall.header` gave.
            tensors: what `tensors` gave.

        Raises:
            LookupError: something is missing.
            TypeError: something is of another type.
            ValueError: shapes or dtypes make no sense.
        """
        place = Place(layout=Layout.of(header["layout"]), **header["place"])
        number, heads, count, scale = (header[name] for name in ("number", "heads", "all_heads", "scale"))
        return cls(place, number, tuple(heads), count, scale, *(tensors.pop(x) for x in "qkv"), **tensors)


@dataclass(frozen=True, eq=False)
class Recording:
    """Some self-attention calls of a run.

    Attributes:
        calls: by model, step and layer.
        about: plain values about the run: of what model, by which versions.
    """

    calls: tuple[RecordedCall, ...]
    about: Values = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            OutputFileError: the file can't be written.
        """
        tensors = {f"{i}.{name}": x for i, call in enumerate(self.calls) for name, x in call.tensors.items()}
        values = {"recording": FORMAT, "about": self.about, "calls": [call.header() for call in self.calls]}
        sealed.write(path, values, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` has written.

        Raises:
            InputFileError: no such file, or it is no recording, damaged, or of a later release.
        """
        try:
            values, tensors = sealed.read(path, "recording", _REMEDY)
            if "recording" not in values:
                raise InputFileError(f"{path} is no recording; {_REMEDY}")
            sealed.check_format({"format": values["recording"]}, f"recording {path}", _REMEDY, FORMAT)
            return cls(tuple(_calls(values["calls"], tensors)), values["about"])
        except PlanError as error:
            raise InputFileError(str(error)) from error
        except (LookupError, TypeError, ValueError) as error:
            raise InputFileError(f"the recording {path} makes no sense ({error}); {_REMEDY}") from error


def _calls(headers: list[Values], tensors: dict[str, Tensor]) -> list[RecordedCall]:
    own: list[dict[str, Tensor]] = [{} for _ in headers]
    for name, tensor in tensors.items():
        number, _, what = name.partition(".")
        own[int(number)][what] = tensor
    return [RecordedCall.of(header, parts) for header, parts in zip(headers, own, strict=True)]


class Recorder(Wrapper):
    """A strategy that lets another one run, and records q, k and v of some of its calls.

    Of a batch its last sample is recorded (the prompt's, where the unconditional half comes first), of the guidance
    branches the one that runs first, of several runs the first. Under Ulysses each rank records heads of its own.
    Only calls whose tokens have known places on the grid, and only those that the schedule leaves to the strategy:
    with `Dense()` and `Schedule(0)` that is every step.

    Args:
        strategy: the one that runs.
        steps: recorded ones, from 0. Methods that learn from a step want the next one too (`paired_steps`).
        layers: how many self-attention layers at most, evenly spread; or which, by number from 0 in running order.
        heads: how many heads, evenly spread; or which, by number from 0.
        most: GiB that the recording may take.
        announce: told the bytes that it will take at most, when the first call shows the sizes.

    Raises:
        ConfigError: at the first call: steps, layers or heads that do not exist, or a recording above `most`.

    Examples:
        >>> from diffsparse import Dense, Recorder, Schedule, apply
        >>> recorder = Recorder(Dense(), steps={1, 2}, layers=1)
        >>> with apply(pipe, recorder, schedule=Schedule(0)):
        ...     video = pipe("a red ball").frames[0]
        >>> recorder.recording({"model": "mine"}).save(folder / "calls.safetensors")
        >>> [(call.number, call.place.step) for call in recorder.calls]
        [(1, 1), (1, 2)]
    """

    def __init__(
        self,
        strategy: Strategy | Attending,
        steps: Collection[int],
        *,
        layers: int | Collection[int] = 3,
        heads: int | Collection[int] = 2,
        most: float = 4.0,
        announce: Callable[[int], None] | None = None,
    ) -> None:
        self.strategy, self.probed, self.layers, self.heads = as_strategy(strategy), steps, layers, heads
        self.most, self.announce, self.needs_grid = most, announce, True
        self.seen: dict[str, dict[int, int]] = {}  # by model: index of each self-attention layer, and its first step
        self.kept: dict[tuple[str, int, int], RecordedCall] = {}  # by model, step, and number of the layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """What the strategy makes of q, k, v [B, H, N, D]."""
        return self._watch(self.strategy.attend, q, k, v, site)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """What the strategy makes of q, k, v [B, H, N, D] in the last dense step."""
        return self._watch(self.strategy.observe, q, k, v, site)

    @property
    def calls(self) -> list[RecordedCall]:
        """What was recorded, by model, step and layer."""
        return [self.kept[key] for key in sorted(self.kept)]

    def recording(self, about: Values | None = None) -> Recording:
        """All of it, with plain values about the run.

        Raises:
            ConfigError: nothing was recorded, or not all of the layers that were asked for exist.
        """
        for model in self.seen:
            self._check_layers(model)
        if not self.kept:
            raise ConfigError(
                f"nothing was recorded at steps {_listed(self.probed)}: no self-attention with known places of its "
                "tokens ran there; choose other steps or another model"
            )
        return Recording(tuple(self.calls), about or {})

    def _watch(self, method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if not self.seen:
            self._admit(q, k, v, site)
        number = self._number(site)
        key = site.model, site.step, number
        if site.step in self.probed and key not in self.kept and self._wants(number, site):
            self.kept[key] = self._copy(q, k, v, site, number)
        return in_order(self.strategy, method, (q, k, v), site)

    def _admit(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> None:
        """Refuse, at the first call, what can't be recorded, and a recording that takes too much."""
        count, most = q.shape[1] * site.shard.degree, site.steps
        if most is not None and max(self.probed, default=0) >= most:
            raise ConfigError(f"recorded steps want to be some of 0 to {most - 1}; got {_listed(self.probed)}")
        if not isinstance(self.heads, int) and not all(0 <= head < count for head in self.heads):
            raise ConfigError(f"recorded heads want to be some of 0 to {count - 1}; got {_listed(self.heads)}")
        layers = self.layers if isinstance(self.layers, int) else len(self.layers)
        token = sum(x.shape[-1] for x in (q, k, v)) * DTYPE.itemsize
        size = len(self.probed) * layers * len(self._heads(q, site)) * q.shape[2] * token
        if size > self.most * 2**30:
            raise ConfigError(
                f"the recording would take {size / 2**30:.1f} GiB, and {self.most:g} GiB are allowed; record fewer "
                "steps, layers or heads, or allow more"
            )
        if self.announce is not None:
            self.announce(size)

    def _number(self, site: Site) -> int:
        """The layer's number among the self-attention layers of its model."""
        seen = self.seen.setdefault(site.model, {})
        if seen.setdefault(site.index, site.step) < site.step:  # so all layers have been seen
            self._check_layers(site.model)
        return list(seen).index(site.index)

    def _check_layers(self, model: str) -> None:
        count = len(self.seen[model])
        if not isinstance(self.layers, int) and not all(0 <= layer < count for layer in self.layers):
            raise ConfigError(f"recorded layers want to be some of 0 to {count - 1}; got {_listed(self.layers)}")

    def _wants(self, number: int, site: Site) -> bool:
        """Whether to record a layer; spread ones are the next to places that are spread over all attention modules.

        Cross-attention is among these, and which is which shows only when they run.
        """
        if not isinstance(self.layers, int):
            return number in self.layers
        before = list(self.seen[site.model])[number - 1] if number else -1
        return any(before < place <= site.index for place in evenly_spread(self.layers, site.layers))

    def _heads(self, q: Tensor, site: Site) -> tuple[int, ...]:
        """Which heads of q [B, H, N, D]."""
        if isinstance(self.heads, int):
            return tuple(sorted(evenly_spread(self.heads, q.shape[1])))
        return site.shard.own_numbers(tuple(self.heads), q.shape[1])

    def _copy(self, q: Tensor, k: Tensor, v: Tensor, site: Site, number: int) -> RecordedCall:
        own, first, count = list(self._heads(q, site)), site.shard.rank * q.shape[1], q.shape[1] * site.shard.degree
        q, k, v = (x[-1:, own].to("cpu", DTYPE).contiguous() for x in (q, k, v))
        mask = None if site.key_mask is None else site.key_mask[-1:].cpu().clone(memory_format=torch.contiguous_format)
        mask = mask.float() if is_bias(mask) else mask
        place = Place(layout=site.layout, **{name: getattr(site, name) for name in _PLACE})
        return RecordedCall(place, number, tuple(first + head for head in own), count, site.scale, q, k, v, mask)


def _listed(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
