"""Large pieces of work side by side in Python threads of one torch thread each."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
    """`work` of all pieces, in their order, as many at a time as torch has threads here; each sees one thread.

    Pieces should take a millisecond or more: a call of torch leaves Python to other threads only while it computes.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(piece) for piece in pieces]
    inference = torch.is_inference_mode_enabled()

    def without_graph(piece: Piece) -> Result:
        with torch.inference_mode() if inference else torch.no_grad():  # threads do not share these modes
            return work(piece)

    return list(_pool(threads, os.getpid()).map(without_graph, pieces))


@functools.lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads for which torch has one thread each; a forked process has none of its parent's."""
    started = threading.Barrier(threads + 1)

    def alone() -> None:
        torch.get_num_threads()  # the first question resets a thread's number to the one that new threads get
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "diffsparse", alone)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # setting it for a thread also set it for all new ones
    return pool
