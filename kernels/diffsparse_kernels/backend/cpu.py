"""Attention on the CPU: gather the kept blocks of many query rows at once, then one batched product.

Rows that keep equally many blocks are computed together, in groups small enough for the cache and as many for each
thread: scores in float32, the weighted sum in the inputs' own format. float16 is computed in float32, since CPUs
multiply it slowly. What a step leaves behind is overwritten by the next: fresh pages of memory would cost as much
as the products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse_kernels.case import Case
from diffsparse_kernels.lists import BlockLists
from diffsparse_kernels.masks import Boxes
from diffsparse_kernels.strips import strips

_GATHER_BYTES = 4 * 2**20  # keys and values gathered at a time, about what caches hold
_LOG2_E = math.log2(math.e)
_NEVER = 1e30  # subtracted from the scores of keys that are not seen
_STRIP_BYTES = 16 * 2**20  # scores of one strip of query rows
SEES_WHOLE_ROWS = True  # so `attention_with_mass` can do without a cached LSE


def capability(device: torch.device, case: Case | None = None) -> str | None:
    """Why it can't run on `device`, or compute `case` there; None, for on a CPU it can all."""
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    dtype = q.dtype
    q, k, v = _computable(q, k, v)
    out, lse = _flash(q, k, v, scale, None if key_mask is None else _bias(key_mask[:, None, None], q.dtype))
    if key_mask is not None:
        dead = ~key_mask.any(-1)
        out[dead], lse[dead] = 0, -torch.inf
    return out.to(dtype), lse


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its LSE and the block mass, one pass over strips of rows; `lse` is the rows' own if None."""
    outs, lses, masses = [], [], []
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, values, scratch = k.to(exact).transpose(-1, -2), v.to(exact), _Scratch()
    for rows in _strips(q, k, q_block):
        scores = _scores(q[:, :, rows], keys, scale * _LOG2_E, key_mask, scratch)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top.masked_fill(top.isneginf(), 0)).exp2_()  # [B, H, rows, N_kv]
        tiles = _column_sums(weights, kv_block)  # [B, H, rows, nK]
        total = tiles.sum(-1, keepdim=True)
        outs.append((weights @ values / total.masked_fill(total == 0, 1)).to(q.dtype))
        own = top + total.log2()
        lses.append(own[..., 0] / _LOG2_E)
        cached = own if lse is None else lse[:, :, rows, None].to(exact) * _LOG2_E
        drift = torch.where(cached.isfinite() & ~top.isneginf(), (top - cached).exp2(), 0)
        masses.append(_row_sums(tiles * drift, q_block))
    return torch.cat(outs, 2), torch.cat(lses, 2), torch.cat(masses, 2)


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Sum of exp(score - lse) over each tile, one pass over keys in strips of rows."""
    masses = []
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, scratch = k.to(exact).transpose(-1, -2), _Scratch()
    for rows in _strips(q, k, q_block):
        cached = lse[:, :, rows, None].to(exact) * _LOG2_E
        scores = _scores(q[:, :, rows], keys, scale * _LOG2_E, key_mask, scratch)
        weights = scores.sub_(cached.masked_fill(~cached.isfinite(), torch.inf)).exp2_()
        masses.append(_row_sums(_column_sums(weights, kv_block), q_block))
    return torch.cat(masses, 2)


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
    work, scratch = _Blocks.of(*_computable(q, k, v), lists, key_mask, boxes), _Scratch()
    for group in _groups(work):
        if group.cnt == 0:
            work.out.flatten(0, 2)[group.row], work.lse.flatten(0, 2)[group.row] = 0, -torch.inf
        elif group.cnt == lists.kv_blocks and not group.cut:
            _dense_rows(work, group, scale)
        else:
            _sparse_rows(work, group, scale, scratch)
    rows = slice(None, q.shape[2])
    out = work.out.flatten(2, 3)[:, :, rows].to(q.dtype)
    return out, work.lse.flatten(2, 3)[:, :, rows]


class _Scratch:
    """Memory that the steps of one call share, by name."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of `shape`."""
        size = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = torch.empty(size, dtype=dtype, device="cpu")
        return self._kept[name][:size].view(shape)

    def gather(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """`x.index_select(0, rows)`."""
        return torch.index_select(x, 0, rows, out=self.take(name, (len(rows), *x.shape[1:]), x.dtype))


class _Group(NamedTuple):
    """Query rows that keep equally many blocks."""

    row: Tensor  # numbers of query blocks over [B, H, nQ]
    idx: Tensor  # [rows, cnt]
    cnt: int  # blocks of each list
    ragged: bool  # all of these lists end in the ragged last block, or none does
    cut: bool  # each of these lists has a block that boxes cut through, or none has


class _Blocks(NamedTuple):
    """Inputs and outputs cut into blocks. Lengths are padded up to whole blocks."""

    q: Tensor  # [B, H, nQ, q_block, D]
    k: Tensor  # [B * H * nK, kv_block, D]
    v: Tensor  # [B * H * nK, kv_block, D_v]
    mask: Tensor | None  # [B * nK, kv_block]
    boxes: Boxes | None  # place [nK, A, kv_block]; low, high [nQ, A, q_block]
    out: Tensor  # [B, H, nQ, q_block, D_v]
    lse: Tensor  # [B, H, nQ, q_block]
    lists: BlockLists

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, key_mask: Tensor | None, boxes: Boxes | None
    ) -> _Blocks:
        q_blocks = _cut(q, lists.q_block)
        mask = None if key_mask is None else _cut(key_mask[:, None, :, None], lists.kv_block).flatten(0, 2)[..., 0]
        if boxes is not None:
            cut = zip(boxes, (lists.kv_block, lists.q_block, lists.q_block), strict=True)
            boxes = Boxes(*(_cut(x[None, :, :, None], block)[0, ..., 0].transpose(0, 1) for x, block in cut))
        return cls(
            q_blocks,
            _cut(k, lists.kv_block).flatten(0, 2),
            _cut(v, lists.kv_block).flatten(0, 2),
            mask,
            boxes,
            q.new_empty(*q_blocks.shape[:4], v.shape[-1]),
            q.new_empty(q_blocks.shape[:4], dtype=torch.promote_types(q.dtype, torch.float32)),
            lists,
        )


