"""The fit of an affine map to some rows: two launches.

The first judges, for each penalty of each head, what leaving out each row in turn says of it; the second takes the best
candidate and makes the map. All of it is float32; products run on tensor cores, each as three in tf32.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse_kernels.backend.triton.host import launch, padded, strides
from diffsparse_kernels.backend.triton.kernels import SIZES
from diffsparse_kernels.fit import LEAST_UNEXPLAINED, RIDGES
from diffsparse_kernels.measured import Tile
from diffsparse_kernels.rows import Correction

LEAST = tl.constexpr(LEAST_UNEXPLAINED)
LEAST_SQUARE = tl.constexpr(1e-24)
LOW, MIDDLE, HIGH = (tl.constexpr(ridge) for ridge in RIDGES)
PENALTIES = tl.constexpr(len(RIDGES))
CANDIDATES = tl.constexpr(2 + len(RIDGES))  # of one start: nothing, the mean, each penalty


@triton.jit
def finite(x):
    """In float32, with 0 for what is not finite."""
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def centred(x, there, n):
    """Mean of the rows that are there, [C], and each one's distance to it, 0 for all others."""
    mean = tl.sum(tl.where(there[:, None], x, 0.0), 0) / n
    return mean, tl.where(there[:, None], x - mean[None, :], 0.0)


@triton.jit
def load_got(x_at, probes_ptr, rows, n, columns, x_n, x_d, D: tl.constexpr):
    """Some columns of what some probe rows got, float32 [R, C]; 0 beyond the last."""
    at = tl.load(probes_ptr + rows, mask=rows < n, other=0).to(tl.int64)
    inside = (rows < n)[:, None] & (columns < D)[None, :]
    return finite(tl.load(x_at + at[:, None] * x_n + columns[None, :] * x_d, mask=inside, other=0.0))


