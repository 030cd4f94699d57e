"""Attention on the CPU: gather the kept blocks of a query block, or of several at once, and multiply.

Query blocks with much to multiply come one by one, each with as many of its keys at a time as caches hold: single
matrices are what oneDNN multiplies, the fastest there is. Others come together with those that keep about equally many
keys, one batched product for all. Scores are in float32, the weighted sum is in the inputs' own format; float16 is
computed in float32, since CPUs multiply it slowly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse_kernels.case import Case
from diffsparse_kernels.lists import BlockLists, mask_of
from diffsparse_kernels.masks import Boxes, is_bias
from diffsparse_kernels.strips import strips
from diffsparse_kernels.summaries import MOST_BIAS, StandIns

_GATHER_BYTES = 4 * 2**20  # keys, values and scores of a thread at a time, about what its caches hold
_STRIP_BYTES = 2 * 2**20  # scores of one strip of query rows; of twice as much, malloc asks for fresh pages each time
_SMALL = 1_750_000  # multiplications of a query block for each thread, below which batches of blocks are faster
_LOG2_E = math.log2(math.e)
_NEVER = 1e30  # subtracted from the scores of keys that are not seen; -inf takes several times longer
_DEAD = -_NEVER / 2  # below, a row has seen no key
SEES_WHOLE_ROWS = True  # so `attention_with_mass` can do without a cached LSE
Kernel = TypeVar("Kernel", bound=Callable[..., object])


def _exactly(kernel: Kernel) -> Kernel:
    """Without autocast: what is rounded to which format is decided here."""

    @functools.wraps(kernel)
    def exactly(*args: object, **options: object) -> object:
        with torch.autocast("cpu", enabled=False):  # a decorator would share one state among threads
            return kernel(*args, **options)

    return cast(Kernel, exactly)


def capability(device: torch.device, case: Case | None = None) -> str | None:
    """Why it can't run on `device`, or compute `case` there; None, for on a CPU it can all."""
    return None


@_exactly
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    parts, values = [], _computable(v).flatten(0, 1).contiguous()
    for head, _, scores in _strips(q, k, scale, key_mask):
        parts.append(_finished(_attended(scores, values[head])))
    return _joined(parts, q)


@_exactly
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
    parts, masses, values = [], [], _computable(v).flatten(0, 1).contiguous()
    for head, rows, scores in _strips(q, k, scale, key_mask, q_block):
        top = scores.amax(-1, keepdim=True)
        weights = _powers(scores, top)
        tiles = _column_sums(weights, kv_block)  # [rows, nK]
        total = tiles.sum(-1, keepdim=True)
        cached = top + total.log() if lse is None else lse.flatten(0, 1)[head, rows, None].to(top.dtype)
        drift = torch.where(cached.isfinite() & (top > _DEAD), (top - cached).exp(), 0)
        masses.append(_row_sums(tiles * drift, q_block))
        parts.append(_finished(_Part(_weighted(weights, values[head]), top, total)))
    return *_joined(parts, q), _tiles(masses, q)


@_exactly
def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Sum of exp(score - lse) over each tile, one pass over keys in strips of rows."""
    masses = []
    for head, rows, scores in _strips(q, k, scale, key_mask, q_block):
        cached = lse.flatten(0, 1)[head, rows, None].to(scores.dtype)
        weights = _powers(scores, cached.masked_fill(~cached.isfinite(), torch.inf))
        masses.append(_row_sums(_column_sums(weights, kv_block), q_block))
    return _tiles(masses, q)


@_exactly
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    boxes: Boxes | None = None,
    stand_ins: StandIns | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks; `stand_ins` are further keys of the same softmax where none is listed."""
    work = _Blocks.of(q, k, v, lists, scale, key_mask, boxes)
    out, lse = work.q.new_empty(*work.q.shape[:2], v.shape[3]), work.q.new_empty(work.q.shape[:2])
    others = None if stand_ins is None else _Others.of(stand_ins, lists, scale, work.q.dtype)
    for row, queries, part in (_one_by_one if work.are_large else _together)(work):
        part = part if others is None else others.joined(part, queries, row)
        out[row], lse[row] = _finished(part)
    rows = slice(None, q.shape[2])
    out, lse = (x.unflatten(0, (*q.shape[:2], -1)).flatten(2, 3)[:, :, rows] for x in (out, lse))
    return out.to(q.dtype), lse


