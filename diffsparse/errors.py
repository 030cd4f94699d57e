"""The exception tree: one root, one child for each way in which input can be wrong."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from diffsparse_kernels.errors import BackendError, DiffsparseError, KernelInputError, NoKernelError

__all__ = [
    "BackendError",
    "ConfigError",
    "DenseFallbackError",
    "DiffsparseError",
    "InputFileError",
    "KernelInputError",
    "NoKernelError",
    "OutputFileError",
    "PlanError",
    "UnknownNameError",
    "UnsupportedModelError",
    "closest",
]


class ConfigError(DiffsparseError, ValueError):
    """A knob outside its range, or knobs that contradict each other."""


class UnsupportedModelError(DiffsparseError, TypeError):
    """Nothing in the given object can be accelerated."""


class DenseFallbackError(DiffsparseError, RuntimeError):
    """With `strict=True`: a call that should have been sparse would have run dense."""

    @classmethod
    def of(cls, layer: str, step: int, reason: str, *, ran: bool = False) -> DenseFallbackError:
        """The error of one attention call.

        Args:
            layer: name of the attention module.
            step: denoising step.
            reason: why it can't be sparse.
            ran: the call has already run.
        """
        did = "ran" if ran else "would run"
        return cls(f"layer {layer!r} at step {step} {did} dense ({reason}); apply with strict=False to allow it")


class InputFileError(DiffsparseError, OSError):
    """A file to be read is missing, unreadable or malformed."""


class OutputFileError(DiffsparseError, OSError):
    """A file or folder can't be written."""


class PlanError(DiffsparseError, ValueError):
    """A plan that doesn't belong to this model, layout or strategy, or whose values make no sense."""


class UnknownNameError(DiffsparseError, LookupError):
    """A name that is in no table: the message lists the known ones, the closest first."""


def closest(name: str, known: Iterable[str]) -> str:
    """The known names, those that look like `name` first."""
    rest = sorted(known)
    near = get_close_matches(name, rest, n=3)
    return ", ".join(near + [other for other in rest if other not in near])
