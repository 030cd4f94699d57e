"""Summaries that stand for dropped blocks, against the formulas written out block by block."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels import strips, summaries
from diffsparse_kernels.backend import cpu
from diffsparse_kernels.catalog import BACKENDS
from diffsparse_kernels.masks import readable
from support import exact
from support.cases import MASKS, Size, as_bias, both, random_boxes, random_mask, seen
from support.places import Place, places

PLACES = places("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [
    Size(),
    Size(batch=1, q_len=97, kv_len=97),  # ragged by one token
    Size(q_len=95, kv_len=95, dim=40),
    Size(q_len=64, kv_len=200, dim=72, q_block=16, kv_block=64),
    Size(dim=64, value_dim=24),
    Size(batch=1, heads=2, q_len=517, kv_len=517, dim=64, q_block=64, kv_block=64),
]
MASKED = pytest.mark.parametrize("masked", ["not", "bool", "bias"])
BOTH = pytest.mark.parametrize("by", summaries.SUMMARIES)
pytestmark = pytest.mark.usefixtures("poisoned")


class Block(NamedTuple):
    """What is known of the keys of one block of one head."""

    count: float
    key: Tensor
    value: Tensor
    variance: Tensor
    spread: Tensor
    slope: Tensor


def described(k: Tensor, v: Tensor, keys: Tensor, scale: float) -> Block:
    """k [n, D], v [n, D_v] and which of them are real, or the logs of their weights, in the dtype of the inputs."""
    real = keys if keys.dtype == torch.bool else keys > -torch.inf
    weights = torch.ones(len(k)) if keys.dtype == torch.bool else keys.exp()
    k, v, w = k[real], v[real], weights[real, None].to(k.dtype)
    count = w.double().sum().item()
    n = count or 1
    key, value = (w * k).sum(0) / n, (w * v).sum(0) / n
    slope = scale / n * (w * (k - key)).mT @ (v - value)
    variance = scale**2 * (w * (k - key) ** 2).sum() / (n * k.shape[1])
    return Block(count, key, value, variance, ((w * (v - value) ** 2).sum() / n).sqrt(), slope)


def blocks_of(k: Tensor, v: Tensor, keys: Tensor, size: Size) -> list[Block]:
    parts = (x.split(size.kv_block) for x in (k, v, keys))
    return [described(*part, size.scale) for part in zip(*parts, strict=True)]


def stands_in(q: Tensor, blocks: list[Block], scale: float, first: bool) -> tuple[Tensor, Tensor]:
    """Scores [rows, b] and values [rows, b, D_v] of blocks that a query block q [rows, D] dropped."""
    logs = [torch.tensor(b.count, dtype=q.dtype).log() for b in blocks]
    scores = torch.stack([scale * (q @ b.key) + log for b, log in zip(blocks, logs, strict=True)], -1)
    values = torch.stack([b.value for b in blocks]).expand(len(q), -1, -1)
    if not first:
        return scores, values
    squares = (q * q).sum(-1)
    mass = torch.stack([(squares * b.variance / 2).clamp(max=3) for b in blocks], -1)
    middle = torch.stack([scale * (q.mean(0) @ b.key) + log for b, log in zip(blocks, logs, strict=True)])
    shares = middle.softmax(-1).nan_to_num(0)
    slope = sum(share * b.slope for share, b in zip(shares, blocks, strict=True))
    reach = sum(share * b.spread for share, b in zip(shares, blocks, strict=True)) / 2
    step = q @ slope
    both = (step.square().sum(-1, keepdim=True) + reach**2).sqrt()
    return scores + mass, values + (step * reach / both.masked_fill(both == 0, 1))[:, None]


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Size,
    mask: Tensor,
    keys: Tensor,
    by: dk.Summary = "means",
    visible: Tensor | bool = True,
) -> tuple[Tensor, Tensor]:
    """softmax over kept keys and the summaries of dropped blocks; in the dtype of the inputs. keys: [B, H, N]."""
    kept = exact.masked(q @ k.mT * size.scale, both(size.allowed(mask, keys), torch.as_tensor(visible)))
    out, lse = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.zeros(q.shape[:3], dtype=q.dtype)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            blocks = blocks_of(k[b, h], v[b, h], keys[b, h], size)
            for number, rows in enumerate(torch.arange(size.q_len).split(size.q_block)):
                scores, values = kept[b, h, rows], v[b, h].expand(len(rows), -1, -1)
                dropped = [one for one, listed in zip(blocks, mask[b, h, number], strict=True) if not listed]
                if dropped:
                    theirs = stands_in(q[b, h, rows], dropped, size.scale, by == "first-order")
                    scores, values = torch.cat((scores, theirs[0]), -1), torch.cat((values, theirs[1]), 1)
                weights = scores.softmax(-1).nan_to_num(0)
                out[b, h, rows] = (weights[:, None] @ values)[:, 0]
                lse[b, h, rows] = scores.logsumexp(-1)
    return out, lse


def some_keys(size: Size, masked: str, by_head: bool = False) -> Tensor | None:
    """A key mask, bool or a bias; of the first sample all keys are hidden, of the last a whole block."""
    keys = torch.rand(size.batch, *((size.heads,) if by_head else ()), size.kv_len) < 0.7
    keys[0] = False
    keys[-1, ..., : size.kv_block] = size.batch == 1
    bias = torch.randn(keys.shape).masked_fill(~keys, -torch.inf)
    return {"not": None, "bool": keys, "bias": bias}[masked]


def of_all_heads(size: Size, keys: Tensor | None) -> Tensor:
    if keys is None:
        return all_keys(size)
    return keys if keys.ndim == 3 else keys[:, None].expand(-1, size.heads, -1)


def all_keys(size: Size) -> Tensor:
    return torch.ones(size.batch, size.heads, size.kv_len, dtype=torch.bool)


@BOTH
@pytest.mark.parametrize("place", PLACES)
@MASKED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "full", "empty"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dropped_blocks_stand_as_their_summaries(
    size: Size, kind: str, dtype: torch.dtype, masked: str, place: Place, by: dk.Summary
) -> None:
    """A sample without any key gets 0 and -inf, and a block without any counts for nothing."""
    qkv, mask, keys = size.qkv(dtype), MASKS[kind](size), some_keys(size, masked)
    out, lse = place(dk.block_sparse_attention, *qkv, size.lists(mask), summary=by, key_mask=keys)
    each = of_all_heads(size, keys)
    want, want_lse = written_out(*(x.double() for x in qkv), size, mask, each, by)
    low, low_lse = written_out(*qkv, size, mask, each, by)
    assert (out.double() - want).abs().max().item() <= exact.tolerance(want, low)
    alive = ~want_lse.isneginf()
    assert torch.equal(lse.isneginf(), ~alive)
    if alive.any():
        limit = exact.tolerance(want_lse[alive], low_lse[alive])
        assert (lse.double() - want_lse)[alive].abs().max().item() <= limit


@BOTH
@pytest.mark.parametrize("small", [0, math.inf], ids=["one by one", "together"])
@MASKED
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "dim", "tokens"), [(3, 40, 95), (2, 128, 200), (1, 64, 131)])
def test_the_cpu_takes_them_into_its_softmax(
    heads: int,
    dim: int,
    tokens: int,
    dtype: torch.dtype,
    masked: str,
    small: float,
    by: dk.Summary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As exact as merging them into what was computed without, few rows at a time and in lists shared by samples."""
    assert BACKENDS["cpu"].folds
    monkeypatch.setattr(cpu, "_STRIP_BYTES", 60_000)
    monkeypatch.setattr(cpu, "_SMALL", small)
    size = Size(heads=heads, q_len=tokens, kv_len=tokens, dim=dim, value_dim=dim - 8)
    qkv, boxes = size.qkv(dtype), random_boxes(size)
    mask = random_mask(size)[:1]
    mask[:, 0, 0], mask[:, 0, 1] = True, False
    keys = readable(some_keys(size, masked), qkv[0])
    lists, made = size.lists(mask), dk.summarise(*qkv[1:], 32, key_mask=keys, by=by)
    others = summaries.stand_ins(*qkv, lists, size.scale, keys, made)
    each = of_all_heads(size, keys)
    for hidden in (None, boxes):
        rest = lists, size.scale, keys, hidden
        got = cpu.block_sparse_attention(*qkv, *rest, others)
        apart = summaries.merge(*qkv, lists, size.scale, others, *cpu.block_sparse_attention(*qkv, *rest))
        visible = True if hidden is None else seen(hidden)
        mask = mask.expand(2, -1, -1, -1)
        want = written_out(*(x.double() for x in qkv), size, mask, each, by, visible)
        low = written_out(*qkv, size, mask, each, by, visible)
        for result in (got, apart):
            if dtype == torch.float64:
                torch.testing.assert_close(result, want)
                continue
            for one, exactly, rounded in zip(result, want, low, strict=True):
                alive = exactly.isfinite()
                assert torch.equal(one.isfinite(), alive)
                limit = exact.tolerance(exactly[alive], rounded[alive])
                assert (one.double() - exactly)[alive].abs().max().item() <= limit


