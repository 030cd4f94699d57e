"""What an offline search found: a JSON header and tensors in one safetensors file, tied to a model and a layout.

Plans are data from strangers: what is loaded is checked for its version, its digest, and each value against the others.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from diffsparse import sealed
from diffsparse.errors import ConfigError, InputFileError, PlanError
from diffsparse.layout import Layout
from diffsparse.wrappers import class_of, plain_path

FILE = "plan.safetensors"
_REMEDY = "wanted a file that `diffsparse calibrate` has written; calibrate again"
_LONGEST = 2**20  # tokens along an axis
_DTYPES = (torch.uint8, torch.float32)


@dataclass(frozen=True, eq=False)
class Plan:
    """Orders, masks or patterns for each attention layer of a model at one layout.

    strategy: whose plan it is, such as "paro".
    models: fingerprint of each transformer of the pipeline, by its name there.
    layout: of the video tokens that the search saw.
    settings: the knobs of the search, plain values.
    tensors: "transformer.blocks.0.attn1.masks" and so on: model, layer, what.

    Raises:
        PlanError: values of other types, or a tensor that holds NaN or infinity.
    """

    strategy: str
    models: dict[str, str]
    layout: Layout
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        names = [self.strategy, *self.models, *self.models.values()] if isinstance(self.models, dict) else [None]
        wanted = {
            "strategy and models": all(isinstance(name, str) for name in names),
            "layout": isinstance(self.layout, Layout) and _is_grid(self.layout),
            "settings": isinstance(self.settings, dict) and _is_plain(self.settings),
        }
        for what, right in wanted.items():
            if not right:
                raise PlanError(f"the plan's {what} make no sense; {_REMEDY}")
        for name, tensor in self.tensors.items():
            if tensor.dtype not in _DTYPES:
                raise PlanError(f"the plan's tensor {name!r} is of {tensor.dtype}, which no plan holds; {_REMEDY}")
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise PlanError(f"the plan's tensor {name!r} holds NaN or infinity; {_REMEDY}")

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits that tell this plan from others."""
        return sealed.digest(self._header(), self.tensors)[:12]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Plan({self.strategy!r}, {self.layout}, {self.digest})"

    def _header(self) -> dict[str, Any]:
        parts = {"strategy": self.strategy, "models": self.models, "layout": asdict(self.layout)}
        return {**parts, "settings": self.settings}

    def save(self, path: str | Path) -> None:
        """Write the plan, whole or not at all.

        Raises:
            OutputFileError: the file can't be written.
        """
        sealed.write(path, self._header(), self.tensors)

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        return sealed.to_bytes(self._header(), self.tensors)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            InputFileError: no such file, or it can't be opened. PlanError: it is no plan, truncated, changed since it
            was written, of a later release, or its values make no sense.
        """
        header, tensors = sealed.read(path, "plan", _REMEDY)
        layout = header.pop("layout", None)
        if header.keys() != {"strategy", "models", "settings"} or not isinstance(layout, dict):
            raise PlanError(f"{path} is no plan; {_REMEDY}")
        try:
            return cls(layout=Layout(**layout), tensors=tensors, **header)
        except TypeError as error:
            raise PlanError(f"{path}: the plan's layout makes no sense ({error}); {_REMEDY}") from error

    def check_models(self, models: dict[str, torch.nn.Module]) -> None:
        """Raise PlanError unless the plan was made for models of the same classes and configurations."""
        found = fingerprints(models)
        if found != self.models:
            raise PlanError(
                f"the plan was made for {_names(self.models)}; got {_names(found)}. Calibrate this model "
                "(diffsparse calibrate)"
            )

    def check_layout(self, layout: Layout) -> None:
        """Raise PlanError unless the video has the size that the search saw; text may have any length."""
        if layout.grid != self.layout:
            raise PlanError(
                f"the plan's blocks are those of {self.layout}; got {layout.grid}. Calibrate at this size and length"
            )

    def part(self, model: str, layer: str, what: str) -> Tensor:
        """One tensor of one layer.

        Raises:
            PlanError: the plan has none.
        """
        name = f"{model}.{layer}.{what}"
        if name not in self.tensors:
            raise PlanError(f"the plan holds no {name!r}; it was made for another model, or not to the end")
        return self.tensors[name]


def fingerprints(models: dict[str, torch.nn.Module]) -> dict[str, str]:
    """Class and a digest of the configuration of each model; weights, LoRAs and dtypes don't count."""
    return {name: _fingerprint(model) for name, model in models.items()}


def _fingerprint(model: torch.nn.Module) -> str:
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{class_of(model).__name__}:{digest}"


def _heads_of(attention: torch.nn.Module | None) -> int | None:
    counts = (getattr(attention, name, None) for name in ("heads", "num_heads", "n_heads"))
    return next((count for count in counts if type(count) is int), None)


def _names(models: dict[str, str]) -> str:
    return ", ".join(f"{name} {fingerprint}" for name, fingerprint in models.items())


