"""Attention to two sets of keys, merged by the log-sum-exps, against attention to both at once in float64."""

from __future__ import annotations

import pytest
import torch

import diffsparse_kernels as dk
from support import exact
from support.cases import Size, random_mask

SIZES = [Size(), Size(batch=1, heads=2, q_len=97, kv_len=130, dim=40, value_dim=24)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_two_parts_make_the_whole(size: Size, dtype: torch.dtype) -> None:
    q, k, v = size.qkv(dtype)
    ours, theirs = random_mask(size, 0.5), random_mask(size, 0.5)
    theirs &= ~ours
    ours[0, 0, 0] = theirs[0, 0, 0] = False  # rows that see nothing
    ours[0, 1, 0], theirs[0, 1, 0] = False, True  # and rows that see keys in one part only
    parts = [exact.softmax_attention(q, k, v, size.allowed(mask), size.scale) for mask in (ours, theirs)]
    want, want_lse = exact.softmax_attention(q, k, v, size.allowed(ours | theirs), size.scale)
    wide = torch.promote_types(dtype, torch.float32)
    (out, lse), (other, other_lse) = ((out.to(dtype), lse.to(wide)) for out, lse in parts)
    got, got_lse = dk.merge_attention(out, lse, other, other_lse)
    assert got.dtype == dtype
    assert got_lse.dtype == wide
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, atol=4 * eps, rtol=4 * eps)
    torch.testing.assert_close(
        got_lse.double(), want_lse, atol=4 * torch.finfo(wide).eps, rtol=4 * torch.finfo(wide).eps
    )
    assert (got[0, 0, : size.q_block] == 0).all()
    assert got_lse[0, 0, : size.q_block].isneginf().all()


def test_large_scores_do_not_overflow() -> None:
    out, other = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    lse, other_lse = torch.tensor([[[900.0, -900.0]]]), torch.tensor([[[900.0, 900.0]]])
    got, both = dk.merge_attention(out, lse, other, other_lse)
    step = 900 * torch.finfo(torch.float32).eps  # between log-sum-exps of about 900, whose exponentials weigh the parts
    limits = {"atol": step, "rtol": step}
    torch.testing.assert_close(got[0, 0, :, 0], torch.tensor([0.5, 0.0]), **limits)
    torch.testing.assert_close(both[0, 0], torch.tensor([900.0 + torch.tensor(2.0).log().item(), 900.0]))
