"""The Triton kernels of rows in Triton's interpreter, on the CPU. Run by test_rows.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffsparse_kernels as dk
from diffsparse_kernels import fit, rows
from diffsparse_kernels.backend.triton import launch as triton
from support import exact

DTYPES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


def test_the_interpreter_is_on() -> None:
    assert triton.INTERPRETED


def orders_of(length: int, kept: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three orders of `kept` rows and copies of some of them, their inverses, and which each head has."""
    orders = torch.stack([torch.randperm(kept) for _ in range(3)])
    orders = torch.cat([orders, orders[:, : length - kept]], 1)
    return orders, orders[:, :kept].argsort(), torch.randint(0, 3, (2, heads))


def layouts_of(x: Tensor) -> list[Tensor]:
    """The same rows in memory head by head, token by token, and with gaps."""
    gapped = torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    return [x, x.transpose(1, 2).contiguous().transpose(1, 2), gapped]


@pytest.mark.parametrize(("length", "kept", "dim"), [(1, 1, 8), (63, 63, 40), (150, 100, 72), (257, 257, 128)])
def test_rows_are_moved_and_put_back(length: int, kept: int, dim: int) -> None:
    x = torch.randn(2, 3, kept, dim).bfloat16()
    orders, inverses, picked = orders_of(length, kept, 3)
    want = x.gather(2, orders[picked][..., None].expand(-1, -1, -1, dim))
    for pick in (picked, picked[:1], picked[:, :1], picked[:1, :1]):
        wanted = rows.move_rows([x], orders, pick)[0]
        for moved in triton.move_rows(layouts_of(x), orders, pick):
            assert torch.equal(moved, wanted)
    assert torch.equal(rows.move_rows([x], orders, picked)[0], want)
    narrow = x[..., : dim // 2]
    for moved, other in zip(triton.move_rows([x, narrow, x, x], orders, picked), (x, narrow, x, x), strict=True):
        assert torch.equal(moved, want[..., : other.shape[3]])
    for moved in layouts_of(want):
        restored = triton.restore_rows(moved, inverses, picked)
        assert torch.equal(restored, x)
        assert restored.transpose(1, 2).is_contiguous()


PARTS = {"a map": (True, 0), "a residual": (False, 4), "both": (True, 3), "full rank": (True, 40)}


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("affine", "rank"), PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_a_correction_is_added_on_the_way(dtype: torch.dtype, affine: bool, rank: int, some: bool) -> None:
    x, dim = torch.randn(2, 3, 100, 40).to(dtype), 40
    made = dk.Correction(
        torch.randn(2, 3, dim, dim) / 6 if affine else None,
        torch.randn(2, 3, 1, dim) if affine else None,
        torch.randint(-127, 128, (2, 3, 100, rank), dtype=torch.int8) if rank else None,
        torch.rand(2, 3, 100, 1).bfloat16() / 64 if rank else None,
        torch.randn(2, 3, rank, dim) if rank else None,
        torch.rand(100, 1) < 0.7 if some else None,
    )
    _, inverses, picked = orders_of(100, 90, 3)
    for moved in ((inverses, picked), (None, None)):
        want = rows.restore_rows(x.double(), *moved, made)
        limit = exact.tolerance(want, rows.restore_rows(x, *moved, made))
        for one in layouts_of(x):
            got = triton.restore_rows(one, *moved, made)
            assert got.stride() == rows.restore_rows(x, *moved, made).stride()
            assert (got.double() - want).abs().max().item() <= limit


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("noise", "shift", "layout"), [(0.01, 0.0, 0), (0.3, 0.0, 1), (10.0, 0.0, 2), (1.0, 30.0, 0)], ids=str
)
def test_the_fit_to_probes(noise: float, shift: float, layout: int, rank: int) -> None:
    """Of every outcome: a map by each penalty, nothing, a mean; rows that are lost take no other with them."""
    n, dim, tokens = 29, 24, 70
    out = torch.randn(2, 2, tokens, dim)
    probes = torch.linspace(0, tokens - 1, n).long()
    codes, scale = torch.randint(-99, 99, (2, 2, tokens, rank), dtype=torch.int8), torch.rand(2, 2, tokens, 1) / 64
    basis = torch.randn(2, 2, rank, dim)
    given = {"codes": codes, "scale": scale.bfloat16(), "basis": basis} if rank else {}
    missing = 0.2 * out @ torch.randn(dim, dim) / 5 + noise * torch.randn(2, 2, tokens, dim) + shift
    missing[0] += rows.decoded(codes, scale.bfloat16())[0] @ basis[0] if rank else 0
    wanted = (out + missing)[:, :, probes]
    out[0, 0, probes[3]], wanted[1, 0, 4, 1] = torch.nan, torch.inf
    want = fit.fit_rows(wanted.double(), out.double(), probes, **given)
    low = fit.fit_rows(wanted, out, probes, **given)
    got = triton.fit_rows(wanted, layouts_of(out)[layout], probes, **given)
    for name in ("by_output", "constant", "by_code")[: 3 if rank else 2]:
        mine, exactly, rough = (getattr(x, name) for x in (got, want, low))
        assert (mine.double() - exactly).abs().max().item() <= exact.tolerance(exactly, rough)
