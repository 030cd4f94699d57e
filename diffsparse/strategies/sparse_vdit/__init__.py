"""Sparse-vDiT (arXiv 2506.03065): the strategy and its offline search."""

from diffsparse.strategies.sparse_vdit.search import SparseVDiTSearch
from diffsparse.strategies.sparse_vdit.strategy import MODES, SparseVDiT

__all__ = ["MODES", "SparseVDiT", "SparseVDiTSearch"]
