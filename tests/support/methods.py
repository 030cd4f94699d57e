"""Every way to change attention, ready to be put on a transformer with small random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import diffsparse
from diffsparse import GNA, PARO, AdaSpa, Dense, Digest, Layout, Schedule, SparseVDiT, Tangent
from diffsparse.orders.named import AXES
from diffsparse.plans.plan import Plan, fingerprints
from diffsparse.seam.targets import attentions, models_of
from diffsparse.strategies.paro.strategy import pack
from diffsparse.strategies.sparse_vdit.strategy import MODES

BLOCK = 16
SCHEDULE = Schedule(dense_first=1)


@dataclass(frozen=True)
class Method:
    """One column of the matrix. `sized`: it is bound to the grid that its plan was made for."""

    name: str
    strategy: Callable[[Any, Layout], Any] | None
    sized: bool = False

    def put(self, target: Any, layout: Layout, *, strict: bool = True) -> Any:
        """A handle with `remove()`; what it does is deterministic."""
        if self.strategy is None:
            return diffsparse.guide(target, "0.1", head_scale=2.0)
        return diffsparse.apply(target, self.strategy(target, layout), schedule=SCHEDULE, strict=strict)

    def acts(self, handle: Any) -> bool:
        """Whether the last run was changed as it should be."""
        report = handle.report()
        if self.strategy is None:
            return bool(report.perturbed > 0)
        return bool(report.dense_calls if self.name == "Dense" else report.sparse_calls)


def _plan(target: Any, layout: Layout, strategy: str, settings: dict[str, Any], heads_of: Any) -> Plan:
    models = models_of(target)
    tensors = {}
    for name, model in models.items():
        for layer, module in attentions(model):
            made = heads_of(int(getattr(module, "heads", 0) or module.num_heads))
            tensors.update({f"{name}.{layer}.{what}": x for what, x in made.items()})
    return Plan(strategy, fingerprints(models), layout.grid, settings, tensors)


def _paro(target: Any, layout: Layout) -> PARO:
    blocks, groups = layout.grid.blocks(BLOCK), 2
    seeded = torch.Generator().manual_seed(1)

    def made(heads: int) -> dict[str, torch.Tensor]:
        masks = torch.rand(groups, heads, blocks, blocks, generator=seeded, device="cpu") < 0.3
        masks |= torch.eye(blocks, dtype=torch.bool, device="cpu")
        orders = torch.arange(heads, dtype=torch.uint8, device="cpu") % len(AXES)
        return {"masks": pack(masks), "orders": orders}

    settings = {"sparsity": 0.6, "block": BLOCK, "groups": groups, "orders": list(AXES)}
    return PARO(_plan(target, layout, "paro", settings, made))


def _sparse_vdit(target: Any, layout: Layout) -> SparseVDiT:
    blocks = layout.grid.blocks(BLOCK)
    seeded = torch.Generator().manual_seed(2)

    def made(heads: int) -> dict[str, torch.Tensor]:
        modes = (torch.arange(2 * heads, device="cpu") % (len(MODES) - 1) + 1).view(2, heads).to(torch.uint8)
        columns = torch.rand(heads, blocks, generator=seeded, device="cpu")
        return {"modes": modes, "columns": columns / columns.sum(-1, keepdim=True)}

    return SparseVDiT(_plan(target, layout, "sparse-vdit", {"sparsity": 0.6, "block": BLOCK}, made))


METHODS = {
    method.name: method
    for method in (
        Method("Dense", lambda target, layout: Dense()),
        Method("AdaSpa", lambda target, layout: AdaSpa(sparsity=0.6, block=BLOCK)),
        Method("Tangent", lambda target, layout: Tangent(sparsity=0.5, block=BLOCK)),
        Method("Digest", lambda target, layout: Digest(sparsity=0.5, block=BLOCK)),
        Method("PARO", _paro, sized=True),
        Method("SparseVDiT", _sparse_vdit),
        Method("GNA", lambda target, layout: GNA(sparsity=0.6, block=BLOCK)),
        Method("guide", None),
    )
}
