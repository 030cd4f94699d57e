"""Trials where the kernel `gluon` is right, or goes wrong in the way that is named: `trial.py MODE DEVICE`.

Kernels that have the name of a mode behave so, all others are right.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffsparse_kernels.backend import reference
from diffsparse_kernels.backend import selftest as proof

right = reference.block_sparse_attention


def fails(*_: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("out of resource: shared memory\nRequired: 300000")


def wrong(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, lse = right(q, *rest)
    return out.roll(1, 2), lse


def unwritten(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, lse = right(q, *rest)
    whole = torch.empty_like(out)
    whole[:, :, :-1] = out[:, :, :-1]
    return whole, lse


def races(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, lse = right(q, *rest)
    return out, lse + torch.rand(()) * 1e-5


def hangs(*_: Any) -> tuple[Tensor, Tensor]:
    time.sleep(1000)
    raise AssertionError


def crashes(*_: Any) -> tuple[Tensor, Tensor]:
    ctypes.string_at(0)
    raise AssertionError


def leaves(*_: Any) -> tuple[Tensor, Tensor]:
    sys.exit("the driver said no")


def full(*_: Any) -> tuple[Tensor, Tensor]:
    raise torch.OutOfMemoryError("out of memory")


MODES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "right": right,
    "raise": fails,
    "wrong": wrong,
    "unwritten": unwritten,
    "race": races,
    "hang": hangs,
    "crash": crashes,
    "exit": leaves,
    "full": full,
}


def with_mass(mode: str) -> Callable[..., tuple[Tensor, ...]]:
    """A dense pass that sums masses and goes wrong in the same way."""
    if MODES[mode] in (fails, hangs, crashes, leaves, full):
        return MODES[mode]

    def attend(*call: Any) -> tuple[Tensor, ...]:
        out, *rest = reference.attention_with_mass(*call)
        return out if mode == "right" else out.roll(1, 2), *rest

    return attend


def kernel(name: str) -> SimpleNamespace:
    """The functions of a kernel that behaves as its name says."""
    mode = name if name in MODES else "right"
    off = {"block_sparse_attention": MODES[mode], "attention_with_mass": with_mass(mode)}
    return SimpleNamespace(**{**vars(reference), **off})


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    proof.kernel_of = lambda name: kernel({"gluon": mode}.get(name, name))
    proof.main(arguments)
