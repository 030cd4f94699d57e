"""Strategies that run on a plan: how it is checked, loaded, saved and shared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from diffsparse.errors import ConfigError, PlanError
from diffsparse.orders.layout import Layout
from diffsparse.plans.hub import Shared
from diffsparse.plans.plan import REMEDY, Plan
from diffsparse.plans.sealed import Values
from diffsparse.strategies.base import Models, Strategy
from diffsparse.wrappers import heads_of, plain_path

FILE = "plan.safetensors"
Check = Callable[[str, Any], None]  # takes a setting's name and value; raises ConfigError


def one_of(*known: object) -> Check:
    """A check: one of `known`, of the same type."""

    def check(name: str, value: object) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in known):
            raise ConfigError(f"{name} wants one of {', '.join(map(str, known))}; got {value!r}")

    return check


def list_of(check_one: Check, most: int) -> Check:
    """A check: a list of 1 to `most` values that pass `check_one`."""

    def check(name: str, value: object) -> None:
        if not isinstance(value, list) or not 0 < len(value) <= most:
            raise ConfigError(f"{name} wants a list of 1 to {most} values; got {value!r}")
        for one in value:
            check_one(name, one)

    return check


def optional(check_one: Check) -> Check:
    """A check: None, or what passes `check_one`."""
    return lambda name, value: None if value is None else check_one(name, value)


class Part(NamedTuple):
    """What one tensor of a layer has to be.

    Attributes:
        dtype: of its numbers.
        shape: None stands for the heads, which all tensors of a layer have in common, and ... for one or more.
        below: values are whole numbers below this; None: they are finite numbers from 0 on.
        needed: whether every layer must have it.
    """

    dtype: torch.dtype
    shape: tuple[int | EllipsisType | None, ...]
    below: int | None = None
    needed: bool = True

    def heads(self, tensor: Tensor) -> int:
        """The number of heads of a tensor that is like this.

        Raises:
            ValueError: it is not.
        """
        fits = tensor.ndim == len(self.shape) and all(
            have == want if isinstance(want, int) else have > 0
            for have, want in zip(tensor.shape, self.shape, strict=True)
        )
        if tensor.dtype != self.dtype or not fits:
            sizes = "x".join("heads" if size is None else "any" if size is ... else str(size) for size in self.shape)
            raise ValueError(
                f"wants {self.dtype} {sizes}; got {tensor.dtype} {'x'.join(map(str, tensor.shape)) or 'one number'}"
            )
        if tensor.numel() and (tensor.min() < 0 or (self.below is not None and tensor.max() >= self.below)):
            most = "" if self.below is None else f" to {self.below - 1}"
            raise ValueError(f"wants numbers from 0{most}; got {tensor.min()} to {tensor.max()}")
        return tensor.shape[self.shape.index(None)]


@dataclass(frozen=True, repr=False)
class Planned(Strategy, Shared):
    """A strategy that is a plan: how it is loaded, checked, saved and shared.

    Subclasses say whose plans they read in `_plan_of`, which settings these need in `_needed`, what settings have to be
    in `_settings`, and what tensors, in `_parts`.
    """

    plan: Plan

    _file: ClassVar[str] = FILE
    _kind: ClassVar[str] = "plan"
    _plan_of: ClassVar[str]
    _needed: ClassVar[frozenset[str]]

    def __post_init__(self) -> None:
        if self.plan.strategy != self._plan_of:
            raise PlanError(f"wanted a plan of strategy {self._plan_of!r}; got one of {self.plan.strategy!r}")
        self._check_settings()
        self._check_tensors()
        object.__setattr__(self, "sparsity", float(self.plan.settings["sparsity"]))
        object.__setattr__(self, "block", int(self.plan.settings["block"]))

    def _check_settings(self) -> None:
        """All settings that are needed are there, none is unknown, and each makes sense."""
        settings, known = self.plan.settings, self._settings()
        missing, strange = self._needed - settings.keys(), settings.keys() - known.keys()
        for trouble, names in (("lacks", missing), ("has the strange", strange)):
            if names:
                raise PlanError(f"the plan {trouble} settings {', '.join(map(repr, sorted(names)))}; {REMEDY}")
        for name, value in settings.items():
            try:
                known[name](name, value)
            except ConfigError as error:
                raise PlanError(f"the plan's settings make no sense: {error}; {REMEDY}") from error

    def _check_tensors(self) -> None:
        """Every tensor is a known part of a layer, every layer has the parts it needs, and all of them fit together."""
        parts, layers = self._parts(self.plan.settings, self.plan.layout), dict[str, dict[str, int]]()
        for name, tensor in self.plan.tensors.items():
            layer, _, what = name.rpartition(".")
            if not layer or what not in parts:
                raise PlanError(f"the plan's tensor {name!r} is none of {', '.join(parts)} of a layer; {REMEDY}")
            try:
                layers.setdefault(layer, {})[what] = parts[what].heads(tensor)
            except ValueError as error:
                raise PlanError(f"the plan's tensor {name!r} {error}; {REMEDY}") from error
        if not layers:
            raise PlanError(f"the plan holds no tensors; {REMEDY}")
        for layer, found in layers.items():
            missing = [what for what, part in parts.items() if part.needed and what not in found]
            if missing:
                raise PlanError(f"the plan lacks {', '.join(missing)} of {layer!r}; {REMEDY}")
            if len(set(found.values())) > 1:
                raise PlanError(f"the plan's tensors of {layer!r} differ in their heads; {REMEDY}")

    @staticmethod
    @abstractmethod
    def _settings() -> dict[str, Check]:
        """What each setting has to be, by its name."""

    @abstractmethod
    def _parts(self, settings: Values, layout: Layout) -> dict[str, Part]:
        """The tensors of a layer, by the end of their names."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.plan.settings}, plan {self.plan.digest})"

    def check(self, models: Models) -> None:
        """Called by `diffsparse.apply`: raise PlanError if the plan is another model's, or of other heads."""
        self.plan.check_models(models)
        modules = {
            f"{name}.{plain_path(path)}": x for name, model in models.items() for path, x in model.named_modules()
        }
        parts = self._parts(self.plan.settings, self.plan.layout)
        for name, tensor in self.plan.tensors.items():
            layer, _, what = name.rpartition(".")
            have, want = parts[what].heads(tensor), heads_of(modules.get(layer))
            if want is not None and have != want:
                raise PlanError(f"the plan has {have} heads in {layer!r}, where the model has {want}; {REMEDY}")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The strategy of a plan file.

        Raises:
            InputFileError: no such file.
            PlanError: it is no plan that makes sense, or another strategy's.
        """
        return cls(Plan.load(path))

    def save(self, path: str | Path) -> None:
        """Write the plan, whole or not at all.

        Raises:
            OutputFileError: the file can't be written.
        """
        self.plan.save(path)

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        return self.plan.to_bytes()


def group_of(step: int, steps: int | None, groups: int) -> int:
    """The group, out of `groups` equal parts of the run, that a step belongs to; the first if `steps` is unknown."""
    return min(step * groups // steps, groups - 1) if steps else 0
