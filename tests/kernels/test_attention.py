"""Every kernel of every backend against float64, over odd sizes, formats, masks and views; with `-m gpu` on the GPU."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import diffsparse_kernels as dk
from diffsparse_kernels import functional
from diffsparse_kernels.backend import cpu
from support import exact
from support.cases import (
    BIASES,
    MASKS,
    Size,
    as_bias,
    assert_attention,
    both,
    random_boxes,
    random_mask,
    seen,
    uneven,
    uniform_mask,
)
from support.places import EXACT, Place, places

PLACES = places("cpu", "reference")
ON_CPU = Place("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


SIZES = [
    Size(),
    Size(batch=1, heads=1, q_len=1, kv_len=1, dim=8),
    Size(batch=1, q_len=97, kv_len=97),  # ragged by one token
    Size(q_len=95, kv_len=95, dim=40),
    Size(q_len=64, kv_len=200, dim=72, q_block=16, kv_block=64),  # cross-attention, unlike blocks
    Size(q_len=130, kv_len=30, dim=96, q_block=128, kv_block=16),
    Size(dim=64, value_dim=24),
    Size(heads=1, q_len=33, kv_len=257, dim=128, q_block=32, kv_block=128),
]
LARGE = Size(batch=1, heads=2, q_len=517, kv_len=517, dim=64, q_block=64, kv_block=64)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dense(size: Size, dtype: torch.dtype, place: Place) -> None:
    qkv = size.qkv(dtype)
    allowed = torch.ones(size.batch, size.heads, size.q_len, size.kv_len, dtype=torch.bool)
    assert_attention(place(dk.attention, *qkv), qkv, allowed, size.scale)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_block_sparse(size: Size, kind: str, dtype: torch.dtype, place: Place) -> None:
    qkv, mask = size.qkv(dtype), MASKS[kind](size)
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask))
    assert_attention(got, qkv, size.allowed(mask), size.scale)


@pytest.mark.parametrize("small", [0, math.inf], ids=["one by one", "together"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_one_gather(dtype: torch.dtype, place: Place, small: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result where the rows don't fit one gather or one strip, for blocks of much work and of little."""
    monkeypatch.setattr(cpu, "_SMALL", small)
    monkeypatch.setattr(cpu, "_GATHER_BYTES", 120_000)
    monkeypatch.setattr(cpu, "_STRIP_BYTES", 40_000)
    qkv, mask = LARGE.qkv(dtype), random_mask(LARGE, 0.4)
    got = place(dk.block_sparse_attention, *qkv, LARGE.lists(mask))
    assert_attention(got, qkv, LARGE.allowed(mask), LARGE.scale)
    whole = torch.ones(1, LARGE.heads, LARGE.q_len, LARGE.kv_len, dtype=torch.bool)
    _, lse = place(dk.attention, *qkv)
    out, again, _ = place(dk.attention_with_mass, *qkv, lse, q_block=64, kv_block=64)
    assert_attention((out, again), qkv, whole, LARGE.scale)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [Size(), Size(q_len=97, kv_len=97), LARGE], ids=str)
def test_padded_keys(size: Size, dtype: torch.dtype, place: Place) -> None:
    """Each sample has its own text length, one of them none at all."""
    qkv, mask = size.qkv(dtype), random_mask(size, 0.6)
    keys = torch.rand(size.batch, size.kv_len) < 0.7
    keys[-1, size.kv_len // 3 :] = False
    if size.batch > 1:
        keys[0] = False
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask), key_mask=keys)
    assert_attention(got, qkv, size.allowed(mask, keys), size.scale)
    whole = torch.ones_like(mask)
    assert_attention(place(dk.attention, *qkv, key_mask=keys), qkv, size.allowed(whole, keys), size.scale)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [Size(), Size(q_len=97, kv_len=95, dim=40), LARGE], ids=str)
