"""Block-sparse attention kernels: they know torch, and nothing of Diffusers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsparse_kernels.backend.emulated import incoherence, quantise
    from diffsparse_kernels.errors import BackendError, DiffsparseError, KernelInputError, NoKernelError
    from diffsparse_kernels.functional import (
        attention,
        attention_with_mass,
        block_mass,
        block_sparse_attention,
        break_even,
        default_block,
        kernel_for,
        quantised_attention,
    )
    from diffsparse_kernels.lists import BlockLists
    from diffsparse_kernels.masks import Boxes
    from diffsparse_kernels.means import block_means, means_mass, spread
    from diffsparse_kernels.merge import merge_attention
    from diffsparse_kernels.registry import Choice, backend_for, backends, forget_measurements, record
    from diffsparse_kernels.select import select_heads, select_mass, select_rows

__all__ = [
    "BackendError",
    "BlockLists",
    "Boxes",
    "Choice",
    "DiffsparseError",
    "KernelInputError",
    "NoKernelError",
    "attention",
    "attention_with_mass",
    "backend_for",
    "backends",
    "block_mass",
    "block_means",
    "block_sparse_attention",
    "break_even",
    "default_block",
    "forget_measurements",
    "incoherence",
    "kernel_for",
    "means_mass",
    "merge_attention",
    "quantise",
    "quantised_attention",
    "record",
    "select_heads",
    "select_mass",
    "select_rows",
    "spread",
]

_HOME = {
    "errors": ("BackendError", "DiffsparseError", "KernelInputError", "NoKernelError"),
    "lists": ("BlockLists",),
    "masks": ("Boxes",),
    "means": ("block_means", "means_mass", "spread"),
    "merge": ("merge_attention",),
    "registry": ("Choice", "backend_for", "backends", "forget_measurements", "record"),
    "backend.emulated": ("incoherence", "quantise"),
    "select": ("select_heads", "select_mass", "select_rows"),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'diffsparse_kernels' has no attribute {name!r}")
    home = next((module for module, names in _HOME.items() if name in names), "functional")
    return getattr(import_module(f"diffsparse_kernels.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
