"""Ways in which a command's work ends early: a full disk, Ctrl-C."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from diffsparse.cli import main


@contextmanager
def full_disk(left: int) -> Iterator[None]:
    """Within: no file grows beyond `left` bytes, in child processes either. Python ignores the signal that comes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def interrupted(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """`function`, with Ctrl-C pressed during the call after `calls` of them."""
    left = [calls]

    def wrapped(*arguments: Any, **knobs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*arguments, **knobs)

    return wrapped


def status(arguments: list[str]) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)
