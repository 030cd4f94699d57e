"""On a CUDA device: which backends run there, and what only a device can show. Their results: `-m gpu` elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import diffsparse_kernels as dk
from diffsparse_kernels import BlockLists
from support.cases import Size, random_mask
from support.places import CUDA, GPU, Place, gpu_obstacle, moved, repeated

pytestmark = pytest.mark.gpu
SIZES = [
    Size(batch=2, heads=3, q_len=1000, kv_len=1000, dim=128, q_block=128, kv_block=128),
    Size(batch=1, heads=4, q_len=777, kv_len=1111, dim=64, q_block=64, kv_block=64),
]


@pytest.fixture(params=[*GPU, "flex"])
def backend(request: pytest.FixtureRequest) -> str:
    """Skips with the reason where it does not run, once for each test here and for all those that are not made."""
    if reason := gpu_obstacle(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def test_the_backend_is_there_and_its_results_are_on_the_device(backend: str) -> None:
    size = SIZES[0]
    qkv, lists = moved(size.qkv(torch.bfloat16), "cuda"), moved(size.lists(random_mask(size)), "cuda")
    out, lse = dk.block_sparse_attention(*qkv, lists, backend=backend)
    assert out.is_cuda
    assert lse.is_cuda
    assert out.shape == qkv[0].shape


def calls(size: Size, backend: str) -> dict[str, Any]:
    """Every function of a backend on one input."""
    q, k, v = moved(size.qkv(torch.bfloat16), "cuda")
    lists = moved(size.lists(random_mask(size)), "cuda").ordered()
    lse = torch.randn(size.batch, size.heads, size.q_len, device=CUDA) + 4
    blocks = {"q_block": size.q_block, "kv_block": size.kv_block, "backend": backend}
    return {
        "dense": partial(dk.attention, q, k, v, backend=backend),
        "sparse": partial(dk.block_sparse_attention, q, k, v, lists, backend=backend),
        "means": partial(dk.block_sparse_attention, q, k, v, lists, summary="means", backend=backend),
        "first order": partial(dk.block_sparse_attention, q, k, v, lists, summary="first-order", backend=backend),
        "error": lambda: dk.summary_error(q, dk.summarise(k, v, size.kv_block), q_block=size.q_block),
        "fused": partial(dk.attention_with_mass, q, k, v, lse, **blocks),
        "mass": partial(dk.block_mass, q, k, lse, **blocks),
    }


def test_fifty_launches_give_the_same_bits(backend: str) -> None:
    """A race between warps shows as a bit that changes from launch to launch."""
    for size in SIZES:
        unsteady = [kind for kind, call in calls(size, backend).items() if not repeated(call, 50)]
        assert not unsteady, size


@pytest.fixture
def never_waiting() -> Iterator[None]:
    """Raises where the host waits for the device."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def search(mass: torch.Tensor, keep: torch.Tensor, always: torch.Tensor) -> list[BlockLists]:
    masks = dk.select_rows(mass, 3), dk.select_rows(mass, keep, always), dk.select_heads(mass, 0.3)
    sizes = {"q_block": 8, "kv_block": 8, "q_len": 60, "kv_len": 70}
    largest = dk.lists_of_largest(mass, 0.3, always=always, **sizes)
    found = [largest, dk.lists_of_bits(largest.packed(), **sizes)]
    return found + [BlockLists.from_mask(mask, **sizes, width=9).ordered() for mask in masks]


def test_a_search_waits_for_nothing_and_finds_what_it_finds_on_the_cpu(request: pytest.FixtureRequest) -> None:
    inputs = torch.rand(2, 3, 8, 9), torch.randint(1, 9, (2, 3)), torch.rand(8, 9) > 0.9
    want = search(*inputs)
    if torch.cuda.is_available():
        inputs = moved(inputs, "cuda")
    request.getfixturevalue("never_waiting")
    found = search(*inputs)
    torch.cuda.set_sync_debug_mode("default")
    for got, exact in zip(found, want, strict=True):
        assert torch.equal(got.to_mask().cpu(), exact.to_mask())
        assert got.order is not None
        assert exact.order is not None
        assert torch.equal(got.order.cpu(), exact.order)


def test_the_place_moves_views_as_they_are() -> None:
    """Seen on the CPU and on the device: strides and gaps stay."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    gapped = torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2]
    there = moved(gapped, "cuda")
    assert there.stride() == gapped.stride()
    assert torch.equal(there.cpu(), gapped)
    assert str(Place("triton", "cuda")) == "triton-cuda"
