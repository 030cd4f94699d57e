"""A place to attend at without a model around it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from diffsparse import Layout, Site
from diffsparse.site.compute import DenseBackend
from diffsparse.site.record import CallRecord
from diffsparse.strategies.blocks import keep_count


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
        model="transformer",
        layer=layer,
        index=0,
        step=step,
        steps=steps,
        end=steps,
        branch="cond",
        layout=layout,
        memory={} if memory is None else memory,
        dense_backend=DenseBackend("native", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale)),
        record=CallRecord(layer, step, "cond"),
        scale=scale,
        key_mask=key_mask,
    )


def row_share(layout: Layout, sparsity: float, block: int) -> float:
    """Share of dense attention: what may not be dropped, and of the rest what isn't, block by block."""
    columns, sinks = layout.blocks(block), int(layout.exact_keys(block).sum())
    kept = min(sinks + keep_count(sparsity, columns - sinks), columns)
    rows = zip(layout.exact_rows(block).tolist(), layout.asked_blocks(block).tolist(), strict=True)
    listed = sum(columns if whole else kept for whole, asked in rows if asked)
    return listed * block**2 / (layout.queries * layout.tokens) / (columns * block / layout.tokens) ** 2
