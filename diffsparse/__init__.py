"""Training-free sparse attention for diffusion transformers: one line on, one line off.

>>> import diffsparse
>>> from diffsparse import AdaSpa
>>> with diffsparse.apply(pipe, AdaSpa(sparsity=0.8)) as sparse:  # doctest: +SKIP
...     video = pipe(prompt).frames[0]
>>> print(sparse.report())  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsparse.errors import DiffsparseError
    from diffsparse.guidance.guide import GuideHandle, guide
    from diffsparse.guidance.guider import HeadGuidance
    from diffsparse.guidance.preset import Preset
    from diffsparse.orders.layout import Layout
    from diffsparse.schedule import Schedule
    from diffsparse.seam.patch import Handle, apply, remove
    from diffsparse.site.compute import Site
    from diffsparse.site.report import Report
    from diffsparse.strategies import GNA, PARO, AdaSpa, Compensated, Dense, Digest, Random, SparseVDiT

__version__ = "0.1.0"

# Imported on first use, so that `diffsparse --help` never waits for torch.
_HOME = {
    "AdaSpa": "diffsparse.strategies",
    "Compensated": "diffsparse.strategies",
    "Dense": "diffsparse.strategies",
    "Digest": "diffsparse.strategies",
    "DiffsparseError": "diffsparse.errors",
    "GNA": "diffsparse.strategies",
    "GuideHandle": "diffsparse.guidance.guide",
    "Handle": "diffsparse.seam.patch",
    "HeadGuidance": "diffsparse.guidance.guider",
    "Layout": "diffsparse.orders.layout",
    "PARO": "diffsparse.strategies",
    "Preset": "diffsparse.guidance.preset",
    "Random": "diffsparse.strategies",
    "Report": "diffsparse.site.report",
    "Schedule": "diffsparse.schedule",
    "Site": "diffsparse.site.compute",
    "SparseVDiT": "diffsparse.strategies",
    "apply": "diffsparse.seam.patch",
    "guide": "diffsparse.guidance.guide",
    "remove": "diffsparse.seam.patch",
}

__all__ = [
    "GNA",
    "PARO",
    "AdaSpa",
    "Compensated",
    "Dense",
    "DiffsparseError",
    "Digest",
    "GuideHandle",
    "Handle",
    "HeadGuidance",
    "Layout",
    "Preset",
    "Random",
    "Report",
    "Schedule",
    "Site",
    "SparseVDiT",
    "apply",
    "guide",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffsparse' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