class _Scratch:
    """Memory for what the next product overwrites: fresh pages for it can cost as much as the product itself."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, use: str, dtype: torch.dtype, *size: int) -> Tensor:
        """An uninitialised tensor, in place of the last one for the same use."""
        room = math.prod(size) * dtype.itemsize
        if use not in self._held or len(self._held[use]) < room:
            self._held[use] = torch.empty(room, dtype=torch.uint8, device="cpu")
        return self._held[use][:room].view(dtype).view(size)


class _Part(NamedTuple):
    """Attention to some keys, before it is divided by the sum of its weights exp(score - top)."""

    sums: Tensor  # of weighted values, [..., rows, D_v]
    top: Tensor  # the highest score, [..., rows, 1]
    total: Tensor  # of the weights, [..., rows, 1]


def _attended(scores: Tensor, values: Tensor, scratch: _Scratch | None = None) -> _Part:
    """scores [..., rows, columns], which are overwritten; values [..., columns, D_v]."""
    top = scores.amax(-1, keepdim=True)
    weights = _powers(scores, top)
    return _Part(_weighted(weights, values, scratch), top, weights.sum(-1, keepdim=True))


def _merged(parts: list[_Part]) -> _Part:
    """Attention to the keys of all parts."""
    if len(parts) == 1:
        return parts[0]
    sums, tops, totals = (torch.stack(x) for x in zip(*parts, strict=True))
    top = tops.amax(0)
    share = (tops - top).exp_()
    return _Part((sums * share).sum(0), top, (totals * share).sum(0))


def _finished(part: _Part) -> tuple[Tensor, Tensor]:
    """out [..., rows, D_v], lse [..., rows]; 0 and -inf where no key was seen."""
    dead = part.top < _DEAD
    lse = (part.top + part.total.log()).masked_fill_(dead, -torch.inf)
    return part.sums.div_(part.total).masked_fill_(dead, 0), lse[..., 0]


class _Blocks(NamedTuple):
    """Inputs cut into blocks, padded up to whole ones."""

    q: Tensor  # [B * H * nQ, q_block, D], float32 or better
    k: Tensor  # [B * H * nK, kv_block, D], as q
    v: Tensor  # [B * H * nK, kv_block, D_v]
    hidden: Tensor | None  # [B * H * nK, kv_block, 1], what to add to the scores of masked keys
    boxes: Boxes | None  # place [nK, A, kv_block]; low, high [nQ, A, q_block]
    lists: BlockLists
    scale: float
    most: int  # blocks of keys at a time

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lists: BlockLists,
        scale: float,
        key_mask: Tensor | None,
        boxes: Boxes | None,
    ) -> _Blocks:
        exact, heads, hidden = _accumulated(q), q.shape[:2], None
        if key_mask is not None:
            mask = key_mask[:, None].expand(*heads, -1)
            hidden = _cut(_bias(mask, exact)[..., None], lists.kv_block)
        if boxes is not None:
            cut = zip(boxes, (lists.kv_block, lists.q_block, lists.q_block), strict=True)
            boxes = Boxes(
                *(
                    _cut(x[None, :, :, None], block)[..., 0].unflatten(0, (len(x), -1)).transpose(0, 1)
                    for x, block in cut
                )
            )
        queries = _cut(q.to(exact), lists.q_block)
        keys, values = _cut(k.to(exact), lists.kv_block), _cut(_computable(v), lists.kv_block)
        at_a_time = lists.kv_block * (k.shape[3] + v.shape[3] + lists.q_block) * exact.itemsize
        return cls(queries, keys, values, hidden, boxes, lists, scale, max(_GATHER_BYTES // at_a_time, 1))

    @property
    def are_large(self) -> bool:
        """Whether the products of single query blocks are; of other formats than float32, twice as much is."""
        lists, each = self.lists, torch.get_num_threads() * (1 if self.v.dtype == torch.float32 else 2)
        products = float(lists.cnt.mean(dtype=torch.float32)) * lists.kv_block * lists.q_block * self.q.shape[2]
        return self.boxes is None and products >= _SMALL * each

    def at_a_time(self, count: int) -> int:
        """Lists of so many blocks that caches hold at a time, for each thread."""
        return max(1, self.most // max(count, 1)) * torch.get_num_threads()

    def attended(
        self,
        q: Tensor,
        blocks: Tensor,
        columns: int,
        scratch: _Scratch | None = None,
        bias: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> _Part:
        """Attention of scaled q [..., q_block, D] to the first `columns` keys of blocks [..., count].

        Args:
            bias: [m, 1, q_block, columns], one for each m-th of the rows.
            lengths: [rows], how many of these keys each row has.
        """
        shortest = columns if lengths is None else int(lengths.min())
        parts, start = [], 0
        for some in (blocks,) if blocks.shape[-1] <= self.most else blocks.split(self.most, -1):
            width = min(some.shape[-1] * self.lists.kv_block, columns - start)
            room = scratch.take("scores", q.dtype, *q.shape[:-1], width) if scratch else None
            scores = _product(q, _gathered(self.k, some, width, scratch), room)
            if self.hidden is not None:
                scores.add_(_gathered(self.hidden, some, width, scratch).mT)
            if bias is not None:
                scores.unflatten(0, (len(bias), -1)).add_(bias[..., start : start + width])
            surplus = slice(max(shortest - start, 0), width)  # columns that shorter lists lack
            if lengths is not None and surplus.start < width:
                beyond = torch.arange(start + surplus.start, start + width, device="cpu") >= lengths[:, None, None]
                scores[..., surplus].masked_fill_(beyond, -_NEVER)
            values = _gathered(self.v, some, width, scratch)
            if lengths is not None and surplus.start < width:
                values[..., surplus, :].masked_fill_(beyond.mT, 0)  # an infinity times no weight would be NaN
            parts.append(_attended(scores, values, scratch))
            start += width
        return _merged(parts)

    def nothing(self, *size: int) -> _Part:
        """Attention of `size` query blocks to no key."""
        one = self.q.new_ones(*size, self.q.shape[1], 1)
        return _Part(self.q.new_zeros(*size, self.q.shape[1], self.v.shape[2]), one * -_NEVER, one)


def _gathered(x: Tensor, blocks: Tensor, width: int, scratch: _Scratch | None) -> Tensor:
    """The first `width` rows of some blocks [..., count] of x [*, block, D]: [..., width, D]."""
    room = scratch.take("blocks", x.dtype, blocks.numel(), *x.shape[1:]) if scratch else None
    found = torch.index_select(x, 0, blocks.flatten(), out=room).view(*blocks.shape[:-1], -1, x.shape[2])
    return found if found.shape[-2] == width else found[..., :width, :]


def _one_by_one(work: _Blocks) -> Iterator[tuple[slice, Tensor, _Part]]:
    """Some rows of blocks of one head at a time, each attended to by itself."""
    lists = work.lists
    samples = lists.idx.flatten(0, 1)  # [B|1 * H, nQ, W]
    counts, columns = (x.tolist() for x in _lengths(samples, lists.cnt.flatten(0, 1), lists))
    row_bytes = lists.q_block * (work.q.shape[2] + work.v.shape[2] + lists.kv_blocks) * work.q.itemsize
    for head, start in enumerate(range(0, len(work.q), lists.q_blocks)):
        own = head % len(samples)
        blocks = samples[own].long().add_(head * lists.kv_blocks)
        for rows in strips(lists.q_blocks, row_bytes, _STRIP_BYTES):
            there = slice(start + rows.start, start + rows.stop)
            queries = work.q[there] * work.scale
            parts = [
                work.attended(q, listed[:count], width) if count else work.nothing()
                for q, listed, count, width in zip(
                    queries, blocks[rows], counts[own][rows], columns[own][rows], strict=True
                )
            ]
            yield there, queries, _Part(*(torch.stack(x) for x in zip(*parts, strict=True)))


def _together(work: _Blocks) -> Iterator[tuple[Tensor, Tensor, _Part]]:
    """Rows of about equally many keys, as many at a time as caches hold, and as many for each thread."""
    scratch = _Scratch()
    for group in _groups(work):
        bias = _BoxBias(work, group.columns) if group.cut else None
        for row, idx, lengths in zip(*(x.split(group.at_a_time) for x in group[:3]), strict=True):
            queries = work.q[row] * work.scale
            if not group.columns:
                yield row, queries, work.nothing(len(row))
                continue
            blocks = (row // work.lists.q_blocks * work.lists.kv_blocks)[:, None] + idx
            hidden = None if bias is None else bias.of(row, idx)
            yield row, queries, work.attended(queries, blocks, group.columns, scratch, hidden, lengths)


class _Group(NamedTuple):
    """Query rows that are computed alike."""

    row: Tensor  # numbers of query blocks over [B, H, nQ]
    idx: Tensor  # [rows, count], the last block of a shorter list again and again
    lengths: Tensor  # keys of each list
    columns: int  # of the longest
    cut: bool  # each of these lists has a block that boxes cut through, or none has
    at_a_time: int


def _groups(work: _Blocks) -> Iterator[_Group]:
    lists, samples = work.lists, len(work.q) // work.lists.q_blocks // work.lists.idx.shape[1]
    idx = lists.idx.expand(samples, -1, -1, -1).flatten(0, 2).long()  # [B * H * nQ, W]
    cnt, lengths = _lengths(idx, lists.cnt.expand(samples, -1, -1).flatten(), lists)
    padding = torch.arange(idx.shape[1], device="cpu") >= cnt[:, None]
    idx = torch.where(padding, idx.gather(1, (cnt - 1).clamp(min=0)[:, None]), idx)
    cut = _cut_rows(work, idx, cnt)

    def group(row: Tensor, count: int, is_cut: bool, at_a_time: int) -> _Group:
        return _Group(row, idx[row, :count], lengths[row], int(lengths[row].max()), is_cut, at_a_time)

    yield from (group(*some) for some in _equal_rows(work, cut.nonzero()[:, 0], cnt, lengths))
    yield from (group(*some) for some in _sorted_rows(work, (~cut).nonzero()[:, 0], cnt, lengths))


Rows = tuple[Tensor, int, bool, int]  # which, blocks of each, whether boxes cut them, at a time


def _equal_rows(work: _Blocks, rows: Tensor, cnt: Tensor, lengths: Tensor) -> Iterator[Rows]:
    """Those with equally many blocks and keys; heads side by side, which can share what their boxes hide."""
    q_blocks, heads = work.lists.q_blocks, len(work.q) // work.lists.q_blocks
    rows = rows[(rows % q_blocks).argsort(stable=True)]
    kinds, kind = torch.stack([cnt, lengths], 1)[rows].unique(return_inverse=True, dim=0)
    for number, (count, _) in enumerate(kinds.tolist()):
        at_a_time = work.at_a_time(count)  # whole query blocks, all of their heads, as far as they fit
        at_a_time = at_a_time // heads * heads or -(-heads // -(-heads // at_a_time))
        yield rows[kind == number], count, True, at_a_time


def _sorted_rows(work: _Blocks, rows: Tensor, cnt: Tensor, lengths: Tensor) -> Iterator[Rows]:
    """The longest lists first, as many as fit together."""
    rows = rows[lengths[rows].argsort(descending=True, stable=True)]
    counts, start = cnt[rows].tolist(), 0
    while start < len(counts):
        count = counts[start]
        stop = start + work.at_a_time(count) if count else len(counts)
        yield rows[start:stop], count, False, work.at_a_time(count)
        start = stop


def _lengths(idx: Tensor, cnt: Tensor, lists: BlockLists) -> tuple[Tensor, Tensor]:
    """How many blocks and how many keys are in each list of idx [..., W], cnt [...]."""
    cnt = cnt.long()
    last = idx.gather(-1, (cnt - 1).clamp(min=0)[..., None])[..., 0]
    ragged = (last == lists.kv_blocks - 1) & (cnt > 0)
    return cnt, cnt * lists.kv_block - ragged * (-lists.kv_len % lists.kv_block)


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


class _BoxBias:
    """Boxes of gathered blocks as an additive bias.

    Neighbouring rows of one query block, heads with equal lists, share what was made for the first.
    """

    def __init__(self, work: _Blocks, columns: int) -> None:
        self.work, self.columns = work, columns
        self._lists = self._hidden = torch.empty(0, device="cpu")

    def of(self, row: Tensor, idx: Tensor) -> Tensor:
        """Bias [n, 1, q_block, columns], one for each n-th of the rows."""
        wanted = torch.cat([(row % self.work.lists.q_blocks)[:, None], idx], 1)
        alike, rows = wanted.unique_consecutive(return_counts=True, dim=0)
        wanted = alike if (rows == rows[0]).all() else wanted
        if not torch.equal(wanted, self._lists):
            seen = self._seen(wanted[:, 0], wanted[:, 1:])[:, None]
            self._lists, self._hidden = wanted, _bias(seen, self.work.q.dtype)
        return self._hidden

    def _seen(self, q_block: Tensor, idx: Tensor) -> Tensor:
        """bool [lists, q_block, columns]."""
        assert self.work.boxes is not None  # no list is cut without
        place, low, high = (x.unbind(1) for x in self.work.boxes)
        keys = [x[idx].flatten(1)[:, None, : self.columns] for x in place]
        along = [
            (a[q_block, :, None] <= x) & (x <= b[q_block, :, None]) for x, a, b in zip(keys, low, high, strict=True)
        ]
        return functools.reduce(torch.logical_and, along) | (keys[0] < 0)


class _Others(NamedTuple):
    """What stands for the blocks that are not listed."""

    key: Tensor  # [B * H, nK, D]
    value: Tensor  # [B * H, nK, D_v]
    bias: Tensor  # of the scores, [B * H, nK]
    variance: Tensor | None  # [B * H, 1, nK], times the squares of scaled queries
    slope: Tensor | None  # [B * H * nQ, D, D_v]
    reach: Tensor | None  # [B * H * nQ, 1, 1], of steps of scaled queries
    lists: BlockLists
    scale: float  # of queries

    @classmethod
    def of(cls, made: StandIns, lists: BlockLists, scale: float, dtype: torch.dtype) -> _Others:
        """The same, flat; what meets queries is of their `dtype`."""
        if not scale:  # scores that are all 0 do not vary
            made = made._replace(variance=None, slope=None, reach=None)
        bias = made.log_count.clamp(min=-_NEVER).expand(made.key.shape[:3]).flatten(0, 1)
        variance = None if made.variance is None else made.variance.div(2 * scale**2).flatten(0, 1)[..., None, :]
        key, slope = made.key.flatten(0, 1).to(dtype), made.slope
        if slope is not None:
            slope = slope.expand(-1, -1, lists.q_blocks, -1, -1).flatten(0, 2).to(dtype)
        reach = None if made.reach is None else made.reach.flatten()[:, None, None]
        return cls(key, made.value.flatten(0, 1), bias, variance, slope, reach, lists, scale)

    def joined(self, part: _Part, q: Tensor, row: slice | Tensor) -> _Part:
        """Attention of scaled q [n, q_block, D] to the keys of `part` and to what stands for all others.

        Args:
            row: which query blocks these are, a slice of one head's or the numbers of any.
        """
        heads = (row if isinstance(row, Tensor) else row.start) // self.lists.q_blocks
        keys, values = self.key[heads], self.value[heads]  # [n, nK, D] for any heads, [nK, D] for one
        flat = *keys.shape[:-2], -1
        scores = _product(q.reshape(*flat, q.shape[2]), keys).view(*q.shape[:2], -1)
        scores.add_(self.bias[heads].masked_fill(self._listed(row), -_NEVER)[:, None])
        if self.variance is not None:
            squares = torch.linalg.vector_norm(q, dim=-1, keepdim=True).square_()
            scores.add_((squares * self.variance[heads]).clamp_(max=MOST_BIAS))
        top = torch.maximum(part.top, scores.amax(-1, keepdim=True))
        weights, share = _powers(scores, top), (part.top - top).exp_()
        total = weights.sum(-1, keepdim=True)
        sums = _weighted(weights.view(*flat, weights.shape[2]), values).view_as(part.sums)
        sums.addcmul_(part.sums, share)
        if self.slope is not None:
            sums.addcmul_(self._steps(q, self.slope[row], row), total)
        return _Part(sums, top, total.addcmul_(part.total, share))

    def _steps(self, q: Tensor, slope: Tensor, row: slice | Tensor) -> Tensor:
        """How far each row's value moves, [n, q_block, D_v]."""
        steps = torch.bmm(q, slope)  # of scaled queries
        if self.reach is None:
            return steps.div_(self.scale)
        reach = self.reach[row] * math.copysign(1, self.scale)
        squares = torch.linalg.vector_norm(steps, dim=-1, keepdim=True).square_().add_((reach * self.scale).square())
        return steps.mul_(squares.clamp_(min=torch.finfo(squares.dtype).tiny).rsqrt_().mul_(reach))

    def _listed(self, row: slice | Tensor) -> Tensor:
        """bool [n, nK]."""
        idx, cnt = self.lists.idx.flatten(0, 2), self.lists.cnt.flatten()
        if len(cnt) < len(self.key) * self.lists.q_blocks:  # all samples have the same lists
            row = torch.arange(row.start, row.stop) % len(cnt) if isinstance(row, slice) else row % len(cnt)
        return mask_of(idx[row], cnt[row], self.lists.kv_blocks)


