"""Which heads to perturb, how, and how hard: one value, and a small JSON file to share it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from diffsparse.errors import ConfigError, InputFileError, PlanError
from diffsparse.files import read_bytes, write_json
from diffsparse.guidance.heads import Heads, check_names, resolve
from diffsparse.guidance.perturb import KINDS
from diffsparse.plans import sealed
from diffsparse.plans.plan import fingerprints
from diffsparse.schedule import check_amount
from diffsparse.schedule import resolve as step_of

BRANCHES = ("extra", "uncond")
_REMEDY = 'wanted a JSON file that `diffsparse hunt` has written; one changed by hand goes without its entry "digest"'
_MOST = 2**24  # bytes


@dataclass(frozen=True)
class Preset:
    """Head-level perturbation guidance: prediction + scale * (prediction - perturbed prediction).

    heads: names such as "5.3" (`diffsparse.guidance.heads`).
    strength: how far the heads' maps go toward the target, in [0, 1]. The paper searches at 1 and uses 0.25 to 1;
        lower strengths want more heads and leave fewer artefacts.
    scale: weight of the guidance, w of the paper: 3 on SD3, 8 on Flux; of no effect with branch "uncond".
    kind: the target, a key of `diffsparse.guidance.perturb.KINDS`.
    start, stop: the steps that are guided, start included, stop not; ints count steps, floats are shares of the run.
    rescale: share in [0, 1] by which the guided prediction gets back the standard deviation of the one without.
    branch: "extra" runs the model once more each step; "uncond" perturbs the unconditional pass, at no cost, and its
        weight is that of classifier-free guidance.
    text: perturb the rows of text in joint attention too.
    models: fingerprints of the transformers that it was made for, by name; empty fits all that have such heads.
    about: how it was found, plain values.

    Raises:
        ConfigError: a value out of its range, or a name that can't be read.
    """

    heads: tuple[str, ...]
    strength: float = 1.0
    scale: float = 3.0
    kind: str = "identity"
    start: int | float = 0.0
    stop: int | float = 1.0
    rescale: float = 0.0
    branch: str = "extra"
    text: bool = False
    models: dict[str, str] = field(default_factory=dict, hash=False)
    about: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", check_names(self.heads))
        for name in ("strength", "rescale"):
            _check_number(name, getattr(self, name), 1.0)
        _check_number("scale", self.scale, float("inf"))
        _check_plain(self)
        for name in ("start", "stop"):
            check_amount(name, getattr(self, name))
        for name, known in (("kind", tuple(KINDS)), ("branch", BRANCHES)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise ConfigError(f"{name} wants one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.kind == "self" and self.text:
            raise ConfigError("kind 'self' keeps the text as it is; leave text=False, or choose another kind")

    def __str__(self) -> str:
        branch = f"scale {self.scale:g}" if self.branch == "extra" else "the unconditional pass"
        return f"{', '.join(self.heads)}: {self.kind}, strength {self.strength:g}, {branch}"

    @property
    def idle(self) -> bool:
        """Whether it changes nothing at all."""
        return self.strength == 0 or (self.branch == "extra" and self.scale == 0)

    def covers(self, step: int, steps: int | None) -> bool:
        """Whether `step` (of `steps`, None: unknown) is guided."""
        stop = None if steps is None and self.stop == 1.0 else step_of(self.stop, steps)
        return step >= step_of(self.start, steps) and (stop is None or step < stop)

    def of(self, models: dict[str, torch.nn.Module]) -> dict[str, Heads]:
        """The heads of each transformer.

        Raises:
            PlanError: the preset is another model's. UnknownNameError: a model has no such head.
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
        write_json({"diffsparse": "heads", **sealed.seal(asdict(self))}, path)

    @classmethod
    def load(cls, path: str | Path) -> Preset:
        """Read a preset. One that was written by hand has no entry "digest".

        Raises:
            InputFileError: no such file. PlanError: it is no preset, changed since it was written, of a later release,
            or its values make no sense.
        """
        try:
            text = read_bytes(path, most=_MOST)
        except InputFileError as error:
            raise InputFileError(f"can't read the preset {path}: {error}; {_REMEDY}") from error
        try:
            values = sealed.plain(text)
            if values.pop("diffsparse", None) != "heads":
                raise ValueError('it has no entry "diffsparse": "heads"')
            sealed.check_format({"format": sealed.FORMAT, **values}, "preset", "hunt again")
            if "digest" in values:
                values = sealed.unseal(values)
            values.pop("format", None)
            strange = sorted(values.keys() - {f.name for f in fields(cls)})
            if strange:
                raise ValueError(f"it has the strange entries {', '.join(strange)}")
            heads = values.get("heads")
            if not isinstance(heads, list) or not all(isinstance(head, str) for head in heads):
                raise ValueError(f"heads wants a list of names; got {heads!r}")
            return cls(**{**values, "heads": tuple(heads)})
        except ValueError as error:
            raise PlanError(f"can't read the preset {path}: {error}; {_REMEDY}") from error

    @classmethod
    def read(cls, given: Preset | str | Path | Sequence[str], **knobs: Any) -> Preset:
        """A preset from what users have: one, a `.json` file, or names of heads; `knobs` that are not None overrule."""
        if isinstance(given, str | Path) and str(given).endswith(".json"):
            given = cls.load(given)
        if not isinstance(given, Preset):
            given = cls(check_names([str(given)] if isinstance(given, str | Path) else given))
        return replace(given, **{name: value for name, value in knobs.items() if value is not None})


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


def _check_number(name: str, value: Any, most: float) -> None:
    top = min(most, sys.float_info.max)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= top:
        wanted = f"a number in [0, {most:g}]" if most < float("inf") else "a number of at least 0"
        raise ConfigError(f"{name} wants {wanted}; got {value!r}")
