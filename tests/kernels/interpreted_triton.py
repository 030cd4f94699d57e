"""The Triton kernels in Triton's interpreter, on the CPU. Run by test_triton.py in a process of its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import diffsparse_kernels as dk
from diffsparse_kernels import KernelInputError, functional, strips, summaries
from diffsparse_kernels.backend.triton import launch as triton
from support import exact
from support.cases import (
    BIASES,
    KEY_MASKS,
    MASKS,
    Size,
    as_bias,
    assert_attention,
    both,
    prefixes,
    random_boxes,
    random_mask,
    seen,
    uneven,
)

DTYPES = (torch.bfloat16, torch.float16)
SIZES = [
    Size(batch=1, heads=2, q_len=200, kv_len=200, dim=64, q_block=64, kv_block=64),
    Size(batch=2, heads=1, q_len=129, kv_len=257, dim=72, q_block=64, kv_block=128),  # both ends ragged
    Size(batch=1, heads=2, q_len=256, kv_len=256, dim=128, q_block=128, kv_block=128),
    Size(batch=1, heads=1, q_len=33, kv_len=65, dim=96, q_block=16, kv_block=32),
    Size(batch=1, heads=1, q_len=1, kv_len=1, dim=8, q_block=16, kv_block=16),
    Size(batch=1, heads=2, q_len=70, kv_len=90, dim=40, value_dim=24, q_block=32, kv_block=32),
]
PADDED = [
    Size(batch=2, heads=1, q_len=70, kv_len=200, dim=64, q_block=64, kv_block=64),
    Size(batch=2, heads=1, q_len=64, kv_len=256, dim=24, q_block=64, kv_block=128),  # no end is ragged
]
CASES = list(zip(SIZES, DTYPES * 3, strict=True))
KINDS = list(zip(["random", "sparse", "full", "empty"], DTYPES * 2, strict=True))
pytestmark = pytest.mark.usefixtures("poisoned", "chip")


@pytest.fixture(params=[80, 90], ids=["pointers", "tma"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The kernel as it is for sm_80, and as it is for sm_90, where descriptors bring the tiles."""
    monkeypatch.setattr(triton, "chip", lambda device: request.param)
    return int(request.param)


def test_the_interpreter_is_on() -> None:
    assert triton.INTERPRETED


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_block_sparse(size: Size, dtype: torch.dtype, kind: str) -> None:
    qkv, mask = size.qkv(dtype), MASKS[kind](size)
    got = triton.block_sparse_attention(*qkv, size.lists(mask), size.scale, None)
    assert_attention(got, qkv, size.allowed(mask), size.scale)


def test_more_keys_than_16_bits_count() -> None:
    size = Size(batch=1, heads=1, q_len=16, kv_len=40_000, dim=16, q_block=16, kv_block=64)
    qkv, mask = size.qkv(torch.float16), torch.zeros(size.blocks, dtype=torch.bool)
    mask[..., [0, 300, 600, 624]] = True
    got = triton.block_sparse_attention(*qkv, size.lists(mask), size.scale, None)
    assert_attention(got, qkv, size.allowed(mask), size.scale)


@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_padded_keys(size: Size, dtype: torch.dtype) -> None:
    qkv, mask = size.qkv(dtype), random_mask(size, 0.7)
    keys = torch.rand(size.batch, size.kv_len) < 0.6
    keys[0] = size.batch == 1
    got = triton.block_sparse_attention(*qkv, size.lists(mask), size.scale, keys)
    assert_attention(got, qkv, size.allowed(mask, keys), size.scale)


