"""Peers rebuilt from their papers for comparison: one file each, on our blocks, kernels and account of work."""

from diffsparse.strategies.rivals.dit_fast import DiTFastAttn
from diffsparse.strategies.rivals.pisa import PISA
from diffsparse.strategies.rivals.sol import SolAttn
from diffsparse.strategies.rivals.svg_ear import SVGEAR

__all__ = ["PISA", "SVGEAR", "DiTFastAttn", "SolAttn"]
