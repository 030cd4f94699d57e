"""Attention on the CPU: gather the kept blocks of many query rows at once, then one batched product.

Rows that keep equally many blocks are computed together, in groups small enough for the cache, by torch's own flash
kernel; bfloat16 takes its scores in float32 and its weighted sum in bfloat16; float16 is computed in float32, since
CPUs multiply it slowly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse_kernels.lists import BlockLists

_GATHER_BYTES = 2 * 2**20  # keys and values gathered at a time: what a core's cache holds
_STRIP_BYTES = 16 * 2**20  # scores of one strip of query rows


def break_even(dtype: torch.dtype, head_dim: int, block: int) -> float:
    """Density above which dense attention is faster, as measured on AVX-512 machines."""
    return 0.7 if dtype != torch.bfloat16 else 0.9


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    dtype = q.dtype
    q, k, v = _computable(q, k, v)
    out, lse = _flash(q, k, v, scale, None if key_mask is None else _bias(key_mask[:, None, None], q))
    if key_mask is not None:
        dead = ~key_mask.any(-1)
        out[dead], lse[dead] = 0, -torch.inf
    return out.to(dtype), lse


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
    """Dense attention, its LSE and the block mass, one pass over strips of rows."""
    outs, lses, masses = [], [], []
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(exact).transpose(-1, -2), v.to(exact)
    for rows in _strips(q, k, q_block):
        scores = _scores(q[:, :, rows], keys, scale, key_mask)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top.masked_fill(top.isneginf(), 0)).exp_()  # [B, H, rows, N_kv]
        tiles = _column_sums(weights, kv_block)  # [B, H, rows, nK]
        total = tiles.sum(-1, keepdim=True)
        outs.append((weights @ values / total.masked_fill(total == 0, 1)).to(q.dtype))
        lses.append((top + total.log())[..., 0])
        cached = lse[:, :, rows, None].to(exact)
        drift = torch.where(cached.isfinite() & ~top.isneginf(), (top - cached).exp(), 0)
        masses.append(_row_sums(tiles * drift, q_block))
    return torch.cat(outs, 2), torch.cat(lses, 2), torch.cat(masses, 2)


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Sum of exp(score - lse) over each tile, one pass over keys in strips of rows."""
    masses = []
    exact = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(exact).transpose(-1, -2)
    for rows in _strips(q, k, q_block):
        cached = lse[:, :, rows, None].to(exact)
        weights = _scores(q[:, :, rows], keys, scale, key_mask).sub_(cached.masked_fill(~cached.isfinite(), torch.inf))
        masses.append(_row_sums(_column_sums(weights.exp_(), kv_block), q_block))
    return torch.cat(masses, 2)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks."""
    work = _Blocks.of(*_computable(q, k, v), lists, key_mask)
    for group in _groups(lists, q.shape[0]):
        if group.cnt == lists.kv_blocks:
            _dense_rows(work, group, scale)
        elif group.cnt:
            _sparse_rows(work, group, scale)
    rows = slice(None, q.shape[2])
    out = work.out.flatten(2, 3)[:, :, rows].to(q.dtype)
    return out, work.lse.flatten(2, 3)[:, :, rows]


class _Group(NamedTuple):
    """Query rows that keep equally many blocks: `row` counts blocks over [B, H, nQ], `idx` is [rows, cnt]."""

    row: Tensor
    idx: Tensor
    cnt: int
    ragged: bool  # all of these lists end in the ragged last block, or none does


class _Blocks(NamedTuple):
    """Inputs and outputs cut into blocks. Lengths are padded up to whole blocks."""

    q: Tensor  # [B, H, nQ, q_block, D]
    k: Tensor  # [B * H * nK, kv_block, D]
    v: Tensor  # [B * H * nK, kv_block, D_v]
    mask: Tensor | None  # [B * nK, kv_block]
    out: Tensor  # [B, H, nQ, q_block, D_v]
    lse: Tensor  # [B, H, nQ, q_block]
    lists: BlockLists

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, key_mask: Tensor | None) -> _Blocks:
        q_blocks = _cut(q, lists.q_block)
        mask = None if key_mask is None else _cut(key_mask[:, None, :, None], lists.kv_block).flatten(0, 2)[..., 0]
        return cls(
            q_blocks,
            _cut(k, lists.kv_block).flatten(0, 2),
            _cut(v, lists.kv_block).flatten(0, 2),
            mask,
            q.new_zeros(*q_blocks.shape[:4], v.shape[-1]),
            q.new_full(q_blocks.shape[:4], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)),
            lists,
        )


def _groups(lists: BlockLists, batch: int) -> Iterator[_Group]:
    idx = lists.idx.expand(batch, -1, -1, -1).flatten(0, 2).long()  # [B * H * nQ, W]
    cnt = lists.cnt.expand(batch, -1, -1).flatten().long()
    last = idx.gather(1, (cnt - 1).clamp(min=0)[:, None])[:, 0]
    ragged = (last == lists.kv_blocks - 1) & bool(lists.kv_len % lists.kv_block)
    for key in (cnt * 2 + ragged).unique().tolist():
        row = ((cnt * 2 + ragged) == key).nonzero()[:, 0]
        yield _Group(row, idx[row, : key // 2], key // 2, bool(key % 2))


def _sparse_rows(work: _Blocks, group: _Group, scale: float) -> None:
    """Gather the kept keys and values of a few rows at a time, and attend to them."""
    lists, dim = work.lists, work.k.shape[-1] + work.v.shape[-1]
    per_row = group.cnt * lists.kv_block * dim * work.k.element_size()
    columns = group.cnt * lists.kv_block - (-lists.kv_len % lists.kv_block if group.ragged else 0)
    q, out, lse = work.q.flatten(0, 2), work.out.flatten(0, 2), work.lse.flatten(0, 2)
    for row, idx in zip(*(x.split(max(1, _GATHER_BYTES // per_row)) for x in (group.row, group.idx)), strict=True):
        head = row // lists.q_blocks  # of [B * H]
        blocks = (head[:, None] * lists.kv_blocks + idx).flatten()
        keys, values = (
            x.index_select(0, blocks).view(1, len(row), -1, x.shape[-1])[:, :, :columns] for x in (work.k, work.v)
        )
        bias = _gathered_bias(work, head, idx, columns)
        part, part_lse = _product(q.index_select(0, row)[None], keys, values, scale, bias)
        if bias is not None:
            dead = bias[0, :, 0].isneginf().all(-1)
            part[0, dead], part_lse[0, dead] = 0, -torch.inf
        out[row], lse[row] = part[0], part_lse[0]


def _gathered_bias(work: _Blocks, head: Tensor, idx: Tensor, columns: int) -> Tensor | None:
    """The key mask of the gathered blocks as an additive bias [1, rows, 1, columns]."""
    if work.mask is None:
        return None
    sample = head // work.q.shape[1]
    blocks = (sample[:, None] * work.lists.kv_blocks + idx).flatten()
    mask = work.mask.index_select(0, blocks).view(1, len(idx), 1, -1)[..., :columns]
    return _bias(mask, work.q)


def _dense_rows(work: _Blocks, group: _Group, scale: float) -> None:
    """Rows that keep every block: one dense product for each head, without gathering."""
    lists, heads = work.lists, work.q.shape[1]
    keys, values = (x.view(-1, lists.kv_blocks * lists.kv_block, x.shape[-1])[:, : lists.kv_len] for x in work[1:3])
    for head in (group.row // lists.q_blocks).unique().tolist():
        rows = group.row[group.row // lists.q_blocks == head] % lists.q_blocks
        sample, inner = divmod(head, heads)
        q = work.q[sample, inner, rows].flatten(0, 1)[None, None]
        bias = None
        if work.mask is not None:
            mask = work.mask.view(-1, lists.kv_blocks * lists.kv_block)[sample, : lists.kv_len]
            if not mask.any():
                continue
            bias = _bias(mask[None, None, None], q)
        part, part_lse = _flash(q, keys[head][None, None], values[head][None, None], scale, bias)
        work.out[sample, inner, rows] = part[0, 0].unflatten(0, (-1, lists.q_block))
        work.lse[sample, inner, rows] = part_lse[0, 0].unflatten(0, (-1, lists.q_block))


def _product(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _mixed(q, k, v, scale, bias) if q.dtype == torch.bfloat16 else _flash(q, k, v, scale, bias)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's flash kernel, which also tells the LSE; it wants values as wide as keys."""
    width = v.shape[-1]
    if width != q.shape[-1]:
        wide = max(width, q.shape[-1])
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    return out[..., :width], lse


