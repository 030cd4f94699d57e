"""The same loop in two processes, each with half the heads: Ulysses, on gloo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import diffsparse_kernels
from diffsparse import Layout
from support.methods import METHODS
from support.ranks import share
from support.tiny_transformers import Shape, build, inputs


def results(folder: Path, name: str, shape: Shape, layout: Layout, steps: int) -> dict[str, list[torch.Tensor]]:
    """What each method gives."""
    mp.spawn(_rank, (str(folder), name, shape, layout, steps), nprocs=2)
    return dict(torch.load(folder / "outs.pt"))


def _rank(rank: int, folder: str, name: str, shape: Shape, layout: Layout, steps: int) -> None:
    os.environ.pop("DIFFSPARSE_BACKEND", None)  # of a GPU; these run on the CPU
    torch.set_num_threads(1)
    diffsparse_kernels.break_even = lambda *_: 9.0
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outs: dict[str, Any] = {}
    for method in METHODS.values():
        model = share(build(name), ulysses_degree=2)
        with method.put(model, layout) as handle, torch.no_grad():
            kwargs = inputs(name, shape)
            outs[method.name] = [
                model(**{**kwargs, "hidden_states": kwargs["hidden_states"] * (1 - 0.1 * step)}, return_dict=False)[0]
                for step in range(steps)
            ]
            assert method.acts(handle)
    if rank == 0:
        torch.save(outs, Path(folder) / "outs.pt")
    dist.barrier()
    dist.destroy_process_group()
