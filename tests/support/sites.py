"""A place to attend at without a model around it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from diffsparse import Layout, Site
from diffsparse.site.report import CallRecord


def site(
    layout: Layout,
    step: int = 0,
    steps: int | None = 10,
    memory: dict[str, Any] | None = None,
    layer: str = "blocks.0.attn1",
    key_mask: Any = None,
    scale: float | None = None,
) -> Site:
    return Site(
        "transformer",
        layer,
        0,
        step,
        steps,
        "cond",
        layout,
        {} if memory is None else memory,
        scale,
        key_mask,
        _dense=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale),
        _backend="native",
        _record=CallRecord(layer, step, "cond"),
    )