@functools.cache
def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's product a @ b.mT of float32 matrices, if this torch has it.

    It is twice as fast as the one that `torch.mm` calls on processors that are not of Intel's.
    """
    try:
        product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        product(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return product


def _product(a: Tensor, b: Tensor, room: Tensor | None = None) -> Tensor:
    """[..., rows, D] times [..., columns, D] -> [..., rows, columns], of matrices or batches, in `room` if it can."""
    if a.ndim == 2 and a.dtype == torch.float32 and (fast := _onednn()) is not None:
        plain = b.is_contiguous() or b.mT.is_contiguous()  # gaps take oneDNN a thousand times as long
        return fast(a, b if plain else b.contiguous(), None, "none", [], "")
    return torch.matmul(a, b.mT, out=room)


def _powers(scores: Tensor, top: Tensor) -> Tensor:
    """exp(scores - top), in place: torch's own exp takes twenty times as long as exp2.

    Scores in powers of two from the start would round the large ones to other weights.
    """
    return scores.sub_(top).mul_(_LOG2_E).exp2_()


def _weighted(weights: Tensor, values: Tensor, scratch: _Scratch | None = None) -> Tensor:
    """Sums of values [..., columns, D_v] by weights [..., rows, columns], computed in the format of the values."""
    if weights.dtype == values.dtype:
        return _product(weights, values.mT)
    room = scratch.take("weights", values.dtype, *weights.shape) if scratch else None
    rounded = weights.to(values.dtype) if room is None else room.copy_(weights)
    return _product(rounded, values.mT).to(weights.dtype)


def _accumulated(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _computable(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores: 0 where `mask` is True, elsewhere what outweighs every score; or a mask that says it."""
    if is_bias(mask):
        return mask.to(dtype).clamp(min=-_NEVER)
    bias: Tensor = mask.to(dtype).sub_(1).mul_(_NEVER)
    return bias


