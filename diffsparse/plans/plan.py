"""What an offline search found: a JSON header and tensors in one safetensors file, tied to a model and a layout.

Plans come from unknown sources: what is loaded is checked for its version, its digest, and each value against the
others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from diffsparse.errors import PlanError
from diffsparse.orders.layout import Layout
from diffsparse.plans import sealed
from diffsparse.plans.sealed import Values
from diffsparse.wrappers import class_of

REMEDY = "wanted a file that `diffsparse calibrate` has written; calibrate again"
_LONGEST = 2**20  # tokens along an axis
_DTYPES = (torch.uint8, torch.float32)


@dataclass(frozen=True, eq=False)
class Plan:
    """Orders, masks or patterns for each attention layer of a model at one layout.

    Attributes:
        strategy: the strategy that runs on it, such as "paro".
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
    settings: Values
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
                raise PlanError(f"the plan's {what} make no sense; {REMEDY}")
        for name, tensor in self.tensors.items():
            if tensor.dtype not in _DTYPES:
                raise PlanError(f"the plan's tensor {name!r} is of {tensor.dtype}, which no plan holds; {REMEDY}")
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise PlanError(f"the plan's tensor {name!r} holds NaN or infinity; {REMEDY}")

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits that identify the plan."""
        return sealed.digest(self._header(), self.tensors)[:12]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Plan({self.strategy!r}, {self.layout}, {self.digest})"

    def _header(self) -> Values:
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
            InputFileError: no such file, or it can't be opened.
            PlanError: it is no plan, truncated, changed since it was written, of a later release, or its values make
                no sense.
        """
        header, tensors = sealed.read(path, "plan", REMEDY)
        layout = header.pop("layout", None)
        if header.keys() != {"strategy", "models", "settings"} or not isinstance(layout, dict):
            raise PlanError(f"{path} is no plan; {REMEDY}")
        try:
            return cls(layout=Layout.of(layout), tensors=tensors, **header)
        except (TypeError, ValueError) as error:
            raise PlanError(f"{path}: the plan's layout makes no sense ({error}); {REMEDY}") from error

    def check_models(self, models: Mapping[str, torch.nn.Module]) -> None:
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

        Args:
            model: the transformer's name in the pipeline.
            layer: the attention module's name in the transformer.
            what: such as "masks".

        Raises:
            PlanError: the plan has none.
        """
        name = f"{model}.{layer}.{what}"
        if name not in self.tensors:
            raise PlanError(f"the plan holds no {name!r}; it was made for another model, or not to the end")
        return self.tensors[name]


def fingerprints(models: Mapping[str, torch.nn.Module]) -> dict[str, str]:
    """Class and a digest of the configuration of each model; weights, LoRAs and dtypes don't count."""
    return {name: _fingerprint(model) for name, model in models.items()}


def _fingerprint(model: torch.nn.Module) -> str:
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{class_of(model).__name__}:{digest}"


def _names(models: dict[str, str]) -> str:
    return ", ".join(f"{name} {fingerprint}" for name, fingerprint in models.items())


def _is_plain(value: object) -> bool:
    """Whether a value means the same when it was written as JSON and read again."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _is_grid(layout: Layout) -> bool:
    """Whether a layout counts video tokens, and nothing else."""
    edges = (layout.frames, layout.height, layout.width)
    return all(type(edge) is int and 0 < edge <= _LONGEST for edge in edges) and layout == layout.grid