def _is_plain(value: Any) -> bool:
    """Whether a value means the same when it was written as JSON and read again."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _is_grid(layout: Layout) -> bool:
    """Whether a layout counts video tokens, and nothing else."""
    edges = (layout.frames, layout.height, layout.width)
    return all(type(edge) is int and 0 < edge <= _LONGEST for edge in edges) and layout == layout.grid


Check = Callable[[str, Any], None]  # takes a setting's name and value; raises ConfigError


def one_of(*known: Any) -> Check:
    """A check: one of `known`, of the same type."""

    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in known):
            raise ConfigError(f"{name} wants one of {', '.join(map(str, known))}; got {value!r}")

    return check


def list_of(check_one: Check, most: int) -> Check:
    """A check: a list of 1 to `most` values that pass `check_one`."""

    def check(name: str, value: Any) -> None:
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

    shape: None stands for the heads, which all tensors of a layer have in common, and ... for one or more.
    below: values are whole numbers below this; without it they are finite numbers from 0 on.
    needed: by every layer.
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
class Planned(ABC):
    """A strategy that is a plan: how it is loaded, checked, saved and shared.

    Subclasses say whose plans they read in `_plan_of`, which settings these need in `_needed`, what settings have to be
    in `_settings`, and what tensors, in `_parts`.
    """

    plan: Plan

    _plan_of: ClassVar[str]
    _needed: ClassVar[frozenset[str]]

    def __post_init__(self) -> None:
        if self.plan.strategy != self._plan_of:
            raise PlanError(f"wanted a plan of strategy {self._plan_of!r}; got one of {self.plan.strategy!r}")
        self._check_settings()
        self._check_tensors()

    def _check_settings(self) -> None:
        """All settings that are needed are there, none is strange, and each makes sense."""
        settings, known = self.plan.settings, self._settings()
        missing, strange = self._needed - settings.keys(), settings.keys() - known.keys()
        for trouble, names in (("lacks", missing), ("has the strange", strange)):
            if names:
                raise PlanError(f"the plan {trouble} settings {', '.join(map(repr, sorted(names)))}; {_REMEDY}")
        for name, value in settings.items():
            try:
                known[name](name, value)
            except ConfigError as error:
                raise PlanError(f"the plan's settings make no sense: {error}; {_REMEDY}") from error

    def _check_tensors(self) -> None:
        """Every tensor is a known part of a layer, every layer has the parts it needs, and all of them fit together."""
        parts, layers = self._parts(self.plan.settings, self.plan.layout), dict[str, dict[str, int]]()
        for name, tensor in self.plan.tensors.items():
            layer, _, what = name.rpartition(".")
            if not layer or what not in parts:
                raise PlanError(f"the plan's tensor {name!r} is none of {', '.join(parts)} of a layer; {_REMEDY}")
            try:
                layers.setdefault(layer, {})[what] = parts[what].heads(tensor)
            except ValueError as error:
                raise PlanError(f"the plan's tensor {name!r} {error}; {_REMEDY}") from error
        if not layers:
            raise PlanError(f"the plan holds no tensors; {_REMEDY}")
        for layer, found in layers.items():
            missing = [what for what, part in parts.items() if part.needed and what not in found]
            if missing:
                raise PlanError(f"the plan lacks {', '.join(missing)} of {layer!r}; {_REMEDY}")
            if len(set(found.values())) > 1:
                raise PlanError(f"the plan's tensors of {layer!r} differ in their heads; {_REMEDY}")

    @staticmethod
    @abstractmethod
    def _settings() -> dict[str, Check]:
        """What each setting has to be, by its name."""

    @abstractmethod
    def _parts(self, settings: dict[str, Any], layout: Layout) -> dict[str, Part]:
        """The tensors of a layer, by the end of their names."""

    @property
    def sparsity(self) -> float:
        """Share of blocks that the search was asked to drop."""
        return float(self.plan.settings["sparsity"])

    @property
    def block(self) -> int:
        """Edge of a block in tokens."""
        return int(self.plan.settings["block"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.plan.settings}, plan {self.plan.digest})"

    def check(self, models: dict[str, torch.nn.Module]) -> None:
        """Called by `diffsparse.apply`: raise PlanError if the plan is another model's, or of other heads."""
        self.plan.check_models(models)
        modules = {
            f"{name}.{plain_path(path)}": x for name, model in models.items() for path, x in model.named_modules()
        }
        parts = self._parts(self.plan.settings, self.plan.layout)
        for name, tensor in self.plan.tensors.items():
            layer, _, what = name.rpartition(".")
            have, want = parts[what].heads(tensor), _heads_of(modules.get(layer))
            if want is not None and have != want:
                raise PlanError(f"the plan has {have} heads in {layer!r}, where the model has {want}; {_REMEDY}")

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What the search found, in a few words by name."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The strategy of a plan file.

        Raises:
            InputFileError: no such file. PlanError: it is no plan that makes sense, or another strategy's.
        """
        return cls(Plan.load(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the plan as `plan.safetensors` into a folder."""
        self.plan.save(Path(folder) / FILE)

    @classmethod
    def from_pretrained(cls, name: str | Path, **download: Any) -> Self:
        """Read a plan from a folder, or else from a repository of the Hugging Face hub.

        Args:
            name: folder, or repository such as "someone/wan-plan".
            download: for `huggingface_hub.hf_hub_download`: revision, token, cache_dir, ...

        Raises:
            InputFileError: there is no plan.
        """
        if Path(name).is_dir():
            return cls.load(Path(name) / FILE)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return cls.load(hf_hub_download(str(name), FILE, **download))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            if isinstance(error, InputFileError):
                raise
            raise InputFileError(f"no folder {str(name)!r}, and no such plan on the hub: {error}") from error

    def push_to_hub(self, name: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the plan to a repository of the hub, made if it is missing; returns the address of the commit."""
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        repository = hub.create_repo(name, private=private, exist_ok=True).repo_id
        return str(hub.upload_file(path_or_fileobj=self.plan.to_bytes(), path_in_repo=FILE, repo_id=repository))
