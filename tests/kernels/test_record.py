"""What ran is what the op itself says: one entry a call, by whoever listens, compiled code included."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import diffsparse_kernels as dk
from support.cases import Size, random_mask

SIZE = Size(q_len=48, kv_len=48, q_block=16, kv_block=16)
BLOCKS = {"q_block": 16, "kv_block": 16}
CPU = dk.Choice("cpu")


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return SIZE.qkv(torch.float32)


def lists() -> dk.BlockLists:
    return SIZE.lists(random_mask(SIZE))


@pytest.mark.parametrize("by_head", [False, True])
def test_one_entry_for_each_call(by_head: bool) -> None:
    q, k, v = qkv()
    keys = torch.rand(SIZE.batch, SIZE.heads, 48) < 0.8 if by_head else None
    with dk.record() as ran:
        _, lse = dk.attention(q, k, v, key_mask=keys)
        dk.attention_with_mass(q, k, v, lse, **BLOCKS, key_mask=keys)
        dk.attention_with_mass(q, k, v, **BLOCKS, key_mask=keys, backend="reference")
        dk.block_mass(q, k, lse, **BLOCKS, key_mask=keys)
        dk.block_sparse_attention(q, k, v, lists(), summary="means", key_mask=keys)
        dk.block_sparse_attention(q, k, v, lists(), key_mask=keys, backend="reference")
    dk.attention(q, k, v)
    folded, readied = CPU._replace(folds=True), CPU
    assert ran == [CPU, CPU, dk.Choice("reference"), CPU, folded, readied, dk.Choice("reference")]
    assert dk.kernel_for(q, k, v, lists(), key_mask=keys) == CPU


def test_records_within_records() -> None:
    with dk.record() as outer:
        dk.attention(*qkv())
        with dk.record() as inner:
            dk.attention(*qkv(), backend="reference")
        dk.attention(*qkv())
    assert inner == [dk.Choice("reference")]
    assert outer == [CPU, dk.Choice("reference"), CPU]


def test_a_call_that_fails_ends_the_record() -> None:
    with pytest.raises(ValueError, match="wanted q, k, v"), dk.record() as ran:
        dk.attention(*(x[0] for x in qkv()))
    dk.attention(*qkv())
    assert ran == []


def test_other_threads_are_not_recorded() -> None:
    theirs: list[list[dk.Choice]] = []

    def work() -> None:
        with dk.record() as ran:
            dk.attention(*qkv(), backend="reference")
        theirs.append(ran)

    with dk.record() as ours:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        dk.attention(*qkv())
    assert ours == [CPU]
    assert theirs == [[dk.Choice("reference")]]


def test_compiled_code_is_recorded_when_it_runs() -> None:
    blocks = lists()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dk.block_sparse_attention(q, k, v, blocks)[0] + dk.attention(q, k, v)[0]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with dk.record() as ran:
            compiled(*qkv())
        assert ran == [CPU, CPU]