def _mixed(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in float32, weighted sum in bfloat16: twice as fast as flash, and as exact."""
    scores = (q.float() * scale) @ k.float().transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.float()
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill(top.isneginf(), 0)).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights.to(v.dtype) @ v).float() / total.masked_fill(total == 0, 1)
    return out.to(q.dtype), (top + total.log())[..., 0]


def _computable(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (q.float(), k.float(), v.float()) if q.dtype == torch.float16 else (q, k, v)


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """0 where `mask` is True, -inf elsewhere."""
    bias: Tensor = q.new_zeros(mask.shape)
    return bias.masked_fill_(~mask, -torch.inf)


def _cut(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] -> [B, H, n, block, D], contiguous, the ragged tail filled with zeros."""
    padded: Tensor = F.pad(x, (0, 0, 0, -x.shape[2] % block)).contiguous()
    blocks: Tensor = padded.unflatten(2, (-1, block))
    return blocks


def _strips(q: Tensor, k: Tensor, multiple: int) -> Iterator[slice]:
    """Row ranges whose scores fit the budget, each but the last a multiple of `multiple` rows."""
    batch, heads, length, _ = q.shape
    rows = max(_STRIP_BYTES // (batch * heads * k.shape[2] * 4) // multiple, 1) * multiple
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


def _scores(q: Tensor, keys: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    scores = (q.to(keys.dtype) * scale) @ keys
    return scores if key_mask is None else scores.masked_fill_(~key_mask[:, None, None], -torch.inf)


def _column_sums(weights: Tensor, block: int) -> Tensor:
    """[B, H, rows, N_kv] -> [B, H, rows, nK]."""
    whole = weights.shape[-1] // block * block
    sums = weights[..., :whole].unflatten(-1, (-1, block)).sum(-1) if whole else weights[..., :0]
    if whole == weights.shape[-1]:
        return sums
    return torch.cat([sums, weights[..., whole:].sum(-1, keepdim=True)], -1)


def _row_sums(tiles: Tensor, block: int) -> Tensor:
    """[B, H, rows, nK] -> [B, H, ceil(rows / block), nK]."""
    padded: Tensor = F.pad(tiles, (0, 0, 0, -tiles.shape[2] % block))
    sums: Tensor = padded.unflatten(2, (-1, block)).sum(3)
    return sums
