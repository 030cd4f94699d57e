"""FlashAttention-4 behind our door: a stand-in takes what version 4.0.0b36 takes, and computes by the reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels import catalog, registry
from diffsparse_kernels.backend import reference, selftest
from diffsparse_kernels.case import Case
from support.cases import MASKS, Size, assert_attention
from support.devices import pretended

NAME = "flash-attn-4"
CPU = torch.device("cpu")
CASE = Case("attend", torch.bfloat16, 64, 64, 128, 64)
SIZES = [
    Size(2, 2, 250, 333, 64, q_block=128, kv_block=64),
    Size(1, 3, 300, 290, 72, 80, q_block=128, kv_block=128),
]


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    block_sparse_tensors: BlockSparseTensorsTorch | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, None, None, None]:
    """q, k, v [B, N, H, D] -> out [B, N, H, D_v], LSE [B, H, N]. Refuses what the package refuses."""
    batch, n_q, heads, dim = q.shape
    n_kv = k.shape[1]
    assert k.shape == (batch, n_kv, heads, dim)
    assert v.shape[:3] == (batch, n_kv, heads)
    assert q.dtype == k.dtype == v.dtype != torch.float32
    assert all(x % 8 == 0 for x in (dim, v.shape[3]))
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    if block_sparse_tensors is None:
        out, lse = reference.attention(queries, keys, values, softmax_scale, None)
    else:
        mask_cnt, mask_idx, cnt, idx, (q_block, kv_block) = block_sparse_tensors
        assert q_block == 128, "must be a multiple of q_stage * tile_m"
        assert kv_block in (64, 128), "has to match tile_n"
        rows, columns = -(-n_q // q_block), -(-n_kv // kv_block)
        for number, listed in ((mask_cnt, mask_idx), (cnt, idx)):
            assert number.dtype == listed.dtype == torch.int32
            assert number.shape[0] in (1, batch)
            assert number.shape[1:] == (heads, rows)
            assert listed.shape[:3] == number.shape
            assert listed.shape[3] <= columns
            assert listed.stride(3) == 1
        assert not mask_cnt.any()
        lists = dk.BlockLists(idx, cnt, q_block, kv_block, n_q, n_kv)
        out, lse = reference.block_sparse_attention(queries, keys, values, lists, softmax_scale, None)
    return out.transpose(1, 2), lse if return_lse else None, None, None, None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package is there, on a Hopper GPU."""
    parts: dict[str, dict[str, Any]] = {
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
        "flash_attn.cute.interface": {"_flash_attn_fwd": forward},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "diffsparse_kernels.backend.flash4", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    catalog.load.cache_clear()
    with pretended(monkeypatch, NAME):
        yield catalog.load(NAME)
    catalog.load.cache_clear()
    sys.modules.pop("diffsparse_kernels.backend.flash4", None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_our_lists_are_its_lists(size: Size, kind: str) -> None:
    """Ragged ends, lists of unequal length and empty ones, for each sample or for all."""
    qkv, mask = size.qkv(torch.bfloat16), MASKS[kind](size)
    for listed in (mask, mask[:1]):
        with dk.record() as ran:
            got = dk.block_sparse_attention(*qkv, size.lists(listed))
        assert ran == [dk.Choice(NAME)]
        assert_attention(got, qkv, size.allowed(listed.expand_as(mask)), size.scale)
    dense = dk.attention(*qkv)
    assert_attention(dense, qkv, size.allowed(torch.ones_like(mask)), size.scale)


@pytest.mark.parametrize("case", [CASE, CASE._replace(dtype=torch.float16, kv_block=128)])
def test_the_trial_tells_right_from_wrong(case: Case, installed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(selftest.samples(case, CPU, long=False))
    assert not any(selftest.examine(case, selftest.kernel_of(NAME), sample, 1).problem for sample in found)

    def last_one_forgotten(*call: Any, block_sparse_tensors: Any, **rest: Any) -> Any:
        if block_sparse_tensors is not None:
            fewer = (block_sparse_tensors.full_block_cnt - 1).clamp(min=0)
            block_sparse_tensors = block_sparse_tensors._replace(full_block_cnt=fewer)
        return forward(*call, block_sparse_tensors=block_sparse_tensors, **rest)

    monkeypatch.setattr(installed, "_flash_attn_fwd", last_one_forgotten)
    assert selftest.examine(case, selftest.kernel_of(NAME), found[0], 1).problem.startswith("wrong: the output is off")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"kv_block": 128}, None),
        ({"q_block": 64}, "it takes blocks of 128 x 128 or 128 x 64; got 64 x 64"),
        ({"masked": True}, "no boxes and no key mask"),
        ({"masked": True, "biased": True}, "no boxes and no key mask"),
        ({"dtype": torch.float32}, "bfloat16 and float16; got torch.float32"),
        ({"head_dim": 160}, "at most 128 channels, a multiple of 8; got 160 and 64"),
    ],
)
def test_what_it_takes(change: dict[str, Any], reason: str | None, installed: ModuleType) -> None:
    told = installed.capability(CPU, CASE._replace(**change))
    assert told == reason if reason is None else reason in told


def test_blackwell_wants_two_tiles_of_queries(installed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert installed.capability(CPU, CASE) == "it takes blocks of 256 x 128; got 128 x 64"
    assert installed.capability(CPU, CASE._replace(q_block=256, kv_block=128)) is None


def test_where_it_is_absent_the_reason_is_told() -> None:
    assert "wants the package flash-attn-4" in str(registry.backends()[NAME])
