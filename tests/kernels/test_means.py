"""Mean keys and values that stand for dropped blocks, against the formula written out block by block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffsparse_kernels as dk
from support import exact
from support.cases import MASKS, Size, random_boxes, seen
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
pytestmark = pytest.mark.usefixtures("poisoned")


def written_out(
    q: Tensor, k: Tensor, v: Tensor, size: Size, mask: Tensor, keys: Tensor, visible: Tensor | bool = True
) -> tuple[Tensor, Tensor]:
    """softmax over kept keys and, with weight n, the means of dropped blocks; in the dtype of the inputs."""
    scores = [(q @ k.mT * size.scale).masked_fill(~(size.allowed(mask, keys) & visible), -torch.inf)]
    values = [v]
    rows = torch.arange(size.q_len) // size.q_block
    for block, part in enumerate(torch.arange(size.kv_len).split(size.kv_block)):
        real = keys[:, part]  # [B, n]
        count = real.sum(-1)
        share = (real / count.clamp(min=1)[:, None]).to(q.dtype)[:, None, None]  # [B, 1, 1, n]
        key, value = share @ k[:, :, part], share @ v[:, :, part]  # [B, H, 1, D]
        score = q @ key.mT * size.scale + count.to(q.dtype).log()[:, None, None, None]
        scores.append(score.masked_fill(mask[:, :, rows, block, None], -torch.inf))
        values.append(value)
    whole = torch.cat(scores, -1)
    return whole.softmax(-1).nan_to_num(0.0) @ torch.cat(values, 2), whole.logsumexp(-1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_means(size: Size, kind: str, dtype: torch.dtype, masked: bool, place: Place) -> None:
    qkv, mask = size.qkv(dtype), MASKS[kind](size)
    keys = torch.rand(size.batch, size.kv_len) < (0.7 if masked else 1.1)
    if masked:
        keys[0] = False  # a sample without any key gets 0 and -inf
    out, lse = place(dk.block_sparse_attention, *qkv, size.lists(mask), means=True, key_mask=keys if masked else None)
    want, want_lse = written_out(*(x.double() for x in qkv), size, mask, keys)
    low, low_lse = written_out(*qkv, size, mask, keys)
    assert (out.double() - want).abs().max().item() <= exact.tolerance(want, low)
    alive = ~want_lse.isneginf()
    assert torch.equal(lse.isneginf(), ~alive)
    if alive.any():
        limit = exact.tolerance(want_lse[alive], low_lse[alive])
        assert (lse.double() - want_lse)[alive].abs().max().item() <= limit


@pytest.mark.parametrize("place", PLACES)
def test_keys_that_each_head_has_of_its_own(place: Place) -> None:
    size = Size(q_len=95, kv_len=95)
    qkv, mask, keys = size.qkv(torch.float64), MASKS["random"](size), torch.rand(2, 3, 95) < 0.6
    keys[0, 1, :40] = False  # a whole block
    out, lse = place(dk.block_sparse_attention, *qkv, size.lists(mask), means=True, key_mask=keys)
    mass = dk.means_mass(*qkv[:2], lse, q_block=32, kv_block=32, key_mask=keys)
    spread = dk.spread(qkv[2], 32, keys)
    for head in range(size.heads):
        part, seen = slice(head, head + 1), keys[:, head]
        want, want_lse = written_out(*(x[:, part] for x in qkv), size, mask[:, part], seen)
        torch.testing.assert_close((out[:, part], lse[:, part]), (want, want_lse))
        q, k, v = (x[:, part] for x in qkv)
        alone = dk.means_mass(q, k, lse[:, part], q_block=32, kv_block=32, key_mask=seen)
        torch.testing.assert_close(mass[:, part], alone)
        torch.testing.assert_close(spread[:, part], dk.spread(v, 32, seen))


@pytest.mark.parametrize("place", PLACES)
def test_nothing_dropped_is_dense_and_equal_keys_lose_nothing(place: Place) -> None:
    size = Size(q_len=95, kv_len=95)
    q, k, v = size.qkv(torch.float64)
    full, none = (MASKS[kind](size) for kind in ("full", "empty"))
    dense, dense_lse = dk.attention(q, k, v, backend="reference")
    out, lse = place(dk.block_sparse_attention, q, k, v, size.lists(full), means=True)
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(lse, dense_lse)
    blocks = torch.arange(95) // size.kv_block
    k = k[:, :, blocks * size.kv_block]  # keys alike within a block: their mean says all, even with every block dropped
    dense, dense_lse = dk.attention(q, k, v, backend="reference")
    out, lse = place(dk.block_sparse_attention, q, k, v, size.lists(none), means=True)
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(lse, dense_lse)


@pytest.mark.parametrize("place", PLACES)
def test_boxes_hide_keys_in_kept_blocks_only(place: Place) -> None:
    size = Size(q_len=95, kv_len=95)
    qkv, mask, boxes = size.qkv(torch.float64), MASKS["random"](size), random_boxes(size)
    got = place(dk.block_sparse_attention, *qkv, size.lists(mask), means=True, boxes=boxes)
    want = written_out(*qkv, size, mask, torch.ones(size.batch, size.kv_len, dtype=torch.bool), seen(boxes))
    torch.testing.assert_close(got, want)
