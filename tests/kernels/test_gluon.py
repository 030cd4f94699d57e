"""The Hopper kernel without a GPU: run in threads that are as asynchronous as its warps, and compiled ahead of time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import diffsparse_kernels as dk
from diffsparse_kernels import gluon, gluon_kernels, triton
from diffsparse_kernels.lists import BlockLists, blocks_of
from support import aot, hopper
from support.cases import MASKS, Size, assert_attention, random_mask

SIZES = [
    Size(batch=1, heads=2, q_len=200, kv_len=700, dim=64, q_block=128, kv_block=64),  # turns outnumber the stages
    Size(batch=2, heads=1, q_len=257, kv_len=333, dim=72, q_block=128, kv_block=128),  # both ends ragged
    Size(batch=1, heads=1, q_len=128, kv_len=512, dim=128, q_block=128, kv_block=64),
    Size(batch=1, heads=1, q_len=1, kv_len=1, dim=96, q_block=128, kv_block=128),
]


def attend(size: Size, qkv: tuple[torch.Tensor, ...], lists: BlockLists | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gluon._attend` does, on threads."""
    constants = gluon.constants(size.dim, size.kv_block, lists)
    programs = size.batch * size.heads * blocks_of(size.q_len, 128)
    out, lse = torch.full_like(qkv[0], torch.nan), torch.full(qkv[0].shape[:3], torch.nan)
    blocks = zip(qkv, (128, size.kv_block, size.kv_block), strict=True)
    order = None if lists is None else lists.order
    lists_of = (lse, lse) if lists is None else (lists.idx, lists.cnt)
    pointers = (out, lse, *lists_of, lse if order is None else order)
    hopper.Hopper(gluon_kernels).run(
        "attend",
        programs,
        *(hopper.Descriptor(x, [1, 1, rows, constants["D_PAD"]]) for x, rows in blocks),
        *(hopper.Pointer(x.view(-1)) for x in pointers),
        size.scale * triton.LOG2E,
        size.q_len,
        size.kv_len,
        size.heads,
        programs if lists is None else lists.cnt.numel(),
        0 if lists is None else lists.idx.shape[3],
        *constants.values(),
    )
    return out, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "full"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_block_sparse(size: Size, kind: str, dtype: torch.dtype) -> None:
    qkv, mask = size.qkv(dtype), MASKS[kind](size)
    mask[0, 0, 0] = kind == "full"  # an empty list
    assert_attention(attend(size, qkv, size.lists(mask)), qkv, size.allowed(mask), size.scale)


def test_more_keys_than_16_bits_count() -> None:
    size = Size(batch=1, heads=1, q_len=3, kv_len=40_000, dim=64, q_block=128, kv_block=64)
    qkv, mask = size.qkv(torch.float16), torch.zeros(size.blocks, dtype=torch.bool)
    mask[..., [0, 300, 600, 624]] = True
    assert_attention(attend(size, qkv, size.lists(mask)), qkv, size.allowed(mask), size.scale)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dense(size: Size) -> None:
    qkv = size.qkv(torch.bfloat16)
    whole = torch.ones(size.batch, size.heads, size.q_len, size.kv_len, dtype=torch.bool)
    assert_attention(attend(size, qkv, None), qkv, whole, size.scale)


@pytest.mark.parametrize("shared", [True, False])
def test_in_order_and_one_mask_for_the_batch(shared: bool) -> None:
    size = Size(batch=2, heads=2, q_len=300, kv_len=300, dim=64, q_block=128, kv_block=64)
    qkv, mask = size.qkv(torch.bfloat16), random_mask(size)
    mask = mask[:1] if shared else mask
    token_major = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    got = attend(size, (qkv[0], *token_major[1:]), size.lists(mask).ordered())
    assert_attention(got, qkv, size.allowed(mask).expand(2, -1, -1, -1), size.scale)


@aot.compiles
@pytest.mark.parametrize(("head_dim", "kv_block"), [(64, 64), (64, 128), (72, 128), (128, 64), (128, 128)])
def test_ahead_of_time(head_dim: int, kv_block: int) -> None:
    from triton.experimental.gluon._runtime import GluonASTSource

    constants = {**gluon.constants(head_dim, kv_block, None), "SPARSE": True, "ORDERED": True}
    rows = {"queries": 128, "keys": kv_block, "values": kv_block}
    tile = "tensordesc<bf16[1, 1, {}, {}],{!r}>"
    types = {name: tile.format(n, constants["D_PAD"], gluon.layout()) for name, n in rows.items()}
    kernel = aot.compiled(gluon_kernels.attend, 90, constants, 4, 3, source=GluonASTSource, **types, scale="fp32")
    aot.assert_sound(kernel, 90)
    assert aot.COPY_ENGINE in kernel.ptx
    assert aot.SPECIALISED in kernel.ptx


def test_what_is_left_to_the_triton_backend() -> None:
    size = SIZES[2]
    q, k, v = size.qkv(torch.bfloat16)
    assert gluon.fits(q, k, v, 128, 64, None, None)
    assert not gluon.fits(q, k, v, 64, 64, None, None)
    assert not gluon.fits(q, k, v, 128, 32, None, None)
    assert not gluon.fits(q, k, v, 128, 64, torch.ones(1, 512, dtype=torch.bool), None)
    assert not gluon.fits(*(x.float() for x in (q, k, v)), 128, 64, None, None)
    assert not gluon.fits(*(x[..., 1:] for x in (q, k, v)), 128, 64, None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a Hopper GPU")
def test_on_the_device() -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("wants a Hopper GPU")
    assert not gluon.unfit(device)
    for size in SIZES:
        qkv, mask = size.qkv(torch.bfloat16), random_mask(size)
        lists = size.lists(mask).to(device).ordered()
        out, lse = gluon._attend(*(x.to(device) for x in qkv), size.scale, size.kv_block, lists)
        assert_attention((out.cpu(), lse.cpu()), qkv, size.allowed(mask), size.scale)


@pytest.mark.parametrize(
    ("block", "dtype", "masked", "wanted"),
    [
        (128, torch.bfloat16, False, "gluon"),
        (64, torch.bfloat16, False, "triton"),
        (128, torch.float32, False, "triton"),
        (128, torch.bfloat16, True, "triton"),
    ],
)
def test_the_kernel_that_runs_is_named(
    block: int, dtype: torch.dtype, masked: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "gluon")
    size = Size(q_len=256, kv_len=256, q_block=block, kv_block=block, dim=64)
    qkv, lists = size.qkv(dtype), size.lists(random_mask(size))
    keys = torch.ones(size.batch, 256, dtype=torch.bool) if masked else None
    assert dk.kernel_for(*qkv, lists, key_mask=keys) == wanted
    assert dk.kernel_for(*qkv, key_mask=keys) == (wanted if block == 128 else "gluon")