@triton.jit
def load_kept(codes_ptr, scale_ptr, probes_ptr, bh, length, rows, n, RANK: tl.constexpr, RANK_PAD: tl.constexpr):
    """What was kept of some probe rows, float32 [R, RANK_PAD]; 0 beyond the last."""
    at = bh * length + tl.load(probes_ptr + rows, mask=rows < n, other=0).to(tl.int64)
    ranks = tl.arange(0, RANK_PAD)
    inside = (rows < n)[:, None] & (ranks < RANK)[None, :]
    codes = tl.load(codes_ptr + at[:, None] * RANK + ranks[None, :], mask=inside, other=0)
    return codes.to(tl.float32) * tl.load(scale_ptr + at, mask=rows < n, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_missing(
    exact_ptr, x_at, probes_ptr, codes_ptr, scale_ptr, basis_ptr, from_kept, bh, rows, n, length, columns, x_n, x_d,
    D: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
):  # fmt: skip
    """Some columns of what some probe rows miss, less what was kept if that is where the fit starts, [R, C]."""
    inside = (rows < n)[:, None] & (columns < D)[None, :]
    exact = tl.load(exact_ptr + (bh * n + rows)[:, None] * D + columns[None, :], mask=inside, other=0.0)
    missing = finite(exact.to(tl.float32) - load_got(x_at, probes_ptr, rows, n, columns, x_n, x_d, D))
    if RANK > 0:
        kept = load_kept(codes_ptr, scale_ptr, probes_ptr, bh, length, rows, n, RANK, RANK_PAD)
        ranks = tl.arange(0, RANK_PAD)
        known = (ranks < RANK)[:, None] & (columns < D)[None, :]
        basis = tl.load(basis_ptr + bh * RANK * D + ranks[:, None] * D + columns[None, :], mask=known, other=0.0)
        missing -= tl.dot(kept, basis, input_precision="tf32x3") * from_kept
    return missing


@triton.jit
def inverse(a, n, N_PAD: tl.constexpr):
    """Of a symmetric positive definite [N_PAD, N_PAD], by sweeping each of its first n rows; it needs no pivots."""
    numbers = tl.arange(0, N_PAD)
    for turn in tl.range(0, n):
        here = numbers == turn
        row = tl.sum(tl.where(here[:, None], a, 0.0), 0)  # and column
        pivot = tl.sum(tl.where(here, row, 0.0), 0)
        scaled = row / pivot
        a -= row[:, None] * scaled[None, :]
        a = tl.where(here[:, None], scaled[None, :], a)
        a = tl.where(here[None, :], tl.where(here, -1.0 / pivot, scaled)[:, None], a)
    return -a


@triton.jit(do_not_specialize=SIZES)
def judge(
    exact_ptr, x_ptr, probes_ptr, codes_ptr, scale_ptr, basis_ptr, inverse_ptr, duals_ptr, errors_ptr,
    n, length, heads, x_b, x_h, x_n, x_d,
    D: tl.constexpr, D_PAD: tl.constexpr, N_PAD: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """One penalty of one head: its dual solutions and the errors of its candidates.

    exact [B, H, n, D], contiguous, x [B, H, length, D] by its strides; probes_ptr int64 [n]. RANK > 0: codes_ptr int8
    [B, H, length, RANK], scale_ptr bfloat16 [B, H, length], basis_ptr float32 [B, H, RANK, D]. inverse_ptr float32
    [B, H, PENALTIES, N_PAD, N_PAD] is a place to put the inverse, of which products want a part at a time; duals_ptr
    [B, H, STARTS, PENALTIES, n, D], errors_ptr [B, H, STARTS * CANDIDATES]; all contiguous.
    """
    which = tl.program_id(0) % PENALTIES
    bh = (tl.program_id(0) // PENALTIES).to(tl.int64)
    x_at = x_ptr + bh // heads * x_b + bh % heads * x_h
    rows = tl.arange(0, N_PAD)
    there = rows < n
    gram = tl.zeros([N_PAD, N_PAD], tl.float32)
    squares = 0.0
    for start in tl.range(0, D_PAD, BLOCK):
        got = load_got(x_at, probes_ptr, rows, n, start + tl.arange(0, BLOCK), x_n, x_d, D)
        got = centred(got, there, n)[1]
        squares += tl.sum(got * got)
        gram = tl.dot(got, got.T, gram, input_precision="tf32x3")
    gram /= tl.maximum(squares / (n * D), LEAST_SQUARE)
    if RANK > 0:
        kept = load_kept(codes_ptr, scale_ptr, probes_ptr, bh, length, rows, n, RANK, RANK_PAD)
        kept = centred(kept, there, n)[1]
        kept *= tl.rsqrt(tl.maximum(tl.sum(kept * kept) / (n * RANK), LEAST_SQUARE))
        gram = tl.dot(kept, kept.T, gram, input_precision="tf32x3")
    penalty = tl.where(which == 0, LOW, tl.where(which == 1, MIDDLE, HIGH)) * n
    diagonal = rows[:, None] == rows[None, :]
    inverted = inverse(tl.where(diagonal, gram + tl.where(there, penalty, 1.0)[:, None], gram), n, N_PAD)
    unexplained = penalty * tl.sum(tl.where(diagonal, inverted, 0.0), 1) - 1.0 / n
    weight = tl.where(there, penalty / tl.maximum(unexplained, LEAST), 0.0)
    inverse_at = inverse_ptr + (bh * PENALTIES + which) * N_PAD * N_PAD + rows[:, None] * N_PAD
    tl.store(inverse_at + rows[None, :], inverted)
    tl.debug_barrier()
    for turn in tl.static_range(STARTS):
        nothing, mean_only, error = 0.0, 0.0, 0.0
        for start in tl.range(0, D_PAD, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            missing = load_missing(
                exact_ptr, x_at, probes_ptr, codes_ptr, scale_ptr, basis_ptr, turn, bh, rows, n, length, columns,
                x_n, x_d, D, RANK, RANK_PAD,
            )  # fmt: skip
            nothing += tl.sum(missing * missing)
            mean, missing = centred(missing, there, n)
            mean_only += tl.sum(missing * missing)
            duals = tl.zeros([N_PAD, BLOCK], tl.float32)
            for first in tl.range(0, N_PAD, BLOCK):
                some = first + tl.arange(0, BLOCK)
                part = load_missing(
                    exact_ptr, x_at, probes_ptr, codes_ptr, scale_ptr, basis_ptr, turn, bh, some, n, length, columns,
                    x_n, x_d, D, RANK, RANK_PAD,
                )  # fmt: skip
                part = tl.where((some < n)[:, None], part - mean[None, :], 0.0)
                duals = tl.dot(tl.load(inverse_at + some[None, :]), part, duals, input_precision="tf32x3")
            left_out = duals * weight[:, None]
            error += tl.sum(left_out * left_out)
            duals_at = duals_ptr + ((bh * STARTS + turn) * PENALTIES + which) * n * D
            inside = there[:, None] & (columns < D)[None, :]
            tl.store(duals_at + rows[:, None] * D + columns[None, :], duals, mask=inside)
        errors_at = errors_ptr + (bh * STARTS + turn) * CANDIDATES
        tl.store(errors_at + 2 + which, error)
        if which == 0:
            more = n / (n - 1.0)
            tl.store(errors_at, nothing)
            tl.store(errors_at + 1, mean_only * more * more)


@triton.jit(do_not_specialize=SIZES)
def combine(
    exact_ptr, x_ptr, probes_ptr, codes_ptr, scale_ptr, basis_ptr, duals_ptr, errors_ptr,
    by_output_ptr, by_code_ptr, constant_ptr,
    n, length, heads, x_b, x_h, x_n, x_d,
    D: tl.constexpr, D_PAD: tl.constexpr, N_PAD: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK: tl.constexpr, STARTS: tl.constexpr, ERRORS: tl.constexpr,
):  # fmt: skip
    """Some columns of the map of the best candidate of one head.

    As `judge`, and its results; by_output_ptr [B, H, D, D], by_code_ptr float32 [B, H, RANK, D] and constant_ptr
    [B, H, D], contiguous. ERRORS: a power of two that holds all candidates.
    """
    parts = D_PAD // BLOCK
    bh = (tl.program_id(0) // parts).to(tl.int64)
    x_at = x_ptr + bh // heads * x_b + bh % heads * x_h
    numbers = tl.arange(0, ERRORS)
    listed = numbers < STARTS * CANDIDATES
    errors = tl.load(errors_ptr + bh * STARTS * CANDIDATES + numbers, mask=listed, other=float("inf"))
    best = tl.argmin(errors, 0)
    turn, which = best // CANDIDATES, best % CANDIDATES
    columns = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    dims, ranks = tl.arange(0, D_PAD), tl.arange(0, RANK_PAD)
    constant = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([D_PAD], tl.float32)
    mean_kept = tl.zeros([RANK_PAD], tl.float32)
    for first in tl.range(0, N_PAD, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        missing = load_missing(
            exact_ptr, x_at, probes_ptr, codes_ptr, scale_ptr, basis_ptr, turn.to(tl.float32), bh, rows, n, length,
            columns, x_n, x_d, D, RANK, RANK_PAD,
        )  # fmt: skip
        constant += tl.sum(missing, 0) / n
        mean += tl.sum(load_got(x_at, probes_ptr, rows, n, dims, x_n, x_d, D), 0) / n
        if RANK > 0:
            kept = load_kept(codes_ptr, scale_ptr, probes_ptr, bh, length, rows, n, RANK, RANK_PAD)
            mean_kept += tl.sum(kept, 0) / n
    duals_at = duals_ptr + ((bh * STARTS + turn) * PENALTIES + tl.maximum(which - 2, 0)) * n * D
    by_output = tl.zeros([D_PAD, BLOCK], tl.float32)
    by_code = tl.zeros([RANK_PAD, BLOCK], tl.float32)
    squares, squares_kept = 0.0, 0.0
    for first in tl.range(0, N_PAD, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        there = (rows < n)[:, None]
        inside = there & (columns < D)[None, :] & (which > 1)
        duals = tl.load(duals_at + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)  # [R, C]
        got = load_got(x_at, probes_ptr, rows, n, dims, x_n, x_d, D)
        got = tl.where(there, got - mean[None, :], 0.0)
        squares += tl.sum(got * got)
        by_output = tl.dot(got.T, duals, by_output, input_precision="tf32x3")
        if RANK > 0:
            kept = load_kept(codes_ptr, scale_ptr, probes_ptr, bh, length, rows, n, RANK, RANK_PAD)
            kept = tl.where(there, kept - mean_kept[None, :], 0.0)
            squares_kept += tl.sum(kept * kept)
            by_code = tl.dot(kept.T, duals, by_code, input_precision="tf32x3")
    by_output /= tl.maximum(squares / (n * D), LEAST_SQUARE)
    constant = tl.where(which > 0, constant, 0.0) - tl.sum(mean[:, None] * by_output, 0)
    known = (dims < D)[:, None] & (columns < D)[None, :]
    tl.store(
        by_output_ptr + bh * D * D + dims[:, None] * D + columns[None, :],
        by_output.to(by_output_ptr.dtype.element_ty),
        mask=known,
    )
    if RANK > 0:
        by_code /= tl.maximum(squares_kept / (n * RANK), LEAST_SQUARE)
        constant -= tl.sum(mean_kept[:, None] * by_code, 0)
        codes_at = bh * RANK * D + ranks[:, None] * D + columns[None, :]
        known = (ranks < RANK)[:, None] & (columns < D)[None, :]
        by_code += tl.load(basis_ptr + codes_at, mask=known, other=0.0) * turn.to(tl.float32)
        tl.store(by_code_ptr + codes_at, by_code, mask=known)
    tl.store(constant_ptr + bh * D + columns, constant, mask=columns < D)


def fit_rows(
    exact: Tensor,
    out: Tensor,
    probes: Tensor,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    basis: Tensor | None = None,
) -> Correction:
    """`functional.fit_rows` for at most 128 rows."""
    (batch, heads, n, dim), length = exact.shape, out.shape[2]
    rank, starts = (0, 1) if codes is None else (codes.shape[3], 2)
    empty = partial(torch.empty, dtype=torch.float32, device=out.device)
    duals, errors = empty(batch, heads, starts, len(RIDGES), n, dim), empty(batch, heads, starts, 2 + len(RIDGES))
    inverses = empty(batch, heads, len(RIDGES), padded(n), padded(n))
    by_output, constant = out.new_empty(batch, heads, dim, dim), empty(batch, heads, 1, dim)
    by_code = empty(batch, heads, rank, dim) if rank else None
    given = {"exact": exact, "probes": probes, "codes": codes, "scale": scale, "basis": basis}
    arguments: dict[str, object] = {
        **{f"{name}_ptr": out if x is None else x.contiguous() for name, x in given.items()},
        "x_ptr": out,
        "duals_ptr": duals,
        "errors_ptr": errors,
        "n": n,
        "length": length,
        "heads": heads,
        **strides(x=out),
    }
    tile = JUDGE
    sizes = fit_constants(dim, n, rank, tile)
    launch(judge, batch * heads * len(RIDGES), out, tile, inverse_ptr=inverses, **arguments, **sizes)
    tile = COMBINE
    launch(
        combine,
        batch * heads * (padded(dim) // tile.keys),
        out,
        tile,
        by_output_ptr=by_output,
        by_code_ptr=out if by_code is None else by_code,
        constant_ptr=constant,
        **arguments,
        **fit_constants(dim, n, rank, tile),
        ERRORS=16,
    )
    return Correction(by_output, constant, codes, scale, by_code)


JUDGE, COMBINE = Tile(16, 8, 1), Tile(32, 4, 1)  # `keys` are rows and columns of what is multiplied at a time


def fit_constants(head_dim: int, n: int, rank: int, tile: Tile) -> dict[str, int]:
    """The constants of both kernels that sizes and tile decide."""
    sizes = {"D": head_dim, "D_PAD": padded(head_dim), "N_PAD": padded(n), "RANK": rank, "RANK_PAD": padded(rank or 1)}
    return {**sizes, "BLOCK": tile.keys, "STARTS": 2 if rank else 1}