def test_keys_with_a_bias(size: Size, dtype: torch.dtype, kind: str, place: Place) -> None:
    """Over lists, within boxes and dense, with masses too."""
    qkv, mask, keys = size.qkv(dtype), random_mask(size, 0.6), BIASES[kind](size)
    boxes = random_boxes(size)
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask), key_mask=keys)
    assert_attention(got, qkv, size.allowed(mask, keys), size.scale)
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask), key_mask=keys, boxes=boxes)
    assert_attention(got, qkv, both(size.allowed(mask, keys), seen(boxes)), size.scale)
    whole = size.allowed(torch.ones_like(mask), keys)
    assert_attention(place(dk.attention, *qkv, key_mask=keys), qkv, whole, size.scale)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("small", [0, math.inf], ids=["one by one", "together"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_head", [False, True])
def test_a_bias_that_only_hides_is_the_bool_mask(
    by_head: bool, dtype: torch.dtype, small: float, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, where the same kernel runs."""
    monkeypatch.setattr(cpu, "_SMALL", small)
    size = Size(q_len=97, kv_len=95, dim=40)
    qkv, lists = size.qkv(dtype), size.lists(random_mask(size, 0.6))
    keys = torch.rand(size.batch, *((size.heads,) if by_head else ()), size.kv_len) < 0.7
    keys[0], keys[1, ..., :32] = False, False
    blocks = {"q_block": 32, "kv_block": 32}

    def found(key_mask: torch.Tensor) -> list[torch.Tensor]:
        _, lse = place(dk.attention, *qkv, key_mask=key_mask)
        fused = place(dk.attention_with_mass, *qkv, lse, **blocks, key_mask=key_mask)
        boxed = place(dk.block_sparse_attention, *qkv, lists, key_mask=key_mask, boxes=boxes)
        mass = place(dk.block_mass, *qkv[:2], lse, **blocks, key_mask=key_mask)
        return [*place(dk.block_sparse_attention, *qkv, lists, key_mask=key_mask), *fused, *boxed, mass]

    boxes = random_boxes(size)
    for bias in (as_bias(keys), as_bias(keys).to(torch.bfloat16), as_bias(keys).double()):
        for got, want in zip(found(bias), found(keys), strict=True):
            assert not got.isnan().any()
            if place.device == "cpu":
                assert torch.equal(got, want)
            else:
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [Size(q_len=97, kv_len=95, dim=40), LARGE], ids=str)
def test_one_by_one_on_the_cpu(
    size: Size, dtype: torch.dtype, masked: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As blocks with much to multiply are computed."""
    monkeypatch.setattr(cpu, "_SMALL", 0)
    qkv, mask = size.qkv(dtype), MASKS[kind](size)
    keys = torch.rand(size.batch, size.kv_len) < 0.7 if masked else None
    got = ON_CPU(dk.block_sparse_attention, *qkv, size.lists(mask), key_mask=keys)
    assert_attention(got, qkv, size.allowed(mask, keys), size.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_onednn_the_cpu_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, mask = LARGE.qkv(dtype), random_mask(LARGE)
    want = ON_CPU(dk.block_sparse_attention, *qkv, LARGE.lists(mask))
    monkeypatch.setattr(cpu, "_onednn", lambda: None)
    got = ON_CPU(dk.block_sparse_attention, *qkv, LARGE.lists(mask))
    assert_attention(got, qkv, LARGE.allowed(mask), LARGE.scale)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shared", [False, True], ids=["own lists", "shared lists"])
def test_keys_that_each_head_has_of_its_own(shared: bool, place: Place) -> None:
    """Tokens in another order for each head carry the mask of a sample to other places."""
    size, dtype = Size(q_len=97, kv_len=97), torch.float32
    qkv, keys, boxes = size.qkv(dtype), torch.rand(size.batch, size.heads, size.kv_len) < 0.7, random_boxes(size)
    keys[0, 1] = False
    mask = random_mask(size, 0.6)
    mask = mask[:1] if shared else mask
    wide = mask.expand(size.batch, -1, -1, -1)
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask).ordered(), key_mask=keys, boxes=boxes)
    assert_attention(got, qkv, size.allowed(wide, keys) & seen(boxes), size.scale)
    whole = size.allowed(torch.ones_like(wide), keys)
    dense = place(dk.attention, *qkv, key_mask=keys)
    assert_attention(dense, qkv, whole, size.scale)
    blocks = {"q_block": size.q_block, "kv_block": size.kv_block, "key_mask": keys}
    weights = (qkv[0] @ qkv[1].mT * size.scale - dense[1][..., None]).exp().masked_fill(~whole, 0).nan_to_num(0.0)
    want = exact.tile_sums(weights, size.q_block, size.kv_block)
    out, lse, mass = place(dk.attention_with_mass, *qkv, **blocks)
    assert_attention((out, lse), qkv, whole, size.scale)
    for found in (mass, place(dk.block_mass, *qkv[:2], dense[1], **blocks)):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "full"])
