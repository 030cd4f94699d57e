"""torch's attention product, and the name that users may give to a function of their own.

Some put a faster kernel in place of `torch.nn.functional.scaled_dot_product_attention`. A function mode sees calls of
torch's own functions alone, so a replaced one is made visible while an adopted processor runs, and only then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

OWN = torch._C._nn.scaled_dot_product_attention  # whatever stands in torch.nn.functional
_NAME = "scaled_dot_product_attention"


class _StandIn:
    """Stands under the name while any thread needs it: calls go to that thread's function mode, else to the user's."""

    def __init__(self) -> None:
        self._lock, self._needed = threading.Lock(), 0
        self._theirs: Callable[..., Tensor] = OWN

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if has_torch_function((None,)):  # which nothing overrides: a mode is on
            return handle_torch_function(self, (), *args, **kwargs)
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
def named(function: Callable[..., Tensor]) -> Iterator[None]:
    """Within: the name means `function`. For tracing, which one thread does at a time, and which takes no locks."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = function
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