def _cut(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] -> [B * H * n, block, D], contiguous, the ragged tail filled with zeros."""
    padding = -x.shape[2] % block
    padded = F.pad(x, (0, 0, 0, padding)) if padding else x  # padding by nothing would copy
    blocks: Tensor = padded.contiguous().unflatten(2, (-1, block)).flatten(0, 2)
    return blocks


def _strips(
    q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None, multiple: int = 1
) -> Iterator[tuple[int, slice, Tensor]]:
    """Head of [B * H], rows, and their scores of all keys [rows, N_kv]."""
    exact = _accumulated(q)
    queries, keys = (q.to(exact) * scale).flatten(0, 1), k.to(exact).flatten(0, 1).contiguous()
    hidden = None if key_mask is None else _bias(key_mask, exact)
    for head in range(len(queries)):
        for rows in strips(q.shape[2], k.shape[2] * exact.itemsize, _STRIP_BYTES, multiple):
            scores = _product(queries[head, rows], keys[head])
            yield head, rows, scores if hidden is None else scores.add_(hidden[head // q.shape[1]])


def _joined(parts: list[tuple[Tensor, Tensor]], q: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [rows, D_v] and LSEs [rows] of all strips -> [B, H, N, D_v], [B, H, N]."""
    out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return out.view(*q.shape[:3], -1).to(q.dtype), lse.view(q.shape[:3])


def _tiles(masses: list[Tensor], q: Tensor) -> Tensor:
    """[nQ of a strip, nK] of all strips -> [B, H, nQ, nK]."""
    return torch.cat(masses).view(*q.shape[:2], -1, masses[0].shape[1])


def _column_sums(weights: Tensor, block: int) -> Tensor:
    """[rows, N_kv] -> [rows, nK]."""
    whole = weights.shape[1] // block * block
    sums = weights[:, :whole].unflatten(1, (-1, block)).sum(-1) if whole else weights[:, :0]
    if whole == weights.shape[1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], 1)


def _row_sums(tiles: Tensor, block: int) -> Tensor:
    """[rows, nK] -> [ceil(rows / block), nK]."""
    padded = F.pad(tiles, (0, 0, 0, -len(tiles) % block))
    sums: Tensor = padded.unflatten(0, (-1, block)).sum(1)
    return sums
