"""Shares of whole numbers by the decimals that people write, not by the binary fractions next to them."""

from __future__ import annotations

import math
from fractions import Fraction


def exact(share: float | Fraction) -> Fraction:
    """The number as written: 0.1 is a tenth, so that a fifth of what 0.8 of 50 leaves is 2, not a little less."""
    return share if isinstance(share, Fraction) else Fraction(str(share))


def nearest(number: Fraction) -> int:
    """The nearest whole number; halves go up, always (`round` sends them to the even one)."""
    return math.floor(number + Fraction(1, 2))
