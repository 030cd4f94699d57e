"""The Hopper kernel without a GPU: run in threads that are as asynchronous as its warps, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import diffsparse_kernels as dk
from diffsparse_kernels.backend.gluon import kernels as gluon_kernels
from diffsparse_kernels.backend.gluon import launch as gluon
from diffsparse_kernels.backend.nvidia import LOG2E, mask_pointers
from diffsparse_kernels.case import Case
from diffsparse_kernels.lists import BlockLists, blocks_of
from support import aot, hopper
from support.cases import KEY_MASKS, MASKS, Size, assert_attention, prefixes, random_mask
from support.devices import pretended

SIZES = [
    Size(batch=1, heads=2, q_len=200, kv_len=700, dim=64, q_block=128, kv_block=64),  # turns outnumber the stages
    Size(batch=2, heads=1, q_len=257, kv_len=333, dim=72, q_block=128, kv_block=128),  # both ends ragged
    Size(batch=1, heads=1, q_len=128, kv_len=512, dim=128, q_block=128, kv_block=64),
    Size(batch=1, heads=1, q_len=1, kv_len=1, dim=96, q_block=128, kv_block=128),
]
MASKED_SIZES = [
    Size(batch=2, heads=1, q_len=130, kv_len=300, dim=64, q_block=128, kv_block=64),
    Size(batch=2, heads=1, q_len=120, kv_len=333, dim=72, q_block=128, kv_block=128),
    Size(batch=2, heads=2, q_len=128, kv_len=256, dim=128, q_block=128, kv_block=128),  # no end is ragged
]


def attend(
    size: Size, qkv: tuple[torch.Tensor, ...], lists: BlockLists | None, keys: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gluon._attend` does, on threads."""
    constants = gluon.constants(size.dim, size.kv_block, lists, keys is not None)
    programs = size.batch * size.heads * blocks_of(size.q_len, 128)
    out, lse = torch.full_like(qkv[0], torch.nan), torch.full(qkv[0].shape[:3], torch.nan)
    blocks = zip(qkv, (128, size.kv_block, size.kv_block), strict=True)
    order = None if lists is None else lists.order
    lists_of = (lse, lse) if lists is None else (lists.idx, lists.cnt)
    pointers = (out, lse, *lists_of, lse if order is None else order, *mask_pointers(keys, lse).values())
    hopper.Hopper(gluon_kernels).run(
        "attend",
        programs,
        *(hopper.Descriptor(x, [1, 1, rows, constants["D_PAD"]]) for x, rows in blocks),
        *(hopper.Pointer(x.view(-1)) for x in pointers),
        size.scale * LOG2E,
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


@pytest.mark.parametrize("kind", KEY_MASKS)
@pytest.mark.parametrize("size", MASKED_SIZES, ids=str)
def test_padded_keys(size: Size, kind: str) -> None:
    qkv, mask, keys = size.qkv(torch.bfloat16), random_mask(size), KEY_MASKS[kind](size)
    mask[0, 0, 0] = False  # an empty list
    assert_attention(attend(size, qkv, size.lists(mask), keys), qkv, size.allowed(mask, keys), size.scale)


@pytest.mark.parametrize("kind", KEY_MASKS)
def test_dense_with_padded_keys(kind: str) -> None:
    size = MASKED_SIZES[1]
    qkv, keys = size.qkv(torch.float16), KEY_MASKS[kind](size)
    allowed = keys[:, None, None].expand(-1, size.heads, size.q_len, -1)
    assert_attention(attend(size, qkv, None, keys), qkv, allowed, size.scale)


@pytest.mark.parametrize("kind", ["end", "holes"])
def test_padded_keys_and_one_mask_for_the_batch(kind: str) -> None:
    size = MASKED_SIZES[0]
    qkv, mask, keys = size.qkv(torch.bfloat16), random_mask(size, 0.7)[:1], KEY_MASKS[kind](size)
    token_major = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    got = attend(size, (qkv[0], *token_major[1:]), size.lists(mask).ordered(), keys)
    assert_attention(got, qkv, size.allowed(mask, keys), size.scale)


def test_the_mask_is_read_where_keys_are_hidden_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    size = MASKED_SIZES[0]
    qkv, mask, keys = size.qkv(torch.bfloat16), MASKS["full"](size), prefixes(size, 200, 64)
    known = mask_pointers(keys, keys)
    known["key_mask_ptr"] = (keys & ~prefixes(size, 192, 64)).view(torch.uint8)  # wrong before the tile of the end
    monkeypatch.setitem(globals(), "mask_pointers", lambda *_: known)
    assert_attention(attend(size, qkv, size.lists(mask), keys), qkv, size.allowed(mask, keys), size.scale)


def test_how_many_leading_keys_are_allowed() -> None:
    size = Size(batch=5, kv_len=70)
    keys = prefixes(size, 70, 0, 1, 33, 69)
    keys[3, 50:] = True
    wanted = torch.tensor([70, 0, 1, 33, 69], dtype=torch.int32)
    for view in (keys, keys.t().contiguous().t()):
        known = mask_pointers(view, keys)
        torch.testing.assert_close(known["clear_ptr"], wanted, rtol=0, atol=0)
        assert torch.equal(known["key_mask_ptr"].bool(), keys)
        assert known["key_mask_ptr"].is_contiguous()


@aot.compiles
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("head_dim", "kv_block"), [(64, 64), (64, 128), (72, 128), (128, 64), (128, 128)])
def test_ahead_of_time(head_dim: int, kv_block: int, masked: bool) -> None:
    from triton.experimental.gluon._runtime import GluonASTSource

    constants = {**gluon.constants(head_dim, kv_block, None, masked), "SPARSE": True, "ORDERED": True}
    rows = {"queries": 128, "keys": kv_block, "values": kv_block}
    tile = "tensordesc<bf16[1, 1, {}, {}],{!r}>"
    types = {name: tile.format(n, constants["D_PAD"], gluon.layout()) for name, n in rows.items()}
    kernel = aot.compiled(gluon_kernels.attend, 90, constants, 4, 3, source=GluonASTSource, **types, scale="fp32")
    aot.assert_sound(kernel, 90)
    assert aot.COPY_ENGINE in kernel.ptx
    assert aot.SPECIALISED in kernel.ptx