@pytest.mark.parametrize("kind", KEY_MASKS)
@pytest.mark.parametrize("size", PADDED, ids=str)
def test_keys_padded_at_the_end(size: Size, kind: str) -> None:
    qkv, mask, keys = size.qkv(torch.float16), random_mask(size, 0.7), KEY_MASKS[kind](size)
    got = triton.block_sparse_attention(*qkv, size.lists(mask), size.scale, keys)
    assert_attention(got, qkv, size.allowed(mask, keys), size.scale)
    boxes = random_boxes(size)
    got = triton.block_sparse_attention(*qkv, size.lists(mask), size.scale, keys, boxes)
    assert_attention(got, qkv, size.allowed(mask, keys) & seen(boxes), size.scale)


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize(("size", "dtype"), [(PADDED[0], torch.bfloat16), (PADDED[1], torch.float16)], ids=str)
def test_keys_with_a_bias(size: Size, dtype: torch.dtype, kind: str) -> None:
    qkv, mask, keys = size.qkv(dtype), random_mask(size, 0.7), BIASES[kind](size)
    got = triton.block_sparse_attention(*qkv, size.lists(mask), size.scale, keys)
    assert_attention(got, qkv, size.allowed(mask, keys), size.scale)
    boxes = random_boxes(size)
    got = triton.block_sparse_attention(*qkv, size.lists(mask), -size.scale, keys, boxes)
    assert_attention(got, qkv, both(size.allowed(mask, keys), seen(boxes)), -size.scale)


@pytest.mark.parametrize("kind", KEY_MASKS)
@pytest.mark.parametrize("size", PADDED, ids=str)
def test_a_bias_that_only_hides_is_the_bool_mask(size: Size, kind: str) -> None:
    (q, k, v), lists, keys = size.qkv(torch.float16), size.lists(random_mask(size, 0.7)), KEY_MASKS[kind](size)
    cached = torch.randn(size.batch, size.heads, size.q_len) + 4

    def found(mask: torch.Tensor) -> list[torch.Tensor]:
        sizes = (size.q_block, size.kv_block, size.scale, mask)
        made = [x for x in triton.first_order(k, v, size.kv_block, size.scale, mask) if x is not None]
        fused = triton.attention_with_mass(q, k, v, cached, *sizes)
        sparse = triton.block_sparse_attention(q, k, v, lists, size.scale, mask)
        return [*sparse, *fused, triton.block_mass(q, k, cached, *sizes), *made]

    assert all(map(torch.equal, found(as_bias(keys)), found(keys)))


@pytest.mark.parametrize("kind", [*KEY_MASKS, "bias"])
@pytest.mark.parametrize("size", PADDED, ids=str)
def test_mass_of_padded_keys(size: Size, kind: str) -> None:
    (q, k, v), keys = size.qkv(torch.float16), {**KEY_MASKS, "bias": uneven}[kind](size)
    cached = torch.randn(size.batch, size.heads, size.q_len) + 4
    sizes = (size.q_block, size.kv_block, size.scale, keys)
    out, lse, fused = triton.attention_with_mass(q, k, v, cached, *sizes)
    allowed = size.allowed(torch.ones(size.blocks, dtype=torch.bool), keys)
    assert_attention((out, lse), (q, k, v), allowed, size.scale)
    weights = exact.masked(q.double() @ k.double().mT * size.scale - cached.double()[..., None], allowed).exp()
    want = exact.tile_sums(weights, size.q_block, size.kv_block)
    for mass in (fused, triton.block_mass(q, k, cached, *sizes)):
        torch.testing.assert_close(mass.double(), want, rtol=1e-5, atol=1e-6)


def test_the_mask_is_read_where_keys_are_hidden_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    size = PADDED[0]
    (q, k, v), mask, keys = size.qkv(torch.float16), MASKS["full"](size), prefixes(size, 140, 64)
    known = triton.mask_pointers(keys, q)
    known["key_mask_ptr"] = (keys & ~prefixes(size, 128, 64)).view(torch.uint8)  # wrong before the tile of the end
    monkeypatch.setattr(triton, "mask_pointers", lambda *_: known)
    got = triton.block_sparse_attention(q, k, v, size.lists(mask), size.scale, keys)
    assert_attention(got, (q, k, v), size.allowed(mask, keys), size.scale)


