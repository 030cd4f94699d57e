"""Attention on NVIDIA GPUs in Triton: one kernel, of which each public function is a special case.

A program computes `BLOCK_M` query rows of one head. It walks over its key blocks (all of them, or those of a list) in
tiles of `BLOCK_N` keys with the online softmax of FlashAttention-2, in base 2. The mass of a tile against a cached LSE
needs no second exponential of the scores: the row sums of the tile are there already, and only have to be scaled from
the running maximum to the cached LSE.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse_kernels.errors import KernelInputError
from diffsparse_kernels.lists import BlockLists, Boxes, blocks_of

BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """Keys of one tile, and how the compiler shall spread it."""

    block_n: int
    num_warps: int
    num_stages: int


# (compute capability, padded head size) -> tile for 128 query rows, tile for 64 and fewer; larger sizes fall through.
# Chosen by compiling ahead of time: nothing spills, and two stages of keys and values fit the shared memory.
TILES: dict[tuple[int, int], tuple[Tile, Tile]] = {
    (80, 64): (Tile(64, 8, 3), Tile(64, 4, 3)),
    (80, 128): (Tile(64, 8, 2), Tile(32, 4, 2)),
    (90, 64): (Tile(64, 8, 3), Tile(64, 4, 3)),
    (90, 128): (Tile(64, 8, 3), Tile(64, 4, 3)),
    (120, 64): (Tile(64, 8, 2), Tile(64, 4, 2)),
    (120, 128): (Tile(64, 8, 2), Tile(32, 4, 2)),
}


def tile_for(capability: int, head_dim: int, q_block: int, kv_block: int) -> Tile:
    """The tile for a chip such as 90, or for the nearest smaller one that the table has."""
    chip = max(chip for chip, _ in TILES if chip <= max(capability, 80))
    wide, narrow = TILES[chip, 64 if _padded(head_dim) <= 64 else 128]
    tile = wide if q_block == 128 else narrow
    return tile._replace(block_n=min(tile.block_n, kv_block))


def break_even(dtype: torch.dtype, head_dim: int, block: int) -> float:
    """Density above which dense attention is faster: plain Triton reaches about 70 % of the best dense kernel."""
    return 0.65


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    out, lse, _ = _run(q, k, v, scale, key_mask, q_block=128, kv_block=64)
    return out, lse


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its LSE and the block mass, one pass."""
    out, new_lse, mass = _run(q, k, v, scale, key_mask, q_block=q_block, kv_block=kv_block, cached=lse)
    return out, new_lse, mass


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Sum of exp(score - lse) over each tile, one pass over keys."""
    if 100 <= _capability(q) < 120:  # Triton's compiler fails there on a kernel without the second product
        return attention_with_mass(q, k, k, lse, q_block, kv_block, scale, key_mask)[2]
    return _run(q, k, None, scale, key_mask, q_block=q_block, kv_block=kv_block, cached=lse)[2]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    boxes: Boxes | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks."""
    q_block, kv_block = lists.q_block, lists.kv_block
    out, lse, _ = _run(q, k, v, scale, key_mask, q_block=q_block, kv_block=kv_block, lists=lists, boxes=boxes)
    return out, lse


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    *,
    q_block: int,
    kv_block: int,
    lists: BlockLists | None = None,
    cached: Tensor | None = None,
    boxes: Boxes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what is asked for, and launch; outputs that are not asked for are empty."""
    _check(q, q_block, kv_block)
    batch, heads, n_q, head_dim = q.shape
    n_kv, value_dim = k.shape[2], head_dim if v is None else v.shape[3]
    out = q.new_empty(batch, heads, n_q, value_dim) if v is not None else q.new_empty(0)
    lse = q.new_empty(batch, heads, n_q, dtype=torch.float32) if v is not None else q.new_empty(0)
    mass_shape = (batch, heads, blocks_of(n_q, q_block), blocks_of(n_kv, kv_block)) if cached is not None else (0,)
    mass = q.new_empty(mass_shape, dtype=torch.float32)
    values = k if v is None else v
    capability = _capability(q)
    tile = tile_for(capability, max(head_dim, value_dim), q_block, kv_block)
    lists_batch = 0 if lists is None or lists.idx.shape[0] == 1 else 1
    grid = (blocks_of(n_q, q_block), batch * heads)
    with torch.cuda.device_of(q):
        _attend[grid](
            q,
            k,
            values,
            out,
            lse,
            mass,
            q if cached is None else cached.float().contiguous(),
            q if lists is None else lists.idx,
            q if lists is None else lists.cnt,
            q if key_mask is None else key_mask.contiguous().view(torch.uint8),
            *((q, q, q) if boxes is None else (x.contiguous() for x in boxes)),
            scale * LOG2E,
            n_q,
            n_kv,
            heads,
            0 if lists is None else lists.idx.shape[3],
            lists_batch,
            *q.stride(),
            *k.stride(),
            *values.stride(),
            D=head_dim,
            D_V=value_dim,
            D_PAD=_padded(head_dim),
            DV_PAD=_padded(value_dim),
            Q_BLOCK=q_block,
            KV_BLOCK=kv_block,
            BLOCK_N=tile.block_n,
            SPARSE=lists is not None,
            MASKED=key_mask is not None,
            AXES=0 if boxes is None else boxes.place.shape[0],
            VALUES=v is not None,
            MASS=cached is not None,
            RAGGED=n_kv % kv_block != 0,
            UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out, lse, mass


def _check(q: Tensor, q_block: int, kv_block: int) -> None:
    if q_block not in BLOCKS or kv_block not in BLOCKS:
        raise KernelInputError(
            f"the triton backend wants blocks of {', '.join(map(str, BLOCKS))} tokens; got {q_block} and {kv_block}. "
            "Choose one of these, or backend='reference'"
        )
    if q.dtype not in DTYPES:
        raise KernelInputError(
            f"the triton backend wants float32, bfloat16 or float16; got {q.dtype}. Use backend='reference'"
        )


def _padded(head_dim: int) -> int:
    """Head sizes are padded to powers of two in registers, at least the 16 that tensor cores want."""
    return int(max(16, triton.next_power_of_2(head_dim)))


def _capability(q: Tensor) -> int:
    if not q.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(q.device)
    return int(10 * major + minor)


@triton.jit  # type: ignore[untyped-decorator]
def _in_box(  # type: ignore[no-untyped-def]
    scores, place_ptr, low_ptr, high_ptr, rows, columns, n_q, n_kv, AXES: tl.constexpr
):
    """-inf where a key's place is outside the query's box on some axis; a negative first place is inside all."""
    first = tl.load(place_ptr + columns, mask=columns < n_kv, other=0)
    for axis in tl.static_range(AXES):
        place = tl.load(place_ptr + axis * n_kv + columns, mask=columns < n_kv, other=0)[None, :]  # [1, BLOCK_N]
        low = tl.load(low_ptr + axis * n_q + rows, mask=rows < n_q, other=0)[:, None]  # [M, 1]
        high = tl.load(high_ptr + axis * n_q + rows, mask=rows < n_q, other=0)[:, None]
        inside = (low <= place) & (place <= high) | (first < 0)[None, :]
        scores = tl.where(inside, scores, -float("inf"))
    return scores


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    mass_ptr,
    cached_ptr,
    idx_ptr,
    cnt_ptr,
    key_mask_ptr,
    place_ptr,
    low_ptr,
    high_ptr,
    scale_log2,
    n_q,
    n_kv,
    heads,
    width,
    lists_batch,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    D: tl.constexpr,
    D_V: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPARSE: tl.constexpr,
    MASKED: tl.constexpr,
    AXES: tl.constexpr,
    VALUES: tl.constexpr,
    MASS: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One query block of one head; every pointer but q_ptr and k_ptr may be a stand-in that its flag leaves unread."""
    row_block = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    q_blocks = tl.cdiv(n_q, Q_BLOCK)
    kv_blocks = tl.cdiv(n_kv, KV_BLOCK)
    rows = row_block * Q_BLOCK + tl.arange(0, Q_BLOCK)  # [M]
    dims = tl.arange(0, D_PAD)
    dims_v = tl.arange(0, DV_PAD)
    tile = tl.arange(0, BLOCK_N)
    PARTS: tl.constexpr = KV_BLOCK // BLOCK_N
    q_mask = (rows < n_q)[:, None] & (dims < D)[None, :]
    q_at = q_ptr + b * q_b + h * q_h + rows[:, None].to(tl.int64) * q_n + dims[None, :] * q_d
    q = tl.load(q_at, mask=q_mask, other=0.0)  # [M, D]
    if UPCAST:
        q = q.to(tl.float32)
    k_at = k_ptr + b * k_b + h * k_h
    v_at = v_ptr + b * v_b + h * v_h
    highest = tl.full([Q_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([Q_BLOCK], tl.float32)
    acc = tl.zeros([Q_BLOCK, DV_PAD], tl.float32)
    row_at = bh.to(tl.int64) * n_q + rows
    if MASS:
        cached = tl.load(cached_ptr + row_at, mask=rows < n_q, other=float("inf"))
        cached = tl.where(tl.abs(cached) < float("inf"), cached * 1.4426950408889634, float("inf"))
        mass_at = mass_ptr + (bh.to(tl.int64) * q_blocks + row_block) * kv_blocks
    if SPARSE:
        list_at = ((b * lists_batch) * heads + h) * q_blocks + row_block
        visits = tl.load(cnt_ptr + list_at)
        idx_at = idx_ptr + list_at * width
    else:
        visits = kv_blocks
    held = tl.zeros([Q_BLOCK], tl.float32)
    for turn in range(visits * PARTS):
        block = turn // PARTS
        part = turn % PARTS
        if SPARSE:
            block = tl.load(idx_at + block)
        columns = block * KV_BLOCK + part * BLOCK_N + tile  # [BLOCK_N]
        k_mask = (dims < D)[:, None]
        if RAGGED:
            k_mask = k_mask & (columns < n_kv)[None, :]
        k = tl.load(k_at + columns[None, :].to(tl.int64) * k_n + dims[:, None] * k_d, mask=k_mask, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale_log2  # [M, BLOCK_N]
        if RAGGED:
            scores = tl.where((columns < n_kv)[None, :], scores, -float("inf"))
        if MASKED:
            allowed = tl.load(key_mask_ptr + b * n_kv + columns, mask=columns < n_kv, other=0)
            scores = tl.where((allowed != 0)[None, :], scores, -float("inf"))
        if AXES > 0:
            scores = _in_box(scores, place_ptr, low_ptr, high_ptr, rows, columns, n_q, n_kv, AXES)
        top = tl.max(scores, 1)
        now = tl.maximum(highest, top) if VALUES else top
        base = tl.where(now == -float("inf"), 0.0, now)
        weights = tl.math.exp2(scores - base[:, None])
        part_sum = tl.sum(weights, 1)
        if MASS:
            held = tl.where(part == 0, 0.0, held) + part_sum * tl.math.exp2(base - cached)
        if VALUES:
            shrink = tl.math.exp2(highest - base)
            total = total * shrink + part_sum
            v_mask = (dims_v < D_V)[None, :]
            if RAGGED:
                v_mask = v_mask & (columns < n_kv)[:, None]
            v = tl.load(v_at + columns[:, None].to(tl.int64) * v_n + dims_v[None, :] * v_d, mask=v_mask, other=0.0)
            if UPCAST:
                v = v.to(tl.float32)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
            highest = now
        if MASS:
            tl.store(mass_at + block, tl.sum(held, 0))  # the last part of a block has it all
    if VALUES:
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        out = acc / total[:, None]
        lse = tl.where(empty, -float("inf"), (highest + tl.math.log2(total)) * 0.6931471805599453)
        out_at = out_ptr + row_at[:, None] * D_V + dims_v[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=(rows < n_q)[:, None] & (dims_v < D_V)[None, :])
        tl.store(lse_ptr + row_at, lse, mask=rows < n_q)


# Triton's interpreter multiplies bfloat16 as bit patterns: there it is computed in float32.
INTERPRETED: bool = not isinstance(_attend, triton.runtime.JITFunction)
