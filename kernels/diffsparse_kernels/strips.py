"""Work in strips of rows, so that the memory beside it stays bounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CACHE_BYTES = 4 * 2**20  # what stays in the processor's cache
_DEVICE_BYTES = 256 * 2**20  # what may exist at a time on a device, where few large operations are fast


def room(x: Tensor) -> int:
    """Bytes that may exist at a time beside what is kept of x."""
    return _CACHE_BYTES if x.device.type == "cpu" else _DEVICE_BYTES


def strips(length: int, row_bytes: int, most_bytes: int, multiple: int = 1) -> Iterator[slice]:
    """Ranges of `length` rows of `row_bytes` each that fit `most_bytes`; each but the last a multiple of `multiple`."""
    rows = max(most_bytes // row_bytes // multiple, 1) * multiple
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


def joined(parts: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, rows, D_v] and LSEs [B, H, rows] of all strips -> out in `dtype`, lse."""
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2).to(dtype), torch.cat(lses, 2)


def tiles(x: Tensor, row_bytes: int) -> Iterator[tuple[slice, slice, slice]]:
    """Samples, heads and rows of x [B, H, rows, ...], in order, as many at a time as memory has room for."""
    (batch, heads, rows), most = x.shape[:3], room(x)
    for samples in strips(batch, heads * rows * row_bytes, most):
        for some in strips(heads, rows * row_bytes, most):
            for part in strips(rows, row_bytes, most):
                yield samples, some, part
