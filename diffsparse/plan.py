"""What an offline search found: a JSON header and tensors in one safetensors file, tied to a model and a layout."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from diffsparse.errors import InputFileError, PlanError
from diffsparse.files import whole
from diffsparse.layout import Layout
from diffsparse.wrappers import class_of

FILE = "plan.safetensors"
_KEY = "diffsparse"


@dataclass(frozen=True, eq=False)
class Plan:
    """Orders, masks or patterns for each attention layer of a model at one layout.

    strategy: whose plan it is, such as "paro".
    models: fingerprint of each transformer of the pipeline, by its name there.
    layout: of the video tokens that the search saw.
    settings: the knobs of the search, plain values.
    tensors: "transformer.blocks.0.attn1.masks" and so on: model, layer, what.

    Raises:
        PlanError: a tensor holds NaN or infinity.
    """

    strategy: str
    models: dict[str, str]
    layout: Layout
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise PlanError(f"the plan's tensor {name!r} holds NaN or infinity; calibrate again")

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits that tell this plan from others."""
        return hashlib.sha256(self._header().encode() + save(self._sorted())).hexdigest()[:12]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Plan({self.strategy!r}, {self.layout}, {self.digest})"

    def _sorted(self) -> dict[str, Tensor]:
        return {name: self.tensors[name].contiguous() for name in sorted(self.tensors)}

    def _header(self) -> str:
        parts = {"strategy": self.strategy, "models": self.models, "layout": asdict(self.layout)}
        return json.dumps({**parts, "settings": self.settings}, sort_keys=True)

    def save(self, path: str | Path) -> None:
        """Write the plan, whole or not at all.

        Raises:
            OutputFileError: the file can't be written.
        """
        with whole(path) as temporary:
            save_file(self._sorted(), temporary, metadata={_KEY: self._header()})

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            InputFileError: no such file, or it is truncated or no plan. PlanError: its values make no sense.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layout = Layout(**header.pop("layout"))
            return cls(layout=layout, tensors=tensors, **header)
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputFileError(
                f"can't read the plan {path}: {error}; wanted a file that `diffsparse calibrate` has written"
            ) from error

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


def _names(models: dict[str, str]) -> str:
    return ", ".join(f"{name} {fingerprint}" for name, fingerprint in models.items())


@dataclass(frozen=True, repr=False)
class Planned(ABC):
    """A strategy that is a plan: how it is loaded, saved and shared.

    Subclasses say whose plans they read in `_plan_of`, which settings these have in `_settings`, and of how many kinds
    the numbers in their tensors are in `_kinds`.
    """

    plan: Plan

    _plan_of: ClassVar[str]
    _settings: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.plan.strategy != self._plan_of:
            raise PlanError(f"wanted a plan of strategy {self._plan_of!r}; got one of {self.plan.strategy!r}")
        missing = [name for name in self._settings if name not in self.plan.settings]
        if missing:
            raise PlanError(f"the plan lacks the settings {', '.join(missing)}; calibrate again")
        for what, kinds in self._kinds().items():
            for name, tensor in self.plan.tensors.items():
                if name.endswith(f".{what}") and int(tensor.max()) >= kinds:
                    raise PlanError(f"the plan's tensor {name!r} holds numbers above {kinds - 1}; calibrate again")

    @abstractmethod
    def _kinds(self) -> dict[str, int]:
        """Tensors by the end of their names, and the number of kinds that their values count."""

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
        """Called by `diffsparse.apply`: raise PlanError if the plan is another model's."""
        self.plan.check_models(models)

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What the search found, in a few words by name."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The strategy of a plan file.

        Raises:
            InputFileError: no such file, or it is truncated or no plan. PlanError: another strategy's plan.
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
        data = save(self.plan._sorted(), metadata={_KEY: self.plan._header()})
        return str(hub.upload_file(path_or_fileobj=data, path_in_repo=FILE, repo_id=repository))