@pytest.mark.parametrize("size", [*SIZES, LARGE], ids=str)
def test_boxes(size: Size, kind: str, dtype: torch.dtype, place: Place) -> None:
    """Token by token within the blocks, with padded keys on top."""
    qkv, mask, boxes = size.qkv(dtype), MASKS[kind](size), random_boxes(size)
    keys = torch.rand(size.batch, size.kv_len) < 0.8
    allowed = size.allowed(mask, keys) & seen(boxes)
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask), key_mask=keys, boxes=boxes)
    assert_attention(got, qkv, allowed, size.scale)
    bare = place(dk.block_sparse_attention, *qkv, size.lists(mask), boxes=boxes)
    assert_attention(bare, qkv, size.allowed(mask) & seen(boxes), size.scale)
    assert torch.equal(boxes.visible(), seen(boxes))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gathered", [2**22, 300_000, 60_000])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_that_share_their_boxes(
    dtype: torch.dtype, masked: bool, gathered: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of one axis, whose lists are alike in all heads or in some; few or many rows fit one gather."""
    monkeypatch.setattr(cpu, "_GATHER_BYTES", gathered)
    size = Size(batch=2, heads=5, q_len=217, kv_len=217, q_block=16, kv_block=16)
    at = torch.arange(217, dtype=torch.int32)[None]
    at[:, 200:] = -1
    boxes = dk.Boxes(at, at - 20, at + 30)
    mask = torch.nn.functional.max_pool2d(torch.eye(14)[None], 5, 1, 2).bool().expand(size.blocks).clone()
    mask[..., -2:] = True
    mask[0, 3] |= torch.rand(14, 14) < 0.5
    keys = torch.rand(2, 217) < 0.8 if masked else None
    qkv = size.qkv(dtype)
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask), key_mask=keys, boxes=boxes)
    assert_attention(got, qkv, size.allowed(mask, keys) & seen(boxes), size.scale)


@pytest.mark.parametrize("place", PLACES)
def test_wide_block_numbers_are_the_same_blocks(place: Place) -> None:
    size = Size(q_len=97, kv_len=97)
    qkv, lists = size.qkv(torch.float32), size.lists(random_mask(size))
    wide = replace(lists, idx=lists.idx.int())
    assert wide.idx.element_size() == 2 * lists.idx.element_size()
    for got, want in zip(*(place(dk.block_sparse_attention, *qkv, x) for x in (wide, lists)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("masked", ["not", "bool", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, LARGE], ids=str)
def test_mass(size: Size, dtype: torch.dtype, masked: str, place: Place) -> None:
    """Both ways to the mass, with an LSE of another step, one of whose rows never had a key."""
    q, k, v = size.qkv(dtype)
    keys = {"not": None, "bool": torch.rand(size.batch, size.kv_len) < 0.6, "bias": uneven(size)}[masked]
    lse = torch.randn(size.batch, size.heads, size.q_len) + 4
    lse[..., 0] = -torch.inf
    allowed = size.allowed(torch.ones(size.blocks, dtype=torch.bool), keys)
    scores = exact.masked(q.double() @ k.double().mT * size.scale, allowed)
    weights = (scores - lse.double()[..., None]).exp()
    weights[..., 0, :] = 0
    want = exact.tile_sums(weights, size.q_block, size.kv_block)
    low = exact.masked(q @ k.mT * size.scale, allowed).float() - lse[..., None]
    rounded = low.exp()
    rounded[..., 0, :] = 0
    limit = exact.tolerance(want, exact.tile_sums(rounded, size.q_block, size.kv_block))
    blocks = {"q_block": size.q_block, "kv_block": size.kv_block, "key_mask": keys}
    out, _, fused = place(dk.attention_with_mass, q, k, v, lse, **blocks)
    for mass in (fused, place(dk.block_mass, q, k, lse, **blocks)):
        assert mass.shape == size.blocks
        assert mass.dtype == torch.float32
        assert (mass.double() - want).abs().max().item() <= limit
    assert (out.double() - exact.softmax_attention(q, k, v, allowed, size.scale)[0]).abs().max().item() <= (
        exact.tolerance(
            exact.softmax_attention(q, k, v, allowed, size.scale)[0], exact.eager(q, k, v, allowed, size.scale)
        )
    )


@pytest.mark.parametrize("place", PLACES)
def test_mass_of_the_own_lse_sums_to_the_rows(place: Place) -> None:
    size = Size(q_len=97, kv_len=97)
    q, k, v = size.qkv(torch.float32)
    want, lse = place(dk.attention, q, k, v)
    mass = place(dk.block_mass, q, k, lse, q_block=32, kv_block=32)
    rows = torch.tensor([32.0, 32.0, 32.0, 1.0]).expand(2, 3, 4)
    torch.testing.assert_close(mass.sum(-1), rows)
    fused = place(dk.attention_with_mass, q, k, v, q_block=32, kv_block=32)
    torch.testing.assert_close(fused, (want, lse, mass))


@pytest.mark.parametrize("place", PLACES)
def test_a_row_without_keys_has_no_mass(place: Place) -> None:
    size = Size()
    q, k, v = size.qkv(torch.float32)
    keys = torch.zeros(size.batch, size.kv_len, dtype=torch.bool)
    out, lse, mass = place(dk.attention_with_mass, q, k, v, q_block=32, kv_block=32, key_mask=keys)
    assert not out.any()
    assert not mass.any()
    assert lse.isneginf().all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype: torch.dtype, place: Place) -> None:
    """Views as processors make them, [B, N, H, D] under the hood, and such with gaps; on the CPU with equal results.

    A GPU takes other tiles for what its copy engine can't read, and rounds otherwise.
    """
    size = Size(q_len=100, kv_len=100)
    qkv, mask = size.qkv(dtype), random_mask(size)
    lists = size.lists(mask)
    want = place(dk.block_sparse_attention, *qkv, lists)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    gapped = [torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0] for x in qkv]
    fused = torch.cat(qkv, -1).split(size.dim, -1)
    for views in (token_major, gapped, fused):
        got = place(dk.block_sparse_attention, *views, lists)
        assert_attention(got, qkv, size.allowed(mask), size.scale)
        if place.backend in EXACT:
            torch.testing.assert_close(got[0], want[0])


@pytest.mark.parametrize("small", [0, math.inf], ids=["one by one", "together"])
@pytest.mark.parametrize("place", PLACES)
def test_float64_is_exact(place: Place, small: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SMALL", small)
    size = SIZES[4]
    qkv, mask = size.qkv(torch.float64), random_mask(size)
    out, lse = place(dk.block_sparse_attention, *qkv, size.lists(mask))
    want, want_lse = exact.softmax_attention(*qkv, size.allowed(mask), size.scale)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("place", PLACES)
def test_one_mask_serves_the_batch(place: Place) -> None:
    size = Size(q_len=70, kv_len=70)
    qkv, mask = size.qkv(torch.float32), random_mask(size)[:1]
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask))
    assert_attention(got, qkv, size.allowed(mask).expand(2, -1, -1, -1), size.scale)


@pytest.mark.parametrize("place", PLACES)
def test_large_scores_stay_finite(place: Place) -> None:
    size = Size()
    q, k, v = size.qkv(torch.float32)
    mask = uniform_mask(size, 2)
    got = place(dk.block_sparse_attention, 100 * q, 100 * k, v, size.lists(mask))
    assert_attention(got, (100 * q, 100 * k, v), size.allowed(mask), size.scale)


@pytest.mark.parametrize("place", PLACES)
def test_parts_merge_by_their_lse(place: Place) -> None:
    """Attention over some blocks and over the others, merged by LSE, is attention over all."""
    size = Size(q_len=97, kv_len=97)
    qkv, mask = size.qkv(torch.float32), random_mask(size)
    (a, a_lse), (b, b_lse) = (place(dk.block_sparse_attention, *qkv, size.lists(m)) for m in (mask, ~mask))
    weight = torch.sigmoid(a_lse - b_lse)[..., None]
    whole, lse = place(dk.attention, *qkv)
    torch.testing.assert_close(weight * a + (1 - weight) * b, whole)
    torch.testing.assert_close(torch.logaddexp(a_lse, b_lse), lse)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("every", [1, 4, 32])
def test_mass_of_sampled_rows(every: int, place: Place) -> None:
    """Exact where all rows of a block are alike, and the plain sum over the sampled rows elsewhere."""
    size = Size(q_len=75, kv_len=97)
    q, k, _ = size.qkv(torch.float32)
    lse = torch.randn(2, 3, 75) + 4
    got = place(dk.block_mass, q, k, lse, every=every, q_block=32, kv_block=32)
    parts = [slice(start, min(start + 32, 75)) for start in (0, 32, 64)]
    weights = (q.double() @ k.double().mT * size.scale - lse.double()[..., None]).exp()
    means = [weights[:, :, rows][:, :, ::every].mean(2) * (rows.stop - rows.start) for rows in parts]
    want = exact.tile_sums(torch.stack(means, 2), 1, 32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_rows_are_sampled_evenly() -> None:
    q, k, _ = Size().qkv(torch.float32)
    with pytest.raises(dk.KernelInputError, match="every as a divisor of q_block 32; got 5"):
        dk.block_mass(q, k, torch.zeros(2, 3, 96), q_block=32, kv_block=32, every=5)


@pytest.mark.parametrize("masked", ["not", "by sample", "by head", "bias"])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_few_queries_to_keys_in_parts(parts: int, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "key_parts", lambda q, k: parts)
    q, k, v = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 24)
    keys = {"not": None, "by sample": torch.rand(2, 40) < 0.5, "by head": torch.rand(2, 3, 40) < 0.5}.get(masked)
    if keys is not None:
        keys[0] = False  # without any key
        keys[1, ..., :20] = False
    elif masked == "bias":
        keys = torch.randn(2, 40)
        keys[0], keys[1, :20] = -torch.inf, -torch.inf
    got = dk.attention_of_few(q, k, v, key_mask=keys, scale=0.3)
    want = dk.attention(q.double(), k.double(), v.double(), key_mask=keys, scale=0.3)[0]
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)


def test_keys_are_cut_where_that_fills_a_device() -> None:
    def of(heads: int, tokens: int, device: str = "meta") -> int:
        return functional.key_parts(*(torch.empty(1, heads, n, 128, device=device) for n in (128, tokens)))

    assert [of(40, 75_600), of(24, 119_056), of(5, 75_600), of(300, 75_600)] == [6, 8, 8, 1]
    assert [of(40, 75_601), of(24, 4608), of(24, 119_056, "cpu")] == [1, 1, 1]
    moved = torch.empty(1, 119_056, 24, 8, device="meta").transpose(1, 2)
    assert functional.key_parts(moved[:, :, :128], moved) == 1, "no copies of the keys"


@pytest.mark.parametrize("small", [0, math.inf], ids=["one by one", "together"])
def test_onednn_gets_no_gaps(small: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a token's heads side by side, as models have them, took it a thousand times as long as rows in a row."""
    monkeypatch.setattr(cpu, "_SMALL", small)
    strides = []

    def product(a: torch.Tensor, b: torch.Tensor, *_: object) -> torch.Tensor:
        strides.append(b.is_contiguous() or b.mT.is_contiguous())
        return a @ b.mT

    monkeypatch.setattr(cpu, "_onednn", lambda: product)
    q, k, v = (torch.randn(1, 48, 2, 16).transpose(1, 2) for _ in range(3))
    _, lse = dk.attention(q, k, v)
    dk.attention_with_mass(q, k, v, q_block=16, kv_block=16)
    dk.block_mass(q, k, lse, q_block=16, kv_block=16)
    lists = dk.BlockLists.from_mask(torch.eye(3).expand(1, 2, 3, 3) > 0, q_block=16, kv_block=16, q_len=48, kv_len=48)
    dk.block_sparse_attention(q, k, v, lists, summary="first-order")
    assert strides
    assert all(strides)


