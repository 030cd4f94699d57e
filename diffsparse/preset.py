"""Which heads to perturb, how, and how hard: one value, and a small JSON file to share it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from diffsparse.errors import ConfigError, InputFileError, PlanError
from diffsparse.files import whole
from diffsparse.heads import Heads, check_names, resolve
from diffsparse.perturb import KINDS
from diffsparse.plan import fingerprints
from diffsparse.schedule import check_amount
from diffsparse.schedule import resolve as step_of

BRANCHES = ("extra", "uncond")


@dataclass(frozen=True)
class Preset:
    """Head-level perturbation guidance: prediction + scale * (prediction - perturbed prediction).

    heads: names such as "5.3" (`diffsparse.heads`).
    strength: how far the heads' maps go toward the target, in [0, 1]. The paper searches at 1 and uses 0.25 to 1;
        lower strengths want more heads and leave fewer artefacts.
    scale: weight of the guidance, w of the paper: 3 on SD3, 8 on Flux; of no effect with branch "uncond".
    kind: the target, a key of `diffsparse.perturb.KINDS`.
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
        for name in ("start", "stop"):
            check_amount(name, getattr(self, name))
        for name, known in (("kind", tuple(KINDS)), ("branch", BRANCHES)):
            if getattr(self, name) not in known:
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
        with whole(path) as temporary:
            temporary.write_text(json.dumps({"diffsparse": "heads", **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Preset:
        """Read a preset.

        Raises:
            InputFileError: no such file, or no preset. ConfigError: its values make no sense.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.pop("diffsparse", None) != "heads":
                raise ValueError('it has no entry "diffsparse": "heads"')
            known = {f.name for f in fields(cls)}
            strange = sorted(values.keys() - known)
            if strange:
                raise ValueError(f"it has the strange entries {', '.join(strange)}")
            return cls(**{**values, "heads": tuple(values["heads"])})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputFileError(
                f"can't read the preset {path}: {error}; wanted a JSON file that `diffsparse hunt` has written"
            ) from error

    @classmethod
    def read(cls, given: Preset | str | Path | Sequence[str], **knobs: Any) -> Preset:
        """A preset from what users have: one, a `.json` file, or names of heads; `knobs` that are not None overrule."""
        if isinstance(given, str | Path) and str(given).endswith(".json"):
            given = cls.load(given)
        if not isinstance(given, Preset):
            given = cls(check_names([str(given)] if isinstance(given, str | Path) else given))
        return replace(given, **{name: value for name, value in knobs.items() if value is not None})


def _check_number(name: str, value: Any, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or value == float("inf"):
        wanted = f"a number in [0, {most:g}]" if most < float("inf") else "a number of at least 0"
        raise ConfigError(f"{name} wants {wanted}; got {value!r}")
