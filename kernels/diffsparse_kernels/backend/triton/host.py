"""What all launchers of the Triton backend have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context

import torch
import triton
from torch import Tensor

from diffsparse_kernels.backend.triton import kernels
from diffsparse_kernels.measured import Tile

# Triton's interpreter multiplies bfloat16 as bit patterns: there it is computed in float32.
INTERPRETED: bool = not isinstance(kernels.attend, triton.runtime.JITFunction)


def launch(kernel: triton.runtime.JITFunction, programs: int, q: Tensor, tile: Tile, **arguments: object) -> None:
    """Run `programs` of a kernel on q's device."""

    def run() -> None:
        if tile.copy != "pointers":  # descriptors are made on the device, in memory that Triton asks for
            triton.set_allocator(_allocator(q.device))
        kernel[(programs,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)

    with torch.cuda.device_of(q):
        copy_context().run(run)  # so the allocator is set for this launch only


def _allocator(device: torch.device) -> Callable[[int, int, int | None], Tensor]:
    return lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Of each tensor by name, as kernels call them: `q_b`, `q_h`, `q_n`, `q_d`."""
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bhnd")}


def padded(head_dim: int) -> int:
    """Head sizes are padded to powers of two in registers, at least the 16 that tensor cores need."""
    return 1 << max(4, (head_dim - 1).bit_length())


def upcast(*tensors: Tensor) -> bool:
    """Whether the interpreter is to compute in float32."""
    return INTERPRETED and any(x.dtype in (torch.bfloat16, torch.float8_e4m3fn) for x in tensors)
