"""`from_pretrained` as every supported Diffusers release takes it, quiet where there is nothing to say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging


def from_pretrained(cls: Any, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """`cls.from_pretrained(source)` with its weights as `dtype`.

    The argument is called `torch_dtype` up to Diffusers 0.41 and `dtype` later; the old name works in all of them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        return cls.from_pretrained(source, torch_dtype=dtype, **options)


@contextmanager
def no_bars() -> Iterator[None]:
    """Load without progress bars: for models that take less time than reading their names."""
    enabled = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            diffusers_logging.enable_progress_bar()
            transformers_logging.enable_progress_bar()
