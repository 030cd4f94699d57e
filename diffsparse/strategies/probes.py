"""Probes: query rows computed exactly tell what an approximation still misses, and how to mend it. Ours."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from diffsparse.orders.layout import Layout, kept

FEWEST = 32  # that a fit is worth
_LEAST_CAP = 64


def probe_count(work: float, tokens: int, head_dim: int) -> int:
    """How many rows are computed exactly: one for each channel, at least 64; fewer, or none, where that is too much.

    Args:
        work: share of dense attention that they and their fit may take.
    """
    most = min(max(head_dim, _LEAST_CAP), int(work * tokens - head_dim / 2))
    return most if most >= FEWEST else 0


def probe_work(count: int, tokens: int, head_dim: int) -> float:
    """What `count` rows cost, and to apply their fit to all, in dense passes."""
    return (count + head_dim / 2) / tokens if count else 0.0


class Rows(NamedTuple):
    """Which rows are mended.

    Attributes:
        probes: int64 [n], evenly spread over them.
        mended: bool [N, 1]; None where all are.
    """

    probes: Tensor
    mended: Tensor | None


@lru_cache(maxsize=16)
@kept
def mended_rows(layout: Layout, q_block: int, count: int, device: torch.device) -> Rows:
    """All rows but those in blocks that are computed whole, as of text, or not at all; no probes if there are none."""
    others = (layout.asked_blocks(q_block) & ~layout.exact_rows(q_block)).repeat_interleave(q_block)[: layout.tokens]
    places = others.nonzero()[:, 0]
    probes = places[torch.linspace(0, len(places) - 1, min(count, len(places))).long()]
    return Rows(probes.to(device), None if others.all() else others[:, None].to(device))
