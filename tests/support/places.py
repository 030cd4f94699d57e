"""Where a kernel test runs: a backend on a device. Inputs come from the CPU and results go back there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse_kernels as dk

CUDA = torch.device("cuda")
GPU = ("triton", "gluon", "reference", "flash-attn-4")  # flex compiles for each size: it has tests of its own
EXACT = ("cpu", "reference")  # those that take float64


@dataclass(frozen=True)
class Place:
    """Runs the public functions by one backend on one device."""

    backend: str
    device: str = "cpu"

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The result on the CPU. What the backend refuses is seen to be refused, and ends the test as skipped."""
        there = {name: moved(value, self.device) for name, value in options.items()}
        call = [moved(value, self.device) for value in arguments]
        if call[0].dtype == torch.float64 and self.backend not in EXACT:
            with pytest.raises(dk.KernelInputError, match="wants float32, bfloat16 or float16") as refused:
                function(*call, **there, backend=self.backend)
            pytest.skip(str(refused.value))
        return moved(function(*call, **there, backend=self.backend), "cpu")


def moved(value: Any, device: str) -> Any:
    """Tensors with their strides and all that lies between, and whatever is made of tensors; others as they are."""
    if isinstance(value, Tensor) and value.device.type != device:
        memory = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
        return memory.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, dk.BlockLists):
        return value.to(device)
    if isinstance(value, dk.Boxes | dk.Summaries):
        return value._make(moved(x, device) for x in value)
    return tuple(moved(x, device) for x in value) if isinstance(value, tuple) else value


def gpu_obstacle(backend: str) -> str:
    """Why a backend does not run on a GPU of this machine; empty if it does."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    reason = dk.backends(CUDA)[backend]
    return "" if reason == "available" else reason


def places(*cpu: str) -> list[Any]:
    """Parameters: the given backends on the CPU, and those that run on the GPU; test_gpu.py says why others don't.

    In Triton's interpreter it is the Triton one alone.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [pytest.param(Place("triton"), id="interpreted")]
    found = [Place(name, "cuda") for name in GPU if not gpu_obstacle(name)]
    return [
        *(pytest.param(Place(name), id=name) for name in cpu),
        *(pytest.param(place, id=str(place), marks=pytest.mark.gpu) for place in found),
    ]


def repeated(function: Callable[[], Any], times: int) -> bool:
    """Whether all calls give the same bits."""
    first = function()
    for _ in range(times - 1):
        again = function()
        for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (first, again)), strict=True):
            if not torch.equal(x, y):
                return False
    return True
