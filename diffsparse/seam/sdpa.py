"""`scaled_dot_product_attention` as torch has it, and as users replace it.

Some put a faster kernel in place of `torch.nn.functional.scaled_dot_product_attention`. A function mode sees calls of
torch's own functions alone, so a replacement is wrapped while an adopted processor runs, and only then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

OWN = torch._C._nn.scaled_dot_product_attention  # even if torch.nn.functional has another
_NAME = "scaled_dot_product_attention"


class _StandIn:
    """Installed while any thread needs it: calls go to the function mode of their thread, or to the user's function."""

    def __init__(self) -> None:
        self._lock, self._needed = threading.Lock(), 0
        self._theirs: Callable[..., Tensor] = OWN

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        if has_torch_function((None,)):  # None overrides nothing, so a mode is on
            out: Tensor = handle_torch_function(self, (), *args, **kwargs)
            return out
        return self._theirs(*args, **kwargs)

    def __enter__(self) -> None:
        with self._lock:
            self._needed += 1
            if F.scaled_dot_product_attention is not self:
                self._theirs = F.scaled_dot_product_attention
                setattr(F, _NAME, self)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._needed -= 1
            if not self._needed and F.scaled_dot_product_attention is self:
                setattr(F, _NAME, self._theirs)


STAND_IN = _StandIn()


@contextmanager
def replaced(function: Callable[..., Tensor]) -> Iterator[None]:
    """Within: torch.nn.functional has `function`. For tracing, which one thread does at a time, and without locks."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = function
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
