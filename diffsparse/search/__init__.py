"""Offline searches: each watches some runs of a pipeline and ends with a plan or a preset."""

from __future__ import annotations

from typing import Any

from diffsparse.search.calibrate import Search, calibrate
from diffsparse.search.hunt import HeadHunter, hunt
from diffsparse.search.objectives import objective
from diffsparse.search.paro import PAROSearch
from diffsparse.search.sparse_vdit import SparseVDiTSearch

__all__ = ["SEARCHES", "HeadHunter", "PAROSearch", "Search", "SparseVDiTSearch", "calibrate", "hunt", "objective"]

SEARCHES: dict[str, type[Any]] = {"paro": PAROSearch, "sparse-vdit": SparseVDiTSearch}