@BOTH
@pytest.mark.parametrize("masked", ["bool", "bias"])
@pytest.mark.parametrize("place", PLACES)
def test_keys_that_each_head_has_of_its_own(place: Place, masked: str, by: dk.Summary) -> None:
    size = Size(q_len=95, kv_len=95)
    qkv, mask, keys = size.qkv(torch.float64), MASKS["random"](size), some_keys(size, masked, by_head=True)
    assert keys is not None
    qkv[0][:, :, ::2] *= 4  # their scores vary so much that the mass they add is cut off
    want = written_out(*qkv, size, mask, keys, by)
    for summary in (by, dk.summarise(*qkv[1:], 32, key_mask=keys, by=by)):
        got = place(dk.block_sparse_attention, *qkv, size.lists(mask), summary=summary, key_mask=keys)
        torch.testing.assert_close(got, want)
    spread = dk.spread(qkv[2], 32, keys)
    for head in range(size.heads):
        part, real = slice(head, head + 1), keys[:, head]
        torch.testing.assert_close(spread[:, part], dk.spread(qkv[2][:, part], 32, real))


@BOTH
@pytest.mark.parametrize("scale", [0.0, -0.25])
@pytest.mark.parametrize("place", PLACES)
def test_scores_that_are_all_zero_or_turned_round(place: Place, scale: float, by: dk.Summary) -> None:
    size = Size(q_len=95, kv_len=95)
    qkv, lists = size.qkv(torch.float32), size.lists(MASKS["random"](size))
    exact_ = [x.double() for x in qkv]
    want = dk.block_sparse_attention(*exact_, lists, summary=by, scale=scale, backend="reference")
    for summary in (by, dk.summarise(*qkv[1:], 32, scale=scale, by=by)):
        got = place(dk.block_sparse_attention, *qkv, lists, summary=summary, scale=scale)
        torch.testing.assert_close([x.double() for x in got], list(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [40, 45])
@pytest.mark.parametrize("masked", [False, True])
def test_means_and_spread_by_weights(tokens: int, masked: bool) -> None:
    x, weights = (3 + torch.randn(2, 2, tokens, 16)).bfloat16(), torch.rand(2, tokens)
    weights[0, 8:16] = not masked
    spread, means = (function(x, 8, weights.log()) for function in (dk.spread, dk.block_means))
    for number, block in enumerate(torch.arange(tokens).split(8)):
        rows, each = x[:, :, block].double(), weights[:, None, block, None].double()
        total = each.sum(2).clamp(min=1e-9)
        mean = (each * rows).sum(2) / total
        distances = (rows - mean[:, :, None]).square().sum(-1, keepdim=True)
        want = ((each * distances).sum(2) / total).sqrt()[..., 0]
        torch.testing.assert_close(spread[:, :, number].double(), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(means[:, :, number], mean.bfloat16())


@pytest.mark.parametrize("tokens", [40, 45])
@pytest.mark.parametrize("masked", [False, True])
def test_spread(tokens: int, masked: bool) -> None:
    x = 3 + torch.randn(2, 2, tokens, 16)
    keys = torch.ones(2, tokens, dtype=torch.bool)
    keys[0, 8:16] = keys[1, 19:24] = not masked
    found = dk.spread(x, 8, keys if masked else None)
    for sample in range(2):
        for number, block in enumerate(torch.arange(tokens).split(8)):
            inside = x[sample, :, block[keys[sample, block]]].double()
            want = (inside - inside.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt().nan_to_num()
            torch.testing.assert_close(found[sample, :, number].double(), want, atol=1e-4, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("place", PLACES)
def test_nothing_dropped_is_dense_and_equal_keys_lose_nothing(place: Place, by: dk.Summary) -> None:
    size = Size(q_len=95, kv_len=95)
    q, k, v = size.qkv(torch.float64)
    full, none = (MASKS[kind](size) for kind in ("full", "empty"))
    dense = dk.attention(q, k, v, backend="reference")
    torch.testing.assert_close(place(dk.block_sparse_attention, q, k, v, size.lists(full), summary=by), dense)
    blocks = torch.arange(95) // size.kv_block
    k = k[:, :, blocks * size.kv_block]  # keys alike within a block: their mean says all, even with every block dropped
    dense = dk.attention(q, k, v, backend="reference")
    torch.testing.assert_close(place(dk.block_sparse_attention, q, k, v, size.lists(none), summary=by), dense)


@BOTH
@pytest.mark.parametrize("place", PLACES)
def test_boxes_hide_keys_in_kept_blocks_only(place: Place, by: dk.Summary) -> None:
    size = Size(q_len=95, kv_len=95)
    qkv, mask, boxes = size.qkv(torch.float64), MASKS["random"](size), random_boxes(size)
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask), summary=by, boxes=boxes)
    torch.testing.assert_close(got, written_out(*qkv, size, mask, all_keys(size), by, seen(boxes)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loudness", [0.1, 1.0, 100.0])
def test_no_step_leaves_the_values(place: Place, loudness: float) -> None:
    """To first order alone a loud query would move the mean of a block by any distance."""
    size = Size(q_len=95, kv_len=70, value_dim=24)
    q, k, v = size.qkv(torch.float64)
    q, nothing = q * loudness, size.lists(MASKS["empty"](size))
    made = dk.summarise(k, v, 32)
    assert made.slope is not None
    assert made.spread is not None
    still = made._replace(slope=torch.zeros_like(made.slope))
    out, mean = (place(dk.block_sparse_attention, q, k, v, nothing, summary=one)[0] for one in (made, still))
    step = (out - mean).norm(dim=-1)
    assert (step > 0).all()
    assert (step < made.spread.amax(-1, keepdim=True) / 2).all()


@pytest.mark.parametrize("place", PLACES)
def test_summaries_made_before_and_one_slope_for_all_blocks(place: Place) -> None:
    """Without a variance no mass is added; a slope that all blocks share moves each row's values by q H."""
    size = Size(q_len=95, kv_len=70, value_dim=24)
    q, k, v = size.qkv(torch.float64)
    mask, keys = random_mask(size), all_keys(size)
    mask[:, :, 0] = True
    slope = torch.randn(2, 3, 1, 32, 24, dtype=torch.float64)
    made = dk.summarise(k, v, 32, by="means")
    assert made.by == "means"
    plain = written_out(q, k, v, size, mask, keys)
    moved = made._replace(slope=slope)
    assert moved.by == "first-order"
    out, lse = place(dk.block_sparse_attention, q, k, v, size.lists(mask), summary=moved)
    kept = dk.block_sparse_attention(q, k, v, size.lists(mask), backend="reference")[1]
    share = 1 - (kept - plain[1]).exp()[..., None]  # of the row's weight, on summaries
    torch.testing.assert_close(lse, plain[1])
    torch.testing.assert_close(out, plain[0] + share * (q @ slope[:, :, 0]))


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@MASKED
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_known_of_a_block(size: Size, dtype: torch.dtype, masked: str, offset: float) -> None:
    """Also of keys and values that have much in common: their products must not cancel."""
    _, k, v = size.qkv(torch.float32)
    k, v = ((x + offset * torch.randn(1, size.heads, 1, x.shape[3])).to(dtype) for x in (k, v))
    keys = some_keys(size, masked, by_head=True)
    made, each = dk.summarise(k, v, size.kv_block, scale=size.scale, key_mask=keys), of_all_heads(size, keys)
    for b in range(size.batch):
        for h in range(size.heads):
            whole = blocks_of(k[b, h].double(), v[b, h].double(), each[b, h], size)
            for number, want in enumerate(whole):
                got = Block(0, *(x[b, h, number].double() for x in (made[0], made[1], *made[3:5], made.slope)))
                for one, other in zip(got[1:], want[1:], strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, offset))
                count = made.log_count.expand(size.batch, size.heads, -1)[b, h, number].exp()
                assert count.item() == pytest.approx(want.count, rel=1e-5)
                steepness = want.slope.norm().item() / size.dim**0.5
                assert made.steepness[b, h, number].item() == pytest.approx(steepness, rel=1e-3, abs=1e-5 * offset)


@MASKED
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_estimated_error(size: Size, dtype: torch.dtype, masked: str) -> None:
    q, k, v = size.qkv(dtype)
    keys = some_keys(size, masked, by_head=True)
    made, each = dk.summarise(k, v, size.kv_block, scale=size.scale, key_mask=keys), of_all_heads(size, keys)
    got = dk.summary_error(q, made, q_block=size.q_block, scale=size.scale)
    assert tuple(got.shape) == size.blocks
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    for b in range(size.batch):
        for h in range(size.heads):
            blocks = blocks_of(k[b, h].double(), v[b, h].double(), each[b, h], size)
            shares = stands_in(q[b, h].double(), blocks, size.scale, False)[0].softmax(-1).nan_to_num(0)
            squares = q[b, h].double().square().sum(-1)
            for number, one in enumerate(blocks):
                first = squares * one.slope.square().sum() / size.dim
                second = (squares * one.variance * one.spread / 2) ** 2
                parts = (shares[:, number] ** 2 * (first + second)).split(size.q_block)
                want = torch.stack([part.sum() for part in parts]).sqrt()
                torch.testing.assert_close(got[b, h, :, number].double(), want, rtol=1e-4, atol=1e-6)
                assert one.count or not got[b, h, :, number].any()


@BOTH
def test_heads_in_groups_and_slopes_that_are_not_kept(monkeypatch: pytest.MonkeyPatch, by: dk.Summary) -> None:
    """Where memory is short each head comes alone, and its slopes are made where they are needed: the same result."""
    size = Size(batch=3, q_len=95, kv_len=70)
    qkv, mask = size.qkv(torch.float64), random_mask(size)
    keys = torch.rand(3, 70) < 0.7
    want = written_out(*qkv, size, mask, keys[:, None].expand(-1, 3, -1), by)
    one_head = 8 * (2 * 3 * 32 * 32 + 70 * 64)
    for heads in (1, 2, 6):  # a head, a part of a sample, two samples
        monkeypatch.setattr(strips, "_CACHE_BYTES", heads * one_head)
        for kept in (0, 2**20):
            monkeypatch.setattr(summaries, "_KEPT_BYTES", kept)
            made = dk.summarise(*qkv[1:], 32, key_mask=keys, by=by)
            assert (made.slope is not None) == (by == "first-order" and kept > 0)
            for summary in (by, made):
                got = dk.block_sparse_attention(*qkv, size.lists(mask), summary=summary, key_mask=keys)
                torch.testing.assert_close(got, want)


@BOTH
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shift", [-1e4, 300.0])
def test_a_bias_of_all_keys_moves_the_lse_alone(shift: float, place: Place, by: dk.Summary) -> None:
    """However large: no weight of a key overflows, and none is lost."""
    size = Size(q_len=95, kv_len=95)
    qkv, lists, keys = size.qkv(torch.float64), size.lists(random_mask(size)), some_keys(size, "bias")
    assert keys is not None
    for summary in (None, by):
        out, lse = place(dk.block_sparse_attention, *qkv, lists, summary=summary, key_mask=keys.double())
        moved = place(dk.block_sparse_attention, *qkv, lists, summary=summary, key_mask=keys.double() + shift)
        torch.testing.assert_close(moved, (out, lse + shift))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_that_only_hides_is_the_bool_mask(dtype: torch.dtype, by: dk.Summary) -> None:
    size = Size(q_len=95, kv_len=95)
    qkv, lists, keys = size.qkv(dtype), size.lists(random_mask(size)), some_keys(size, "bool", by_head=True)
    assert keys is not None
    same = partial(torch.testing.assert_close, atol=0, rtol=0) if dtype == torch.float32 else torch.testing.assert_close
    for want, got in zip(
        *(dk.summarise(*qkv[1:], 32, key_mask=mask, by=by) for mask in (keys, as_bias(keys))), strict=True
    ):
        same(got, want)
    for want, got in zip(
        *(dk.block_sparse_attention(*qkv, lists, key_mask=mask, summary=by) for mask in (keys, as_bias(keys))),
        strict=True,
    ):
        same(got, want)


@BOTH
def test_samples_of_a_batch_are_as_if_alone(by: dk.Summary) -> None:
    size = Size(q_len=95, kv_len=70)
    qkv, mask = size.qkv(torch.float32), random_mask(size)
    out, lse = dk.block_sparse_attention(*qkv, size.lists(mask), summary=by)
    for sample in (slice(0, 1), slice(1, 2)):
        q, k, v = (x[sample] for x in qkv)
        alone = dk.block_sparse_attention(q, k, v, size.lists(mask[sample]), summary=by)
        torch.testing.assert_close((out[sample], lse[sample]), alone)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), block=st.sampled_from([7, 16, 32]), small=st.floats(0.01, 0.3))
def test_where_values_follow_keys_first_order_is_closer(seed: int, block: int, small: float) -> None:
    """And for small scores its error is of second order: a tenth of the queries, a hundredth of it and less."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, 95, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    v = k @ torch.randn(16, 8, generator=generator, dtype=torch.float64)
    mask = torch.zeros(1, 1, 1, -(-95 // block), dtype=torch.bool)
    lists = dk.BlockLists.from_mask(mask, q_block=95, kv_block=block, q_len=95, kv_len=95)

    def error(q: Tensor, by: dk.Summary) -> float:
        want, got = dk.attention(q, k, v)[0], dk.block_sparse_attention(q, k, v, lists, summary=by)[0]
        return (got - want).norm().item()

    assert error(small * q, "first-order") < error(small * q, "means")
    assert error(small * q / 100, "first-order") < 0.02 * error(small * q / 10, "first-order")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), by=st.sampled_from(summaries.SUMMARIES))
def test_the_order_of_the_keys_within_a_block_is_nothing(seed: int, by: dk.Summary) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, 90, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(1, 2, 3, 3, generator=generator) < 0.4
    lists = dk.BlockLists.from_mask(mask, q_block=32, kv_block=32, q_len=90, kv_len=90)
    order = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in torch.arange(90).split(32)])
    got = dk.block_sparse_attention(q, k[:, :, order], v[:, :, order], lists, summary=by)
    torch.testing.assert_close(got, dk.block_sparse_attention(q, k, v, lists, summary=by))


@BOTH
def test_autocast_rounds_no_summary(by: dk.Summary) -> None:
    size = Size()
    q, k, v = size.qkv(torch.bfloat16)
    lists = size.lists(random_mask(size))

    def found() -> tuple[Tensor, ...]:
        made = dk.summarise(k, v, 32, by=by)
        error = dk.summary_error(q, dk.summarise(k, v, 32), q_block=32)
        return *dk.block_sparse_attention(q, k, v, lists, summary=made), error

    want = found()
    with torch.autocast("cpu", torch.bfloat16):
        got = found()
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    size = Size()
    q, k, v = size.qkv(torch.float32)
    lists, made = size.lists(random_mask(size)), dk.summarise(k, v, 32)
    for wrong, words in {
        "mean": "means, first-order; got 'mean'",
        dk.summarise(k, v, 16): r"key is torch.float32 \(2, 3, 3, 32\)",
        dk.summarise(k.double(), v.double(), 32): "key is torch.float32",
        made._replace(log_count=made.log_count[..., :1]): "log_count is",
        made._replace(slope=made.slope[:, :, :2]): "wanted a slope",
    }.items():
        with pytest.raises(dk.KernelInputError, match=words):
            dk.block_sparse_attention(q, k, v, lists, summary=wrong)
    with pytest.raises(dk.KernelInputError, match="Summarise by first-order"):
        dk.summary_error(q, dk.summarise(k, v, 32, by="means"), q_block=32)
    with pytest.raises(dk.KernelInputError, match="variance is"):
        dk.summary_error(q, made._replace(variance=made.variance[..., :1]), q_block=32)
    with pytest.raises(dk.KernelInputError, match="for mean keys"):
        dk.summary_error(q[:1], made, q_block=32)
    with pytest.raises(dk.KernelInputError, match="got 'both'"):
        dk.summarise(k, v, 32, by="both")  # type: ignore[arg-type]


def test_a_single_block_has_a_bound_too() -> None:
    """As it has beside another one, all of whose keys are masked; a step went hundreds of times too far."""
    q, k, v = (torch.randn(1, 1, 64, 64) * scale for scale in (30, 30, 1))

    def alone(keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        lists = dk.BlockLists.none(1, 1, 64, 64, 64, keys.shape[2], q.device)
        return dk.block_sparse_attention(q, keys, values, lists, summary="first-order", key_mask=mask)[0]

    twice = alone(torch.cat([k, k], 2), torch.cat([v, v], 2), torch.arange(128)[None] < 64)
    torch.testing.assert_close(alone(k, v, None), twice)
    assert twice.abs().max() < v.abs().max()