CASE = Case("attend", torch.bfloat16, 128, 128, 128, 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.float16, "head_dim": 72, "value_dim": 72, "kv_block": 128}, ""),
        ({"masked": True}, ""),
        ({"q_block": 64}, "blocks of 128 queries and 64 or 128 keys; got 64 and 64"),
        ({"kv_block": 32}, "got 128 and 32"),
        ({"axes": 1}, "no boxes"),
        ({"dtype": torch.float32}, "bfloat16 and float16; got torch.float32"),
        ({"head_dim": 256, "value_dim": 256}, "heads of at most 128 channels"),
        ({"value_dim": 64}, "as many of keys as of values"),
        ({"copyable": False}, "multiples of 16 bytes"),
    ],
)
def test_what_is_left_to_the_triton_backend(change: dict[str, Any], reason: str) -> None:
    told = gluon.case_capability(CASE._replace(**change)) or ""
    assert reason in told
    assert bool(told) == bool(reason)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a Hopper GPU")
def test_on_the_device() -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("wants a Hopper GPU")
    assert gluon.capability(device) is None
    for size in SIZES:
        qkv, mask = size.qkv(torch.bfloat16), random_mask(size)
        lists = size.lists(mask).to(device).ordered()
        for keys in (None, *(make(size) for make in KEY_MASKS.values())):
            moved = None if keys is None else keys.to(device)
            out, lse = gluon._attend(*(x.to(device) for x in qkv), size.scale, moved, size.kv_block, lists)
            assert_attention((out.cpu(), lse.cpu()), qkv, size.allowed(mask, keys), size.scale)


@pytest.fixture
def hopper_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as if it were a Hopper GPU."""
    with pretended(monkeypatch, "gluon", "triton"):
        yield


@pytest.mark.parametrize(
    ("block", "dtype", "masked", "wanted"),
    [
        (128, torch.bfloat16, False, "gluon"),
        (64, torch.bfloat16, False, "triton"),
        (128, torch.float32, False, "triton"),
        (128, torch.bfloat16, True, "gluon"),
        (64, torch.bfloat16, True, "triton"),
    ],
)
@pytest.mark.usefixtures("hopper_here")
def test_the_kernel_that_runs_is_named(block: int, dtype: torch.dtype, masked: bool, wanted: str) -> None:
    size = Size(q_len=256, kv_len=256, q_block=block, kv_block=block, dim=64)
    qkv, lists = size.qkv(dtype), size.lists(random_mask(size))
    keys = torch.ones(size.batch, 256, dtype=torch.bool) if masked else None
    choice = dk.kernel_for(*qkv, lists, key_mask=keys)
    assert choice.name == wanted
    assert bool(choice.passed_over) == (wanted == "triton")
    assert all(reason.startswith("gluon: it takes ") for reason in choice.passed_over)
    assert dk.kernel_for(*qkv, key_mask=keys).name == (wanted if block == 128 else "gluon")