@pytest.mark.parametrize("small", [0, math.inf], ids=["one by one", "together"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_that_are_not_listed_are_not_read(
    dtype: torch.dtype, small: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of all lengths, some empty; what fills the short ones up adds nothing, with summaries or without."""
    monkeypatch.setattr(cpu, "_SMALL", small)
    (q, k, v), mask = LARGE.qkv(dtype), torch.ones(LARGE.blocks).tril().bool()
    mask[..., 0], seen = False, torch.arange(LARGE.kv_len)[None] >= 64
    for summary in (None, "means", "first-order"):
        want = ON_CPU(dk.block_sparse_attention, q, k, v, LARGE.lists(mask), key_mask=seen, summary=summary)
        poisoned = v.clone()
        poisoned[:, :, :64] = torch.nan
        got = ON_CPU(dk.block_sparse_attention, q, k, poisoned, LARGE.lists(mask), key_mask=seen, summary=summary)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
        assert not any(x.isnan().any() for x in want)


@pytest.mark.parametrize("small", [0, math.inf], ids=["one by one", "together"])
def test_an_infinite_value_stays_infinite(small: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a short list's own block, too, which nothing else may meet."""
    monkeypatch.setattr(cpu, "_SMALL", small)
    q, k, v = torch.randn(3, 1, 1, 4, 8)
    v[0, 0, 0, 0] = torch.inf
    lists = dk.BlockLists.from_mask(
        torch.tensor([[[[True, True], [True, False]]]]), q_block=2, kv_block=2, q_len=4, kv_len=4
    )
    out = ON_CPU(dk.block_sparse_attention, q, k, v, lists)[0]
    assert out[0, 0, :, 0].isposinf().all()
    assert out[..., 1:].isfinite().all()


def test_the_first_default_dtype_does_not_choose_the_product() -> None:
    """float64 by default, when oneDNN is asked for the first time, cost a process its product for good."""
    cpu._onednn.cache_clear()
    want = cpu._onednn() is None
    cpu._onednn.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert (cpu._onednn() is None) == want
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_of_one_thread_is_not_anothers() -> None:
    """Each call has a state of its own, where a shared one gave back what another thread had set."""
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    inside, outside = threading.Barrier(2), []

    def slow(*_: object) -> Iterator[object]:
        inside.wait(60)
        yield from ()

    def work(cast: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            cpu.attention(q, k, v, 0.25, None)
            outside.append((cast, torch.is_autocast_enabled("cpu")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_strips", slow)
        patch.setattr(cpu, "_joined", lambda *_: (q, q))
        both = [threading.Thread(target=work, args=(cast,)) for cast in (False, True)]
        for each in both:
            each.start()
        for each in both:
            each.join()
    assert sorted(outside) == [(False, False), (True, True)]
