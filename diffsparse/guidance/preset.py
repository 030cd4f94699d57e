"""Which heads to perturb, how, and how hard: one value, and a small JSON file to share it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

import torch

from diffsparse.errors import ConfigError, PlanError
from diffsparse.files import json_text, read_bytes, write_text
from diffsparse.guidance.heads import Heads, check_names, resolve
from diffsparse.guidance.perturb import KINDS
from diffsparse.plans import sealed
from diffsparse.plans.hub import Shared
from diffsparse.plans.plan import fingerprints
from diffsparse.plans.sealed import Values
from diffsparse.schedule import check_amount
from diffsparse.schedule import resolve as step_of

BRANCHES = ("extra", "uncond")
FORMAT = 2  # of presets; 1 called two of the knobs by other names
_FIRST_NAMES = {"strength": "head_strength", "scale": "head_scale"}
_WANTED = "wanted a JSON file that `diffsparse hunt` has written"
_BY_HAND = 'one changed by hand goes without its entry "digest"'
_MOST = 2**24  # bytes


@dataclass(frozen=True)
class Preset(Shared):
    """Head-level perturbation guidance: prediction + head_scale * (prediction - perturbed prediction).

    Attributes:
        heads: names such as "5.3" (`diffsparse.guidance.heads`).
        head_strength: how far the heads' maps go toward the target, in [0, 1]. The paper searches at 1 and uses 0.25
            to 1; lower strengths want more heads and leave fewer artefacts.
        head_scale: weight of the guidance, w of the paper: 3 on SD3, 8 on Flux; no effect with branch "uncond".
        kind: the target, a key of `diffsparse.guidance.perturb.KINDS`.
        start: first guided step; an int counts steps, a float is a share of the run.
        stop: end of the guided steps, which is not guided itself; counted as `start`.
        rescale: share in [0, 1] by which the guided prediction gets back the standard deviation of the one without.
        branch: "extra" runs the model once more each step; "uncond" perturbs the unconditional pass, at no cost, and
            its weight is that of classifier-free guidance.
        text: perturb the rows of text in joint attention too.
        models: fingerprints of the transformers that it was made for, by name; empty fits all that have such heads.
        about: how it was found, plain values.

    Raises:
        ConfigError: a value out of its range, or a name that can't be read.

    Examples:
        >>> from diffsparse import Preset, guide
        >>> preset = Preset(("1.0", "0.*"), head_strength=0.5, head_scale=2.0)
        >>> preset.save(folder / "heads.json")
        >>> with guide(pipe, folder / "heads.json"):
        ...     video = pipe("a red ball").frames[0]
    """

    heads: tuple[str, ...]
    head_strength: float = 1.0
    head_scale: float = 3.0
    kind: str = "identity"
    start: int | float = 0.0
    stop: int | float = 1.0
    rescale: float = 0.0
    branch: str = "extra"
    text: bool = False
    models: dict[str, str] = field(default_factory=dict, hash=False)
    about: Values = field(default_factory=dict, compare=False, repr=False)

    _file: ClassVar[str] = "heads.json"
    _kind: ClassVar[str] = "preset"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", check_names(self.heads))
        for name in ("head_strength", "rescale"):
            _check_number(name, getattr(self, name), 1.0)
        _check_number("head_scale", self.head_scale, float("inf"))
        _check_plain(self)
        for name in ("start", "stop"):
            check_amount(name, getattr(self, name))
        for name, known in (("kind", tuple(KINDS)), ("branch", BRANCHES)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise ConfigError(f"{name} wants one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.kind == "self" and self.text:
            raise ConfigError("kind 'self' keeps the text as it is; leave text=False, or choose another kind")

    def __str__(self) -> str:
        branch = f"scale {self.head_scale:g}" if self.branch == "extra" else "the unconditional pass"
        return f"{', '.join(self.heads)}: {self.kind}, strength {self.head_strength:g}, {branch}"

    @property
    def idle(self) -> bool:
        """Whether it changes nothing at all."""
        return self.head_strength == 0 or (self.branch == "extra" and self.head_scale == 0)

    def covers(self, step: int, steps: int | None) -> bool:
        """Whether a step is guided.

        Args:
            step: counted from 0.
            steps: length of the run; None if it is unknown.
        """
        stop = None if steps is None and self.stop == 1.0 else step_of(self.stop, steps)
        return step >= step_of(self.start, steps) and (stop is None or step < stop)

    def of(self, models: dict[str, torch.nn.Module]) -> dict[str, Heads]:
        """The heads of each transformer.

        Raises:
            PlanError: the preset is another model's.
            UnknownNameError: a model has no such head.
        """
        found = fingerprints(models)
        if self.models and self.models != found:
            raise PlanError(
                f"the preset was made for {', '.join(self.models.values())}; got {', '.join(found.values())}. Hunt on "
                "this model (diffsparse hunt), or name its heads yourself"
            )
        return {name: resolve(self.heads, model) for name, model in models.items()}

    def save(self, path: str | Path) -> None:
        """Write the preset as JSON, whole or not at all.

        Raises:
            OutputFileError: the file can't be written.
        """
        write_text(self._text(), path)

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        return self._text().encode()

    def _text(self) -> str:
        return json_text({"diffsparse": "heads", **sealed.seal(asdict(self), version=FORMAT)})

    @classmethod
    def load(cls, path: str | Path) -> Preset:
        """Read a preset. One that was written by hand has no entry "digest".

        Raises:
            InputFileError: no such file.
            PlanError: it is no preset, changed since it was written, of a later release, or its values make no sense.
        """
        text = read_bytes(path, _WANTED, "the preset", _MOST)
        try:
            return cls(**_knobs(text))
        except ValueError as error:
            raise PlanError(f"can't read the preset {path}: {error}; {_WANTED}; {_BY_HAND}") from error

    @classmethod
    def read(cls, given: Preset | str | Path | Sequence[str], **knobs: object) -> Preset:
        """A preset from what users have.

        Args:
            given: a preset, a `.json` file, one name of heads, or several.
            **knobs: fields of the preset; those that are not None overrule what was given.

        Raises:
            ConfigError: a value out of its range, or a name that can't be read.
            InputFileError: no such file.
            PlanError: the file holds no preset.
        """
        if isinstance(given, str | Path) and str(given).endswith(".json"):
            given = cls.load(given)
        if not isinstance(given, Preset):
            given = cls(check_names([str(given)] if isinstance(given, str | Path) else given))
        overruling: Values = {name: value for name, value in knobs.items() if value is not None}
        return replace(given, **overruling)


def _knobs(text: bytes) -> Values:
    """The knobs in a preset's file, under the names that they have now.

    Raises:
        ValueError: it is no preset, or holds other entries.
    """
    values = sealed.plain(text)
    if values.pop("diffsparse", None) != "heads":
        raise ValueError('it has no entry "diffsparse": "heads"')
    sealed.check_format({"format": FORMAT, **values}, "preset", "hunt again", FORMAT)
    if "digest" in values:
        values = sealed.unseal(values)
    values.pop("format", None)
    for first, name in _FIRST_NAMES.items():
        if first in values and name not in values:
            values[name] = values.pop(first)
    unknown = sorted(values.keys() - {f.name for f in fields(Preset)})
    if unknown:
        raise ValueError(f"it has the strange entries {', '.join(unknown)}")
    heads = values.get("heads")
    if not isinstance(heads, list) or not all(isinstance(head, str) for head in heads):
        raise ValueError(f"heads wants a list of names; got {heads!r}")
    return {**values, "heads": tuple(heads)}


def _check_plain(preset: Preset) -> None:
    """Raise ConfigError unless the values without a range of their own are of their types."""
    names = [*preset.models, *preset.models.values()] if isinstance(preset.models, dict) else [None]
    wanted = {
        "text": ("True or False", isinstance(preset.text, bool)),
        "models": ("a fingerprint for each name", all(isinstance(name, str) for name in names)),
        "about": ("a dictionary of plain values", isinstance(preset.about, dict)),
    }
    for name, (what, right) in wanted.items():
        if not right:
            raise ConfigError(f"{name} wants {what}; got {getattr(preset, name)!r}")


def _check_number(name: str, value: object, most: float) -> None:
    top = min(most, sys.float_info.max)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= top:
        wanted = f"a number in [0, {most:g}]" if most < float("inf") else "a finite number of at least 0"
        raise ConfigError(f"{name} wants {wanted}; got {value!r}")
