"""FlexAttention behind our door: eager on the CPU, where it is slow and exact; compiled on the GPU, for each size."""

from __future__ import annotations

import pytest
import torch

import diffsparse_kernels as dk
from support.cases import MASKS, Size, assert_attention, random_boxes, random_mask, uneven
from support.places import Place, gpu_obstacle

SIZES = [Size(q_len=97, kv_len=97), Size(batch=1, q_len=64, kv_len=200, dim=72, q_block=16, kv_block=64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_block_sparse(size: Size, kind: str, dtype: torch.dtype) -> None:
    qkv, mask = size.qkv(dtype), MASKS[kind](size)
    got = dk.block_sparse_attention(*qkv, size.lists(mask), backend="flex")
    assert_attention(got, qkv, size.allowed(mask), size.scale)


def test_padded_keys_and_dense() -> None:
    size = SIZES[0]
    qkv, mask = size.qkv(torch.float32), random_mask(size)
    keys = torch.rand(size.batch, size.kv_len) < 0.7
    got = dk.block_sparse_attention(*qkv, size.lists(mask), key_mask=keys, backend="flex")
    assert_attention(got, qkv, size.allowed(mask, keys), size.scale)
    bias = uneven(size)
    got = dk.block_sparse_attention(*qkv, size.lists(mask), key_mask=bias, backend="flex")
    assert_attention(got, qkv, size.allowed(mask, bias), size.scale)
    whole = torch.ones_like(mask)
    assert_attention(dk.attention(*qkv, key_mask=bias, backend="flex"), qkv, size.allowed(whole, bias), size.scale)
    assert_attention(dk.attention(*qkv, backend="flex"), qkv, size.allowed(whole), size.scale)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_on_the_device() -> None:
    if reason := gpu_obstacle("flex"):
        pytest.skip(f"flex: {reason}")
    place = Place("flex", "cuda")
    size = Size(q_len=257, kv_len=300, dim=64, q_block=128, kv_block=128)
    qkv, mask = size.qkv(torch.bfloat16), random_mask(size)
    for keys in (None, torch.rand(size.batch, size.kv_len) < 0.7, uneven(size)):
        got = place(dk.block_sparse_attention, *qkv, size.lists(mask), key_mask=keys)
        assert_attention(got, qkv, size.allowed(mask, keys), size.scale)
    boxes = random_boxes(size)
    with pytest.raises(dk.KernelInputError, match="flex backend takes no boxes"):
        place(dk.block_sparse_attention, *qkv, size.lists(mask), boxes=boxes)


def test_the_mass_is_that_of_the_own_kernel() -> None:
    size = SIZES[0]
    q, k, v = size.qkv(torch.float32)
    lse = torch.zeros(size.batch, size.heads, size.q_len)
    blocks = {"q_block": 32, "kv_block": 32}
    for keys in (None, uneven(size)):
        got, want = (
            dk.attention_with_mass(q, k, v, lse, **blocks, key_mask=keys, backend=name) for name in ("flex", "cpu")
        )
        torch.testing.assert_close(got, want)


def test_boxes_are_refused() -> None:
    size = Size()
    qkv, lists, boxes = size.qkv(torch.float32), size.lists(random_mask(size)), random_boxes(size)
    with pytest.raises(dk.KernelInputError, match="flex backend takes no boxes"):
        dk.block_sparse_attention(*qkv, lists, boxes=boxes, backend="flex")
