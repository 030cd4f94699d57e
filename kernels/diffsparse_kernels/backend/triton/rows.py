"""Rows of tokens moved, and put back with a correction: one launch each."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse_kernels.backend.triton.host import launch, padded, strides, upcast
from diffsparse_kernels.backend.triton.kernels import SIZES
from diffsparse_kernels.lists import blocks_of
from diffsparse_kernels.measured import Tile
from diffsparse_kernels.rows import Correction

_MOST = 3  # tensors in one launch


@triton.jit
def row_numbers(orders_ptr, picked_ptr, b, h, places, length, picked_b, picked_h):
    """Which rows come to some places of a head, int64; 0 beyond the last place."""
    order = tl.load(picked_ptr + b * picked_b + h * picked_h).to(tl.int64)
    return tl.load(orders_ptr + order * length + places, mask=places < length, other=0).to(tl.int64)


@triton.jit
def move_tile(x_ptr, out_ptr, at, inside, dims, to, x_b, x_h, x_n, x_d, b, h, D: tl.constexpr):
    """Rows `at` of a head to the rows `to` of a tensor without gaps."""
    x = tl.load(x_ptr + b * x_b + h * x_h + at[:, None] * x_n + dims[None, :] * x_d, mask=inside, other=0.0)
    tl.store(out_ptr + to[:, None] * D + dims[None, :], x, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def move(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, orders_ptr, picked_ptr,
    length, heads, picked_b, picked_h,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head of the first COUNT tensors in their order.

    q, k, v [B, H, N, D] by their strides; the outputs [B, H, length, D], contiguous; orders_ptr int64 [orders, length],
    picked_ptr int64 [B|1, H|1] by its strides. Exact.
    """
    tiles = tl.cdiv(length, ROWS)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    places = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    there, to = (places < length)[:, None], bh * length + places
    at = row_numbers(orders_ptr, picked_ptr, b, h, places, length, picked_b, picked_h)
    dims = tl.arange(0, D_PAD)
    inside = there & (dims < D)[None, :]
    move_tile(q_ptr, q_out_ptr, at, inside, dims, to, q_b, q_h, q_n, q_d, b, h, D)
    if COUNT > 1:
        move_tile(k_ptr, k_out_ptr, at, inside, dims, to, k_b, k_h, k_n, k_d, b, h, D)
    if COUNT > 2:
        move_tile(v_ptr, v_out_ptr, at, inside, dims, to, v_b, v_h, v_n, v_d, b, h, D)


