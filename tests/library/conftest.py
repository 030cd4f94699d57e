"""What tests of the library must not take from, or leave to, each other."""

from collections.abc import Iterator

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def _no_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases keep most of their blocks; here they run sparse all the same."""
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 9.0)


@pytest.fixture(autouse=True)
def _global_backend() -> Iterator[None]:
    """Diffusers makes the backend of one model that of all others too."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)
