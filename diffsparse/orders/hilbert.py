"""The Hilbert curve through a box of cells."""

from __future__ import annotations

import torch
from torch import Tensor


def place_on_curve(cells: Tensor) -> Tensor:
    """Position of each cell [M, 3] on the Hilbert curve through the smallest cube of a power of two, int64 [M].

    Skilling, "Programming the Hilbert curve" (2004). Cells of any other box keep the curve's order, with
    jumps where it leaves the box.
    """
    bits = max(int(cells.max()).bit_length(), 1)
    x = list(cells.unbind(1))
    for bit in range(bits - 1, 0, -1):
        high, below = 1 << bit, (1 << bit) - 1
        for i in range(3):
            set_ = (x[i] & high) > 0
            swap = (x[0] ^ x[i]) & below
            x[0] = torch.where(set_, x[0] ^ below, x[0] ^ swap)
            if i:
                x[i] = torch.where(set_, x[i], x[i] ^ swap)
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    carry = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        carry = torch.where((x[2] & (1 << bit)) > 0, carry ^ ((1 << bit) - 1), carry)
    x = [axis ^ carry for axis in x]
    place = torch.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for axis in x:
            place = (place << 1) | ((axis >> bit) & 1)
    return place