@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_boxes(size: Size, dtype: torch.dtype) -> None:
    qkv, mask, boxes = size.qkv(dtype), random_mask(size, 0.8), random_boxes(size, axes=3)
    got = triton.block_sparse_attention(*qkv, size.lists(mask), size.scale, None, boxes)
    assert_attention(got, qkv, size.allowed(mask) & seen(boxes), size.scale)


@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_dense_with_mass(size: Size, dtype: torch.dtype) -> None:
    q, k, v = size.qkv(dtype)
    cached = torch.randn(size.batch, size.heads, size.q_len) + 4
    cached[..., 0] = -torch.inf
    sizes = (size.q_block, size.kv_block, size.scale, None)
    out, lse, fused = triton.attention_with_mass(q, k, v, cached, *sizes)
    allowed = torch.ones(size.batch, size.heads, size.q_len, size.kv_len, dtype=torch.bool)
    assert_attention((out, lse), (q, k, v), allowed, size.scale)
    weights = (q.double() @ k.double().mT * size.scale - cached.double()[..., None]).exp()
    weights[..., 0, :] = 0
    want = exact.tile_sums(weights, size.q_block, size.kv_block)
    for mass in (fused, triton.block_mass(q, k, cached, *sizes)):
        torch.testing.assert_close(mass.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("size", "dtype"), CASES[:3], ids=str)
