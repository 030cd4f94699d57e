"""Generalized Neighborhood Attention (arXiv 2504.16922): the strategy, its windows, and what they save at most."""

from diffsparse.strategies.gna.bounds import Bounds, bounds_of
from diffsparse.strategies.gna.strategy import GNA
from diffsparse.strategies.gna.windows import Tiling

__all__ = ["GNA", "Bounds", "Tiling", "bounds_of"]
