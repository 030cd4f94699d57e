"""Custom ops, opaque to `torch.compile`, each with a fake that knows the shapes of its outputs.

The back end is chosen within an op, where no compiler looks, and recorded there (`registry.record`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from diffsparse_kernels import fit, rows, select
from diffsparse_kernels import summaries as plain
from diffsparse_kernels.case import DENSE_BLOCKS, SELECTION, Case, Kind, Summary
from diffsparse_kernels.lists import BlockLists, blocks_of, number_type
from diffsparse_kernels.lists import lists_of_bits as lists_of_these_bits
from diffsparse_kernels.masks import Boxes
from diffsparse_kernels.registry import Choice, choose, choose_rounded, choose_summary, running
from diffsparse_kernels.summaries import StandIns, Summaries

Sparse = Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, lists, scale, key_mask, ...) -> out, lse


def summarised(
    kernel: Sparse,
    folds: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    key_mask: Tensor | None,
    summary: str,
    parts: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Attention to the listed blocks and to what stands for the others -> out, lse.

    Args:
        kernel: computes the listed blocks; and takes the stand-ins last, if it `folds` them into its loop.
        summary: how they are made, empty for none at all.
        parts: those of `Summaries` made before; none if they are to be made here.
    """
    if not summary:
        return _contiguous(*kernel(q, k, v, lists, scale, key_mask))
    by = cast(Summary, summary)
    made = Summaries._make(parts) if parts else summarise(k, v, lists.kv_block, scale, key_mask, by)
    case = Case.of("summaries", q, k, v, (lists.q_block, lists.kv_block), key_mask)
    stand_ins_of, merge = _kernels(case, q.device, plain.stand_ins, plain.merge)
    lists = replace(lists, bits=lists.packed())
    stand_ins = stand_ins_of(q, k, v, lists, scale, key_mask, made)
    if folds:
        return _contiguous(*kernel(q, k, v, lists, scale, key_mask, stand_ins=stand_ins))
    out, lse = _contiguous(*kernel(q, k, v, lists, scale, key_mask))
    return cast(tuple[Tensor, Tensor], merge(q, k, v, lists, scale, stand_ins, out, lse))


