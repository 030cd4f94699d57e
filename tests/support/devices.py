"""The CPU as if it were a GPU, to ask which kernel would run; none is launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import diffsparse_kernels as dk
from diffsparse_kernels import registry


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[None]:
    """Only these backends are there, on a device where each runs and was tried."""
    here = {name: registry.BACKENDS[name]._replace(devices=("cpu",), default=("cpu",)) for name in names}
    monkeypatch.setattr(registry, "BACKENDS", here)
    for name in names:
        if hasattr(registry.load(name), "device_capability"):
            monkeypatch.setattr(registry.load(name), "device_capability", lambda device: None)
    dk.forget_measurements()
    yield
    monkeypatch.undo()
    dk.forget_measurements()
