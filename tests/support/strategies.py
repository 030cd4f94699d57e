"""Every strategy in every order that it can have, on layouts of one's own, with or without dropping anything."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from diffsparse import GNA, PARO, AdaSpa, Compensated, Digest, Layout, Random, SparseVDiT, Tangent
from diffsparse.orders.named import AXES
from diffsparse.plans.plan import Plan
from diffsparse.strategies.paro.strategy import pack
from diffsparse.strategies.rivals import PISA, SVGEAR, DiTFastAttn, SolAttn
from diffsparse.strategies.sparse_vdit.strategy import MODES

BLOCK, HEADS, LAYER = 8, 3, "transformer.blocks.0.attn1"
ORDERS = ("FHW", "WHF", "tile2x2x2", "hilbert", "auto")


def every(layout: Layout, sparsity: float) -> dict[str, Any]:
    """By name. At a sparsity of 0 nothing is dropped."""
    ordered = {
        f"{name} {order}": make(order)
        for order in ORDERS
        for name, make in {
            "adaspa": lambda order: AdaSpa(sparsity, (2,), BLOCK, head_adaptive=sparsity > 0, order=order),
            "random": lambda order: Random(sparsity, block=BLOCK, order=order),
            "tangent": lambda order: Tangent(sparsity, BLOCK, order=order),
            "digest": lambda order: Digest(sparsity, (2 * BLOCK, BLOCK), order=order),
            "sol": lambda order: SolAttn(sparsity, BLOCK, order),
            "pisa": lambda order: PISA(sparsity, BLOCK, order),
            "svg-ear": lambda order: SVGEAR(sparsity, BLOCK, order),
            "dit-fast": lambda order: DiTFastAttn(sparsity, block=BLOCK, order=order),
            "means": lambda order: Compensated(Random(sparsity, block=BLOCK, order=order), "means"),
            "first-order": lambda order: Compensated(Random(sparsity, block=BLOCK, order=order), "first-order"),
            "tail": lambda order: Compensated(AdaSpa(sparsity, (2,), BLOCK, head_adaptive=False, order=order), "tail"),
        }.items()
    }
    plans = {"paro": PARO(_paro(layout, sparsity)), "sparse-vdit": SparseVDiT(_sparse_vdit(layout, sparsity))}
    gna = GNA(sparsity=sparsity, block=BLOCK) if sparsity else GNA((0, 0, 0), block=BLOCK)
    return {**ordered, **plans, "gna": gna}


def _paro(layout: Layout, sparsity: float) -> Plan:
    n = layout.grid.blocks(BLOCK)
    masks = torch.rand(2, HEADS, n, n, generator=torch.Generator().manual_seed(n)) >= sparsity
    picked = torch.tensor([4, 1, 5], dtype=torch.uint8)
    settings = {"sparsity": sparsity, "block": BLOCK, "groups": 2, "orders": list(AXES)}
    return Plan("paro", {}, layout.grid, settings, {f"{LAYER}.masks": pack(masks), f"{LAYER}.orders": picked})


def _sparse_vdit(layout: Layout, sparsity: float) -> Plan:
    modes = [MODES.index(mode) for mode in ("multi-diagonal", "full", "stripe")]
    columns = F.softmax(torch.randn(HEADS, layout.grid.blocks(BLOCK), generator=torch.Generator().manual_seed(1)), -1)
    tensors = {f"{LAYER}.modes": torch.tensor([modes], dtype=torch.uint8), f"{LAYER}.columns": columns}
    return Plan("sparse-vdit", {}, layout.grid, {"sparsity": sparsity, "block": BLOCK}, tensors)


NAMES = tuple(every(Layout(2, 2, 2), 0.5))
