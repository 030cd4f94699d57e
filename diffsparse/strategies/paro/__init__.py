"""PAROAttention (arXiv 2506.16054): the strategy and its offline search."""

from diffsparse.strategies.paro.search import PAROSearch
from diffsparse.strategies.paro.strategy import PARO

__all__ = ["PARO", "PAROSearch"]