def _contiguous(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out.contiguous(), lse.contiguous()


def _kernels(case: Case, device: torch.device, *plain: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """These functions of the back end that computes the case, where it has them; else themselves, of plain torch.

    Without autocast, which would round what they hold in float32.
    """
    module = running(choose_summary(case, device))
    return (torch.autocast(device.type, enabled=False)(getattr(module, each.__name__, each)) for each in plain)


def summarise(k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None, by: Summary) -> Summaries:
    """Summaries of the key blocks: means by plain torch, first order by a kernel."""
    if by == "means":
        return plain.summarise(k, v, block, scale, key_mask, by)
    return Summaries(*first_order(k, v, block, scale, key_mask))


@torch.library.custom_op("diffsparse_kernels::first_order", mutates_args=())
def first_order(k: Tensor, v: Tensor, block: int, scale: float, key_mask: Tensor | None) -> list[Tensor]:
    """The parts of `Summaries` to first order, the slope only where it is kept."""
    case = Case.of("statistics", k, k, v, (block, block), key_mask)
    (statistics,) = _kernels(case, k.device, plain.first_order)
    made = statistics(k, v, block, scale, key_mask)
    counts = made.log_count.expand(made.key.shape[:3]).contiguous()  # of one shape whatever made them
    return [x for x in made._replace(log_count=counts) if x is not None]


@first_order.register_fake
def _(k: Tensor, v: Tensor, block: int, *_: object) -> list[Tensor]:
    empty, (dim, value_dim) = partial(k.new_empty, dtype=plain.kept_dtype(k)), (k.shape[3], v.shape[3])
    blocks = *k.shape[:2], blocks_of(k.shape[2], block)
    slope = [empty(*blocks, dim, value_dim)] if plain.keeps_slopes(k, v, block) else []
    moments = (k.new_empty(*blocks, dtype=_accumulated(k)) for _ in range(4))
    return [empty(*blocks, dim), empty(*blocks, value_dim), *moments, *slope]


@torch.library.custom_op("diffsparse_kernels::summary_error", mutates_args=())
def summary_error(q: Tensor, parts: Sequence[Tensor | None], q_block: int, scale: float) -> Tensor:
    """Estimated error of each tile's summary; `parts` are those of `Summaries`, whose slope is not read."""
    summaries = Summaries._make(parts)
    # How many keys a block had, and which of them were masked, is in its log count.
    case = Case.of("errors", q, summaries.key, summaries.key, (q_block, q_block))
    (error,) = _kernels(case, q.device, plain.summary_error)
    return cast(Tensor, error(q, summaries, q_block, scale))


@summary_error.register_fake
def _(q: Tensor, parts: Sequence[Tensor | None], q_block: int, scale: float) -> Tensor:
    key = cast(Tensor, parts[0])
    return key.new_empty(*q.shape[:2], blocks_of(q.shape[2], q_block), key.shape[2], dtype=_accumulated(q))


@torch.library.custom_op("diffsparse_kernels::lists_of_largest", mutates_args=())
def lists_of_largest(error: Tensor, share: float, always: Tensor | None, first: int, last: int) -> list[Tensor]:
    """Lists of the largest errors, of heads first .. last -> idx, cnt, bits, order."""
    (made,) = _kernels(SELECTION, error.device, select.lists_of_largest)
    return list(made(error, share, always, (first, last)))


@lists_of_largest.register_fake
def _(error: Tensor, share: float, always: Tensor | None, first: int, last: int) -> list[Tensor]:
    own, columns = (error.shape[0], last - first, error.shape[2]), error.shape[3]
    idx, cnt, order = _lists(error, own, columns)
    return [idx, cnt, error.new_empty(*own, (columns + 7) // 8, dtype=torch.uint8), order]


@torch.library.custom_op("diffsparse_kernels::lists_of_bits", mutates_args=())
def lists_of_bits(bits: Tensor, columns: int) -> list[Tensor]:
    """Lists of bits -> idx, cnt, order."""
    (made,) = _kernels(SELECTION, bits.device, lists_of_these_bits)
    return list(made(bits, columns))


@lists_of_bits.register_fake
def _(bits: Tensor, columns: int) -> list[Tensor]:
    return _lists(bits, bits.shape[:3], columns)


def _lists(like: Tensor, own: Sequence[int], columns: int) -> list[Tensor]:
    """Fakes of idx, cnt and order."""
    width: int | torch.SymInt = columns
    if like.device.type == "cpu":  # as wide as the longest
        width = torch.library.get_ctx().new_dynamic_size(min=1)
        torch._check(width <= columns)
    empty = partial(like.new_empty, dtype=torch.int32)
    batch, heads, rows = own
    idx = like.new_empty(*own, width, dtype=number_type(columns))
    return [idx, empty(batch, heads, rows), empty(batch * heads * rows)]


@torch.library.custom_op("diffsparse_kernels::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Dense attention -> out, lse."""
    case = Case.of("attend", q, k, v, DENSE_BLOCKS, key_mask)
    out, lse = running(choose(case, q.device, backend)).attention(q, k, v, scale, key_mask)
    return out.contiguous(), lse.contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


@torch.library.custom_op("diffsparse_kernels::attention_with_mass", mutates_args=())
def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_cached: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention with the block mass -> out, lse, mass."""
    fused = running(choose(Case.of("fused", q, k, v, (q_block, kv_block), key_mask), q.device, backend))
    if lse_cached is None and not getattr(fused, "SEES_WHOLE_ROWS", False):
        lse_cached = _estimated_lse(q, k, v, q_block, kv_block, scale, key_mask)
    out, lse, mass = fused.attention_with_mass(q, k, v, lse_cached, q_block, kv_block, scale, key_mask)
    return out.contiguous(), lse.contiguous(), mass.contiguous()


def _estimated_lse(
    q: Tensor, k: Tensor, v: Tensor, q_block: int, kv_block: int, scale: float, key_mask: Tensor | None
) -> Tensor:
    """What the summaries of all blocks of keys give for the LSE, which a kernel knows when its pass ends."""
    made = Summaries(*first_order(k, v, kv_block, scale, key_mask))
    none = BlockLists.none(q.shape[0], q.shape[1], q_block, kv_block, q.shape[2], k.shape[2], q.device)
    (merge,) = _kernels(Case.of("summaries", q, k, v, (q_block, kv_block), key_mask), q.device, plain.merge)
    nothing = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf, dtype=_accumulated(q))
    return cast(Tensor, merge(q, k, v, none, scale, StandIns(*made[:4]), *nothing)[1])


@attention_with_mass.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lse_cached: Tensor | None, q_block: int, kv_block: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return *_outputs(q, v), _tiles(q, k, q_block, kv_block)


@torch.library.custom_op("diffsparse_kernels::block_mass", mutates_args=())
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    backend: str,
) -> Tensor:
    """Block mass alone."""
    case = Case.of("mass", q, k, k, (q_block, kv_block), key_mask)
    kernel = running(choose(case, q.device, backend))
    mass: Tensor = kernel.block_mass(q, k, lse, q_block, kv_block, scale, key_mask)
    return mass.contiguous()


@block_mass.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, *_: object) -> Tensor:
    return _tiles(q, k, q_block, kv_block)


@torch.library.custom_op("diffsparse_kernels::eight_bit_attention", mutates_args=())
def eight_bit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    order: Tensor | None,
    packed: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    summary: str,
    summaries: Sequence[Tensor | None],
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention in eight bits, by the fastest that can -> out, lse; summaries are not rounded."""
    lists = BlockLists(idx, cnt, q_block, kv_block, q.shape[2], k.shape[2], order, packed)
    case = Case.of("attend", q, k, v, (q_block, kv_block), key_mask)._replace(precision=precision)
    kernel = partial(running(choose_rounded(case, q.device, backend)).block_sparse_attention, precision=precision)
    return summarised(kernel, False, q, k, v, lists, scale, key_mask, summary, summaries)


@eight_bit_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


@torch.library.custom_op("diffsparse_kernels::quantised_attention", mutates_args=())
def quantised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    order: Tensor | None,
    packed: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    summary: str,
    summaries: Sequence[Tensor | None],
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention in whole numbers of fewer than eight bits, emulated -> out, lse."""
    lists = BlockLists(idx, cnt, q_block, kv_block, q.shape[2], k.shape[2], order, packed)
    kernel = partial(running(Choice(f"int{bits} emulated")).quantised_attention, bits=bits)
    return summarised(kernel, False, q, k, v, lists, scale, key_mask, summary, summaries)


@quantised_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


@torch.library.custom_op("diffsparse_kernels::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    order: Tensor | None,
    packed: Tensor | None,
    q_block: int,
    kv_block: int,
    scale: float,
    key_mask: Tensor | None,
    place: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    summary: str,
    summaries: Sequence[Tensor | None],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention -> out, lse."""
    lists = BlockLists(idx, cnt, q_block, kv_block, q.shape[2], k.shape[2], order, packed)
    boxes = None if place is None or low is None or high is None else Boxes(place, low, high)
    case = Case.of("attend", q, k, v, (q_block, kv_block), key_mask, boxes)
    choice = choose(case._replace(summary=cast(Summary, summary) or None), q.device, backend)
    kernel = partial(running(choice).block_sparse_attention, boxes=boxes)
    return summarised(kernel, choice.folds, q, k, v, lists, scale, key_mask, summary, summaries)


@block_sparse_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


@torch.library.custom_op("diffsparse_kernels::move_rows", mutates_args=())
def move_rows(tensors: Sequence[Tensor], orders: Tensor, picked: Tensor) -> list[Tensor]:
    """Rows of each head by number."""
    (moved,) = _kernels(_rows_case("rows", tensors[0]), orders.device, rows.move_rows)
    return cast(list[Tensor], moved(tensors, orders, picked))


@move_rows.register_fake
def _(tensors: Sequence[Tensor], orders: Tensor, picked: Tensor) -> list[Tensor]:
    return [x.new_empty(*x.shape[:2], orders.shape[1], x.shape[3]) for x in tensors]


@torch.library.custom_op("diffsparse_kernels::restore_rows", mutates_args=())
def restore_rows(
    x: Tensor, inverses: Tensor | None, picked: Tensor | None, correction: Sequence[Tensor | None]
) -> Tensor:
    """Rows corrected and by number; `correction` has the parts of `Correction`, or none."""
    made = rows.Correction(*correction) if correction else None
    (restored,) = _kernels(_rows_case("rows", x), x.device, rows.restore_rows)
    return cast(Tensor, restored(x, inverses, picked, made))


@restore_rows.register_fake
def _(x: Tensor, inverses: Tensor | None, *_: object) -> Tensor:
    if inverses is None:
        return x.new_empty(x.shape)
    return x.new_empty(x.shape[0], inverses.shape[1], x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.custom_op("diffsparse_kernels::fit_rows", mutates_args=())
def fit_rows(
    exact: Tensor, out: Tensor, probes: Tensor, codes: Tensor | None, scale: Tensor | None, basis: Tensor | None
) -> list[Tensor]:
    """What is fitted of a `Correction`: by_output, constant, and by_code where there are codes."""
    case = _rows_case("fit", out, 1 << (exact.shape[2] - 1).bit_length())
    (fitted,) = _kernels(case, out.device, fit.fit_rows)
    made = fitted(exact, out, probes, codes, scale, basis)
    return [x for x in (made.by_output, made.constant, made.by_code) if x is not None]


@fit_rows.register_fake
def _(exact: Tensor, out: Tensor, probes: Tensor, codes: Tensor | None, *_: object) -> list[Tensor]:
    (batch, heads), dim = out.shape[:2], out.shape[3]
    wide = partial(out.new_empty, dtype=_accumulated(out))
    by_code = [] if codes is None else [wide(batch, heads, codes.shape[3], dim)]
    return [out.new_empty(batch, heads, dim, dim), wide(batch, heads, 1, dim), *by_code]


def _rows_case(kind: Kind, x: Tensor, rows: int = 128) -> Case:
    """Of some rows of x [B, H, N, D]; their kernels take any strides."""
    return Case(kind, x.dtype, x.shape[3], x.shape[3], rows, DENSE_BLOCKS[1])


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Fakes of out and lse."""
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=_accumulated(q))


def _tiles(q: Tensor, k: Tensor, q_block: int, kv_block: int) -> Tensor:
    """A fake of the block mass."""
    tiles = blocks_of(q.shape[2], q_block), blocks_of(k.shape[2], kv_block)
    return q.new_empty(*q.shape[:2], *tiles, dtype=_accumulated(q))


def _accumulated(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