def test_mass_of_a_search_in_one_pass(size: Size, dtype: torch.dtype, biased: bool) -> None:
    """By the LSE that the means give: exact where keys are alike within a block, padded ones apart."""
    q, k, v = size.qkv(dtype)
    k = k[:, :, torch.arange(size.kv_len) // size.kv_block * size.kv_block]
    keys = torch.randn(size.batch, size.kv_len) if biased else torch.rand(size.batch, size.kv_len) < 0.7
    blocks = {"q_block": size.q_block, "kv_block": size.kv_block, "scale": size.scale, "key_mask": keys}
    out, lse, mass = dk.attention_with_mass(q, k, v, **blocks, backend="triton")
    want = dk.attention_with_mass(*(x.double() for x in (q, k, v)), **blocks, backend="reference")
    torch.testing.assert_close(mass.double(), want[2], rtol=0.02, atol=0.02)
    whole = size.allowed(torch.ones(size.blocks, dtype=torch.bool), keys)
    assert_attention((out, lse), (q, k, v), whole, size.scale)


@pytest.mark.parametrize("shift", [-1e4, 300.0])
def test_statistics_of_a_large_bias(shift: float) -> None:
    """No weight overflows, and none is lost."""
    size = PADDED[0]
    (_, k, v), keys = size.qkv(torch.float32), torch.randint(-2, 3, (size.batch, size.kv_len)).float()
    want = triton.first_order(k, v, size.kv_block, size.scale, keys)
    got = triton.first_order(k, v, size.kv_block, size.scale, keys + shift)
    torch.testing.assert_close(got.log_count, want.log_count + shift)
    for name in ("key", "value", "variance", "spread", "steepness"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("by", dk.summaries.SUMMARIES)
@pytest.mark.parametrize(("folded", "biased"), [(False, False), (True, False), (True, True)])
def test_summaries_merge_as_they_do_in_plain_torch(
    size: Size, dtype: torch.dtype, folded: bool, biased: bool, by: dk.Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the kernel's loop or into the output of any kernel; with padded keys, and where nothing was seen before."""
    monkeypatch.setattr(strips, "_CACHE_BYTES", 1)  # the slopes of one head at a time
    monkeypatch.setattr(summaries, "_KEPT_BYTES", 0)  # slopes are made again, as on a device
    q, k, v = size.qkv(dtype)
    q[:, :, ::2] *= 4  # their scores vary so much that the mass they add is cut off
    mask, keys = random_mask(size, 0.4), torch.rand(size.batch, size.kv_len) < 0.7
    keys = torch.randn(keys.shape).masked_fill(~keys, -torch.inf) if biased else keys
    mask[:, :, 0], mask[:, :, -1] = False, True  # of the first query block all stand for themselves, of the last none
    lists = size.lists(mask)
    exact_ = [x.double() for x in (q, k, v)]
    rest, apart = (lists, size.scale), {"key_mask": keys, "backend": "reference"}
    made = partial(dk.summarise, block=size.kv_block, key_mask=keys, by=by)
    want, want_lse = dk.block_sparse_attention(*exact_, lists, summary=made(*exact_[1:]), **apart)
    got, lse = dk.block_sparse_attention(q, k, v, lists, **apart)
    theirs = summaries.stand_ins(q, k, v, *rest, keys, made(k, v))
    low, _ = summaries.merge(q, k, v, *rest, theirs, got.clone(), lse.clone())
    theirs = triton.stand_ins(q, k, v, *rest, keys, made(k, v))
    if folded:
        got, lse = triton.block_sparse_attention(q, k, v, *rest, keys, stand_ins=theirs)
    else:
        got, lse = triton.merge(q, k, v, *rest, theirs, got, lse)
    limit = 2 * (low.double() - want).abs().max().item() + torch.finfo(dtype).eps * max(1.0, want.abs().max().item())
    assert (got.double() - want).abs().max().item() <= limit
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    alive = ~want_lse.isneginf()
    torch.testing.assert_close(lse[alive].double(), want_lse[alive], atol=2 * torch.finfo(dtype).eps, rtol=1e-2)


def test_steps_turn_with_the_sign_of_the_scale() -> None:
    size = SIZES[0]
    qkv, lists = size.qkv(torch.float32), size.lists(random_mask(size, 0.4))
    options = {"scale": -0.2, "summary": "first-order"}
    want = dk.block_sparse_attention(*(x.double() for x in qkv), lists, backend="reference", **options)
    got = dk.block_sparse_attention(*qkv, lists, backend="triton", **options)
    torch.testing.assert_close([x.double() for x in got], list(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", ["not", "bool", "bias"])
@pytest.mark.parametrize(("size", "dtype"), [*CASES, (SIZES[1], torch.float32)], ids=str)
def test_statistics(size: Size, dtype: torch.dtype, masked: str) -> None:
    """Of values of any strides that have much in common, with masks for each head, and with blocks without keys."""
    _, k, v = size.qkv(torch.float32)
    k, v = ((x + 4).to(dtype) for x in (k, v))
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    keys = torch.rand(size.batch, size.heads, size.kv_len) < 0.7 if masked != "not" else None
    if keys is not None:
        keys[0, 0] = False
        keys = torch.randn(keys.shape).masked_fill(~keys, -torch.inf) if masked == "bias" else keys
    want = summaries.first_order(k.double(), v.double(), size.kv_block, size.scale, keys)
    low = summaries.first_order(k, v, size.kv_block, size.scale, keys)
    got = triton.first_order(k, v, size.kv_block, size.scale, keys)
    assert torch.equal(got.log_count.isneginf(), want.log_count.expand(size.batch, size.heads, -1).isneginf())
    for one, other, rough in zip(got, want, low, strict=True):
        alive = other.isfinite().expand(one.shape)
        other, rough = (x.expand(one.shape)[alive] for x in (other, rough))
        if alive.any():
            summed = size.kv_block * torch.finfo(torch.float32).eps * other.abs().max().item()  # one after the other
            limit = exact.tolerance(other, rough.to(dtype)) + summed
            assert (one[alive].double() - other).abs().max().item() <= limit


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "dtype"), [*CASES, (SIZES[1], torch.float32)], ids=str)
def test_the_estimated_error_of_summaries(size: Size, dtype: torch.dtype, masked: bool) -> None:
    """By queries of any strides; a block whose keys are all masked has none, nor have those of a head without keys."""
    q, k, v = size.qkv(dtype)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    keys = torch.rand(size.batch, size.heads, size.kv_len) < (0.7 if masked else 1.1)
    if masked:
        keys[0, 0], keys[-1, -1, : size.kv_block] = False, size.heads * size.batch == 1
    made = {
        x.dtype: dk.summarise(x, y, size.kv_block, scale=size.scale, key_mask=keys if masked else None)
        for x, y in ((k, v), (k.double(), v.double()))
    }
    want = summaries.summary_error(q.double(), made[torch.float64], size.q_block, size.scale)
    low = made[dtype]._replace(key=made[dtype].key.to(dtype).float())
    limit = exact.tolerance(want, summaries.summary_error(q, low, size.q_block, size.scale))
    got = triton.summary_error(q, made[dtype], size.q_block, size.scale)
    assert got.shape == want.shape
    assert (got.double() - want).abs().max().item() <= limit
    empty = made[dtype].log_count.isneginf()[:, :, None].expand(got.shape)
    assert not got[empty].any()


def test_float32() -> None:
    size = SIZES[1]
    qkv, mask = size.qkv(torch.float32), random_mask(size)
    got = triton.block_sparse_attention(*qkv, size.lists(mask), size.scale, None)
    assert_attention(got, qkv, size.allowed(mask), size.scale)


@pytest.mark.parametrize("shared", [True, False])
def test_the_order_of_the_lists_changes_nothing(shared: bool) -> None:
    size = Size(batch=2, heads=2, q_len=200, kv_len=150, dim=16, q_block=32, kv_block=64)
    qkv, mask = size.qkv(torch.float16), random_mask(size)
    mask = mask[:1] if shared else mask
    lists = size.lists(mask).ordered()
    assert lists.order is not None
    got = triton.block_sparse_attention(*qkv, lists, size.scale, None)
    assert_attention(got, qkv, size.allowed(mask).expand(2, -1, -1, -1), size.scale)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_odd_scales(scale: float) -> None:
    size = SIZES[3]
    qkv, mask = size.qkv(torch.float16), random_mask(size)
    got = triton.block_sparse_attention(*qkv, size.lists(mask), scale, None)
    assert_attention(got, qkv, size.allowed(mask), scale)


@pytest.mark.parametrize("every", [2, 8, 32])
def test_mass_of_sampled_rows(every: int) -> None:
    size = Size(batch=1, heads=2, q_len=203, kv_len=150, dim=16, q_block=32, kv_block=64)
    q, k, _ = size.qkv(torch.float16)
    lse = torch.randn(1, 2, 203) + 4
    sizes = {"q_block": 32, "kv_block": 64, "every": every}
    want = dk.block_mass(q, k, lse, **sizes, backend="reference")
    got = triton.block_mass(
        q[:, :, ::every], k, lse[:, :, ::every], 32 // every, 64, size.scale, None
    ) * functional.rows_per_sample(203, 32, every, want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_views_of_any_strides_and_one_mask_for_the_batch() -> None:
    size = Size(batch=2, heads=2, q_len=100, kv_len=100, dim=64, q_block=32, kv_block=64)
    qkv, mask = size.qkv(torch.float16), random_mask(size)[:1]
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    fused = torch.cat(qkv, -1).split(size.dim, -1)
    gapped = [torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0] for x in qkv]
    for views in (token_major, fused, gapped):
        got = triton.block_sparse_attention(*views, size.lists(mask), size.scale, None)
        assert_attention(got, qkv, size.allowed(mask).expand(2, -1, -1, -1), size.scale)


def test_what_the_kernel_cannot_do_is_told() -> None:
    size = Size(q_block=48, kv_block=48)
    with pytest.raises(KernelInputError, match=r"wants blocks of 16, 32, 64, 128 tokens; got 48 and 48"):
        triton.block_sparse_attention(*size.qkv(torch.float32), size.lists(random_mask(size)), size.scale, None)
    with pytest.raises(KernelInputError, match="wants float32, bfloat16 or float16"):
        triton.attention(*Size().qkv(torch.float64), Size().scale, None)
    with pytest.raises(KernelInputError, match="wants heads of at most 128 channels; got 136"):
        triton.attention(*Size(dim=136).qkv(torch.float16), 1.0, None)
    assert dk.backends()["triton"] == "available"
