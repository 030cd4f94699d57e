"""Kernels that must not end an account of all the others: one hangs, one is wrong, one raises."""

from __future__ import annotations

from types import SimpleNamespace

from diffsparse_kernels.backend import reference
from support import trial

hangs, wrong, raises = (
    SimpleNamespace(**{**vars(reference), "block_sparse_attention": trial.MODES[mode]})
    for mode in ("hang", "wrong", "raise")
)
KERNELS = ",".join(f"support.fakes:{name}" for name in ("hangs", "wrong", "raises"))