def _groups(work: _Blocks) -> Iterator[_Group]:
    lists, batch = work.lists, work.q.shape[0]
    idx = lists.idx.expand(batch, -1, -1, -1).flatten(0, 2).long()  # [B * H * nQ, W]
    cnt = lists.cnt.expand(batch, -1, -1).flatten().long()
    last = idx.gather(1, (cnt - 1).clamp(min=0)[:, None])[:, 0]
    ragged = (last == lists.kv_blocks - 1) & bool(lists.kv_len % lists.kv_block)
    kind = cnt * 4 + ragged * 2 + _cut_rows(work, idx, cnt)
    for key in kind.unique().tolist():
        row = (kind == key).nonzero()[:, 0]
        if key % 2:  # heads side by side: they can share what their boxes hide
            row = row[(row % lists.q_blocks).argsort(stable=True)]
        yield _Group(row, idx[row, : key // 4], key // 4, bool(key // 2 % 2), bool(key % 2))


def _cut_rows(work: _Blocks, idx: Tensor, cnt: Tensor) -> Tensor:
    """bool [B * H * nQ]: whether some listed block holds a key that some query of the row does not see."""
    if work.boxes is None:
        return torch.zeros_like(cnt, dtype=torch.bool)
    place, low, high = work.boxes
    free = place[:, :1] < 0
    first, last = (place.masked_fill(free, end) for end in (torch.iinfo(place.dtype).max, -1))
    inside = low.amax(-1)[:, None] <= first.amin(-1)  # [nQ, nK, A]
    inside &= last.amax(-1) <= high.amin(-1)[:, None]
    whole = inside.all(-1) | free.all(-1)[:, 0]
    listed = torch.arange(idx.shape[1], device="cpu") < cnt[:, None]
    row = torch.arange(len(idx), device="cpu") % work.lists.q_blocks
    return (listed & ~whole[row[:, None], idx]).any(-1)


def _sparse_rows(work: _Blocks, group: _Group, scale: float, scratch: _Scratch) -> None:
    """Gather the kept keys and values of a few rows at a time, and attend to them."""
    lists, dim = work.lists, work.k.shape[-1] + work.v.shape[-1]
    per_row = group.cnt * lists.kv_block * dim * work.k.element_size()
    columns = group.cnt * lists.kv_block - (-lists.kv_len % lists.kv_block if group.ragged else 0)
    q, out, lse = work.q.flatten(0, 2), work.out.flatten(0, 2), work.lse.flatten(0, 2)
    threads = torch.get_num_threads()
    at_a_time = max(1, _GATHER_BYTES // per_row // threads) * threads  # as many for each thread
    if group.cut:  # whole query blocks, all of their heads, as far as they fit
        heads = work.q.shape[0] * work.q.shape[1]
        at_a_time = at_a_time // heads * heads or -(-heads // -(-heads // at_a_time))
    bias = _Bias(work, columns, group.cut)
    for row, idx in zip(group.row.split(at_a_time), group.idx.split(at_a_time), strict=True):
        head = row // lists.q_blocks  # of [B * H]
        blocks = (head[:, None] * lists.kv_blocks + idx).flatten()
        keys = scratch.gather("keys", work.k, blocks).view(len(row), -1, q.shape[-1])[:, :columns]
        values = scratch.gather("values", work.v, blocks).view(len(row), -1, out.shape[-1])[:, :columns]
        hidden, dead = bias.of(row, idx)
        part, part_lse = _product(scratch.gather("queries", q, row), keys, values, scale, hidden, scratch)
        if dead is not None:
            part.unflatten(0, (len(dead), -1)).masked_fill_(dead[..., None], 0)
            part_lse.unflatten(0, (len(dead), -1)).masked_fill_(dead, -torch.inf)
        out[row], lse[row] = part, part_lse


class _Bias:
    """Key mask and boxes of gathered blocks as an additive bias.

    Neighbouring rows of one sample and query block, heads with equal lists, share what was made for the first.
    """

    def __init__(self, work: _Blocks, columns: int, cut: bool) -> None:
        self.work, self.columns, self.cut = work, columns, cut
        self._dtype = torch.promote_types(work.q.dtype, torch.float32)  # bfloat16 has its scores in float32
        self._lists = self._hidden = self._dead = torch.empty(0, device="cpu")

    def of(self, row: Tensor, idx: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias [n, 1, q_block | 1, columns], one for each n-th of the rows; which see nothing [n, 1, q_block | 1]."""
        lists, mask = self.work.lists, self.work.mask
        if mask is None and not self.cut:
            return None, None
        sample = row // (lists.q_blocks * self.work.q.shape[1]) if mask is not None else torch.zeros_like(row)
        wanted = torch.cat([torch.stack([row % lists.q_blocks, sample], 1), idx], 1)
        alike, rows = wanted.unique_consecutive(return_counts=True, dim=0)
        wanted = alike if (rows == rows[0]).all() else wanted
        if not torch.equal(wanted, self._lists):
            seen = self._seen(wanted[:, 0], wanted[:, 1], wanted[:, 2:])[:, None]
            self._lists, self._hidden, self._dead = wanted, _bias(seen, self._dtype), ~seen.any(-1)
        return self._hidden, self._dead

    def _seen(self, q_block: Tensor, sample: Tensor, idx: Tensor) -> Tensor:
        """bool [lists, q_block | 1, columns]."""
        seen: list[Tensor] = []
        if self.cut and self.work.boxes is not None:
            place, low, high = (x.unbind(1) for x in self.work.boxes)
            keys = [self._gather(x, idx) for x in place]
            along = [
                (a[q_block, :, None] <= x) & (x <= b[q_block, :, None]) for x, a, b in zip(keys, low, high, strict=True)
            ]
            seen.append(functools.reduce(torch.logical_and, along) | (keys[0] < 0))
        if self.work.mask is not None:
            seen.append(self._gather(self.work.mask, sample[:, None] * self.work.lists.kv_blocks + idx))
        return functools.reduce(torch.logical_and, seen)

    def _gather(self, blocks: Tensor, idx: Tensor) -> Tensor:
        """[blocks, kv_block] -> [lists, 1, columns]."""
        return blocks[idx].flatten(1)[:, None, : self.columns]


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
                work.out[sample, inner, rows], work.lse[sample, inner, rows] = 0, -torch.inf
                continue
            bias = _bias(mask[None, None, None], q.dtype)
        part, part_lse = _flash(q, keys[head][None, None], values[head][None, None], scale, bias)
        work.out[sample, inner, rows] = part[0, 0].unflatten(0, (-1, lists.q_block))
        work.lse[sample, inner, rows] = part_lse[0, 0].unflatten(0, (-1, lists.q_block))


def _product(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, scratch: _Scratch
) -> tuple[Tensor, Tensor]:
    """Attention of [rows, block, D] to [rows, columns, D]; bias [n, 1, block | 1, columns], one for each n-th.

    Scores in float32 or better, the weighted sum in the values' own format: in bfloat16 twice as fast as flash, and as
    exact. Powers of two: torch's exp takes ten times as long over values as low as those that `bias` leaves.
    """
    exact, shape = torch.promote_types(q.dtype, torch.float32), (*q.shape[:2], k.shape[1])
    keys = k if k.dtype == exact else scratch.take("exact keys", tuple(k.shape), exact).copy_(k)
    scores = torch.bmm(q.to(exact) * scale, keys.mT, out=scratch.take("scores", shape, exact))
    if bias is not None:
        scores.unflatten(0, (len(bias), -1)).add_(bias)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).mul_(_LOG2_E).exp2_()
    total = weights.sum(-1, keepdim=True)
    rounded = weights if v.dtype == exact else scratch.take("weights", shape, v.dtype).copy_(weights)
    out = torch.bmm(rounded, v).to(exact) / total
    return out.to(q.dtype), (top + total.log())[..., 0]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's flash kernel, which also returns the LSE; it needs values as wide as keys, and rows without gaps."""
    width = v.shape[-1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # it reads others wrong without an error
    if width != q.shape[-1]:
        wide = max(width, q.shape[-1])
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    return out[..., :width], lse


def _computable(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (q.float(), k.float(), v.float()) if q.dtype == torch.float16 else (q, k, v)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is True, and elsewhere what outweighs every score; several times faster made than with -inf."""
    return mask.to(dtype).sub_(1).mul_(_NEVER)


def _cut(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] -> [B, H, n, block, D], contiguous, the ragged tail filled with zeros."""
    padding = -x.shape[2] % block
    padded = F.pad(x, (0, 0, 0, padding)) if padding else x  # padding by nothing would copy
    blocks: Tensor = padded.contiguous().unflatten(2, (-1, block))
    return blocks


def _strips(q: Tensor, k: Tensor, multiple: int) -> Iterator[slice]:
    batch, heads, length, _ = q.shape
    return strips(length, batch * heads * k.shape[2] * 4, _STRIP_BYTES, multiple)


def _scores(q: Tensor, keys: Tensor, scale: float, key_mask: Tensor | None, scratch: _Scratch) -> Tensor:
    """q [B, H, rows, D] times keys [B, H, D, N_kv], valid until the next strip."""
    scores = scratch.take("scores", (*q.shape[:3], keys.shape[-1]), keys.dtype)
    torch.matmul(q.to(keys.dtype) * scale, keys, out=scores)
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