@triton.jit(do_not_specialize=SIZES)
def restore(
    x_ptr, inverses_ptr, picked_ptr, by_output_ptr, constant_ptr, codes_ptr, scale_ptr, by_code_ptr, rows_ptr, out_ptr,
    length, tokens, heads, picked_b, picked_h, x_b, x_h, x_n, x_d, out_b, out_h, out_n,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    MOVED: tl.constexpr, AFFINE: tl.constexpr, CODED: tl.constexpr, SOME: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head: their rows, corrected, from wherever these stand.

    x [B, H, length, D] and out [B, H, tokens, D] by their strides. MOVED: inverses_ptr int64 [orders, tokens],
    picked_ptr as in `move`. AFFINE: by_output_ptr [B, H, D, D], constant_ptr float32 [B, H, D]. CODED: codes_ptr int8
    [B, H, length, RANK], scale_ptr bfloat16 [B, H, length], by_code_ptr float32 [B, H, RANK, D]. SOME: rows_ptr uint8
    [length], those that are corrected. Factors are rounded to x's dtype, sums are float32 and rounded once: the error
    is within that of the same in plain torch.
    """
    tiles = tl.cdiv(tokens, ROWS)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    places = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    there = places < tokens
    at = places.to(tl.int64)
    if MOVED:
        at = row_numbers(inverses_ptr, picked_ptr, b, h, places, tokens, picked_b, picked_h)
    dims = tl.arange(0, D_PAD)
    inside = there[:, None] & (dims < D)[None, :]
    row_at = x_ptr + b * x_b + h * x_h + at[:, None] * x_n
    factor = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    added = tl.zeros([ROWS, D_PAD], tl.float32)
    if AFFINE:
        added += tl.load(constant_ptr + bh * D + dims, mask=dims < D, other=0.0)[None, :]
        for start in tl.range(0, D_PAD, BLOCK):
            some = start + tl.arange(0, BLOCK)
            part = tl.load(row_at + some[None, :] * x_d, mask=there[:, None] & (some < D)[None, :], other=0.0)
            square = (some < D)[:, None] & (dims < D)[None, :]
            by_output = tl.load(by_output_ptr + bh * D * D + some[:, None] * D + dims[None, :], mask=square, other=0.0)
            added = tl.dot(part.to(factor), by_output.to(factor), added, input_precision="tf32x3")
    if CODED:
        ranks = tl.arange(0, RANK_PAD)
        coded = there[:, None] & (ranks < RANK)[None, :]
        codes = tl.load(codes_ptr + (bh * length + at)[:, None] * RANK + ranks[None, :], mask=coded, other=0)
        scale = tl.load(scale_ptr + bh * length + at, mask=there, other=0.0).to(tl.float32)
        coefficients = codes.to(tl.float32) * scale[:, None]
        known = (ranks < RANK)[:, None] & (dims < D)[None, :]
        by_code = tl.load(by_code_ptr + bh * RANK * D + ranks[:, None] * D + dims[None, :], mask=known, other=0.0)
        added = tl.dot(coefficients.to(factor), by_code.to(factor), added, input_precision="tf32x3")
    if SOME:
        mended = tl.load(rows_ptr + at, mask=there, other=0) != 0
        added = tl.where(mended[:, None], added, 0.0)
    x = tl.load(row_at + dims[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)
    out_at = out_ptr + b * out_b + h * out_h + places.to(tl.int64)[:, None] * out_n + dims[None, :]
    tl.store(out_at, (x + added).to(out_ptr.dtype.element_ty), mask=inside)


def move_rows(tensors: Sequence[Tensor], orders: Tensor, picked: Tensor) -> list[Tensor]:
    """Rows of each head by number: tensors of one head size in one launch, up to three of them."""
    if len(tensors) > _MOST or len({x.shape[3] for x in tensors}) > 1:
        return [moved for x in tensors for moved in move_rows([x], orders, picked)]
    (batch, heads, _, dim), length = tensors[0].shape, orders.shape[1]
    made = [x.new_empty(batch, heads, length, dim) for x in tensors]
    unread = [0] * (_MOST - len(tensors))
    q, k, v = (tensors[i] for i in (*range(len(tensors)), *unread))
    tile = move_tile_of(q.element_size())
    launch(
        move,
        batch * heads * blocks_of(length, tile.keys),
        q,
        tile,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        **{f"{name}_out_ptr": x for name, x in zip("qkv", (*made, *(made[i] for i in unread)), strict=True)},
        orders_ptr=orders,
        **_picked_arguments(picked, batch, heads),
        length=length,
        heads=heads,
        **strides(q=q, k=k, v=v),
        **move_constants(dim, tile),
        COUNT=len(tensors),
    )
    return made


def move_tile_of(itemsize: int) -> Tile:
    """The tile of `move`; its `keys` are rows."""
    return Tile(64 if itemsize == 2 else 32, 4, 1)


def move_constants(head_dim: int, tile: Tile) -> dict[str, int]:
    """The constants of `move` that sizes and tile decide."""
    return {"D": head_dim, "D_PAD": padded(head_dim), "ROWS": tile.keys}


def restore_rows(
    x: Tensor, inverses: Tensor | None, picked: Tensor | None, correction: Correction | None = None
) -> Tensor:
    """Rows corrected and by number, stored as [B, N, H, D] where they move."""
    (batch, heads, length, dim), tokens = x.shape, x.shape[2] if inverses is None else inverses.shape[1]
    out = x.new_empty(x.shape) if inverses is None else x.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    made = correction or Correction()
    rank = 0 if made.codes is None else made.codes.shape[3]
    tile = restore_tile(x.element_size())
    launch(
        restore,
        batch * heads * blocks_of(tokens, tile.keys),
        x,
        tile,
        x_ptr=x,
        inverses_ptr=x if inverses is None else inverses,
        **_picked_arguments(x[:, :, 0, 0] if picked is None else picked, batch, heads),
        **{f"{name}_ptr": x if part is None else part for name, part in _parts(made).items()},
        out_ptr=out,
        length=length,
        tokens=tokens,
        heads=heads,
        **strides(x=x),
        out_b=out.stride(0),
        out_h=out.stride(1),
        out_n=out.stride(2),
        **restore_constants(dim, rank, tile),
        MOVED=inverses is not None,
        AFFINE=made.by_output is not None,
        SOME=made.rows is not None,
        UPCAST=upcast(x),
    )
    return out


def restore_tile(itemsize: int) -> Tile:
    """The tile of `restore`; its `keys` are rows."""
    return Tile(64 if itemsize == 2 else 32, 8, 1)


def restore_constants(head_dim: int, rank: int, tile: Tile) -> dict[str, int]:
    """The constants of `restore` that sizes and tile decide."""
    sizes = {"D": head_dim, "D_PAD": padded(head_dim), "ROWS": tile.keys}
    return {**sizes, "BLOCK": 16, "RANK": rank, "RANK_PAD": padded(rank or 1), "CODED": rank > 0}


def _parts(correction: Correction) -> dict[str, Tensor | None]:
    """The parts of a correction as kernels read them."""
    parts = {name: None if x is None else x.contiguous() for name, x in correction._asdict().items()}
    rows = parts["rows"]
    return {**parts, "rows": None if rows is None else rows.view(torch.uint8)}


def _picked_arguments(picked: Tensor, batch: int, heads: int) -> dict[str, Tensor | int]:
    wide = picked.expand(batch, heads)
    return {"picked_ptr": picked, "picked_b": wide.stride(0), "picked_h": wide.stride(1)}
