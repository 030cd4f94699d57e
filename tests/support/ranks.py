"""What two ranks that share a sequence compute, beside one process: run by `torch.multiprocessing`."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import diffsparse
from diffsparse import GNA, AdaSpa, Compensated, Dense, Digest, Layout, Random, Schedule, Tangent
from diffsparse.errors import UnsupportedModelError
from diffsparse.plans.plan import Plan, fingerprints
from diffsparse.seam.parallel import check_alone
from diffsparse.strategies.paro.strategy import PARO, pack
from diffsparse.strategies.sparse_vdit.strategy import MODES, SparseVDiT
from support.tiny_transformers import CASES, Inputs, build, inputs, tensors

NAME, HEADS, BLOCK = "WanTransformer3DModel", 4, 16
GRID = Layout(3, 4, 6)  # of the default inputs
ONE_LATER = Schedule(dense_first=1)


def wan() -> Any:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(**{**CASES[NAME].config, "num_attention_heads": HEADS}).eval()


def share(model: Any, **degrees: int) -> Any:
    """Spread `model` over all ranks."""
    torch.accelerator.device_count = lambda: 1  # Diffusers counts accelerators, and here is none
    model.enable_parallelism(config=diffusers.ContextParallelConfig(**degrees))
    return model


def plan(strategy: str, settings: dict[str, Any], **parts: torch.Tensor) -> Plan:
    tensors_ = {f"transformer.blocks.{i}.attn1.{what}": x.clone() for i in range(2) for what, x in parts.items()}
    return Plan(strategy, fingerprints({"transformer": wan()}), GRID, {**settings, "block": BLOCK}, tensors_)


def strategies() -> dict[str, Any]:
    """Each head does something of its own."""
    torch.manual_seed(0)
    blocks = GRID.blocks(BLOCK)
    masks = torch.rand(1, HEADS, blocks, blocks) < 0.5
    masks |= torch.eye(blocks, dtype=torch.bool)
    paro = {"orders": ["FHW", "WHF", "HWF"], "groups": 1, "sparsity": 0.5}
    modes = torch.tensor([[MODES.index(x) for x in ("full", "diagonal", "stripe", "multi-diagonal")]]).byte()
    return {
        "adaspa": AdaSpa(0.6, block=BLOCK, recall_threshold=0.1, order="auto"),
        "tangent": Tangent(0.5, block=BLOCK),
        "digest": Digest(0.5, block=BLOCK),
        "random": Random(0.5, block=BLOCK),
        "gna": GNA(sparsity=0.6, block=BLOCK),
        "compensated": Compensated(Random(0.5, block=BLOCK)),
        "paro": PARO(plan("paro", paro, orders=torch.tensor([0, 1, 2, 1], dtype=torch.uint8), masks=pack(masks))),
        "sparse-vdit": SparseVDiT(
            plan("sparse-vdit", {"sparsity": 0.5}, modes=modes, columns=torch.rand(HEADS, blocks))
        ),
    }


def passes(model: Any, strategy: Any, kwargs: Inputs) -> list[torch.Tensor]:
    with diffsparse.apply(model, strategy, schedule=ONE_LATER) as handle:
        outs = [tensors(model, kwargs)[0] for _ in range(3)]
        assert handle.report().sparse_calls, strategy
    return outs


def guided(model: Any, kind: str, kwargs: Inputs) -> torch.Tensor:
    with diffsparse.guide(model, ["0.0", "1.3"], kind=kind) as handle:
        out = tensors(model, kwargs)[0]
        assert handle.report().passes == 1
    return out


def refused(action: Any, *args: Any, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        action(*args)


def rank(number: int, world: int, store: str) -> None:
    """All checks; what fails is raised in the parent."""
    torch.set_num_threads(1)
    import diffsparse_kernels

    diffsparse_kernels.break_even = lambda *_: 9.0
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=world)
    try:
        _compare(world)
        _refusals(world)
        torch.distributed.barrier()  # gloo ends a process that leaves while the other still sends
    finally:
        torch.distributed.destroy_process_group()


def _compare(world: int) -> None:
    alone, shared, kwargs = wan(), share(wan(), ulysses_degree=world), inputs(NAME)
    torch.testing.assert_close(tensors(shared, kwargs)[0], tensors(alone, kwargs)[0])
    for name, strategy in strategies().items():
        for got, want in zip(passes(shared, strategy, kwargs), passes(alone, strategy, kwargs), strict=True):
            torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
    for kind in ("identity", "uniform"):
        torch.testing.assert_close(guided(shared, kind, kwargs), guided(alone, kind, kwargs))


def _refusals(world: int) -> None:
    with pytest.raises(UnsupportedModelError, match="search on one process"):
        check_alone({"transformer": share(wan(), ulysses_degree=world)})
    ring = share(wan(), ring_degree=world)
    refused(diffsparse.apply, ring, Random(0.5, block=BLOCK), match="ring attention")
    refused(diffsparse.guide, ring, ["0.0"], match="ring attention")
    later = wan()
    with diffsparse.apply(later, Random(0.5, block=BLOCK)):
        share(later, ring_degree=world)
        refused(tensors, later, inputs(NAME), match="ring attention")
    joint = share(build("FluxTransformer2DModel"), ulysses_degree=world)
    refused(diffsparse.apply, joint, Random(0.5, block=BLOCK), match="rank by rank")
    want = tensors(joint, inputs("FluxTransformer2DModel"))[0]
    with diffsparse.apply(joint, Dense(), schedule=Schedule(0)):
        assert torch.equal(tensors(joint, inputs("FluxTransformer2DModel"))[0], want)
