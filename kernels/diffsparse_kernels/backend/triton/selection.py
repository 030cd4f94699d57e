"""`lists_of_largest` and `lists_of_bits` on a device: integers, equal bit by bit, in few launches.

Errors are compared as keys, the bits of float32 numbers that aren't negative. Three kernels count one digit of them
each, by atomics on integers, whose order changes nothing; the next kernel finds from the counts where the cut is. A
program has a run of rows, the same in every kernel.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffsparse_kernels import select
from diffsparse_kernels.lists import number_type

INFINITY = tl.constexpr(select.INFINITY)
EXPONENTS = tl.constexpr(256)
EXPONENT_SHIFT = tl.constexpr(select.EXPONENT)
SHIFT_1, BINS_1 = (tl.constexpr(x) for x in (select.DIGITS[0][0], 1 << select.DIGITS[0][1]))
SHIFT_2, BINS_2 = (tl.constexpr(x) for x in (select.DIGITS[1][0], 1 << select.DIGITS[1][1]))
BINS_3 = tl.constexpr(1 << select.DIGITS[2][1])
COUNTS = tl.constexpr(EXPONENTS.value + BINS_1.value + BINS_2.value + BINS_3.value)  # of a group

WARPS = 4
ORDERED_ROWS = 32  # that a program of `order_lists` places
_LEAST_TILE, _MOST_TILE = 128, 1024  # columns
_MOST_RUNS = 1024  # of rows in all groups: the programs of a launch, several for each multiprocessor
_VARIES = ("wanted", "rows", "run", "runs", "kv_blocks", "q_blocks", "first", "last", "heads")


@triton.jit
def row_keys(error_ptr, always_ptr, row, columns, kv_blocks, q_blocks, ALWAYS: tl.constexpr):
    """Keys of one row, int32 [TILE]: 0 for what is negative, not finite, taken anyway, or beyond the last column."""
    there = columns < kv_blocks
    error = tl.load(error_ptr + tl.cast(row, tl.int64) * kv_blocks + columns, mask=there, other=0.0)
    key = error.to(tl.int32, bitcast=True)
    key = tl.where((key > 0) & (key < INFINITY), key, 0)
    if ALWAYS:
        always = tl.load(always_ptr + tl.cast(row % q_blocks, tl.int64) * kv_blocks + columns, mask=there, other=0)
        key = tl.where(always != 0, 0, key)
    return key


@triton.jit
def last_bin(counts_ptr, wanted, BINS: tl.constexpr):
    """The highest digit that leaves enough at it and above, and how many of its own are wanted."""
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins)  # int64
    from_top = tl.sum(counts) - tl.cumsum(counts) + counts
    last = tl.maximum(tl.sum((from_top >= wanted).to(tl.int32)) - 1, 0)
    return last, wanted - tl.sum(tl.where(bins > last, counts, 0))


@triton.jit
def budget(counts_ptr, wanted, OCTAVES: tl.constexpr):
    """How many are wanted beside the best of the rows, and the exponent up to which nothing is taken."""
    exponents = tl.arange(0, EXPONENTS)
    rows = tl.load(counts_ptr + exponents)
    floor = tl.maximum(tl.max(tl.where(rows > 0, exponents, 0)) - OCTAVES, 0)
    return tl.maximum(wanted - tl.sum(tl.where(exponents > floor, rows, 0)), 0), floor


@triton.jit
def place(rows, run, runs):
    """Of this program: the group, the number of its run, its first row and the one behind its last, of all groups."""
    group = tl.program_id(0) // runs
    number = tl.program_id(0) % runs
    start = number * run
    return group, number, group * rows + start, group * rows + tl.minimum(start + run, rows)


@triton.jit(do_not_specialize=_VARIES)
def count_first(
    error_ptr, always_ptr, counts_ptr, best_ptr, rows, run, runs, kv_blocks, q_blocks,
    ALWAYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first digit of all keys but the best of each row; the best, and its exponent.

    error float32 [G, rows, nK], always uint8 [nQ, nK]; counts int64 [G, COUNTS], zeros; best int32 [G, rows].
    """
    group, _, start, end = place(rows, run, runs)
    counts_at = counts_ptr + group.to(tl.int64) * COUNTS
    first_at = counts_at + EXPONENTS
    counts = tl.zeros([BINS_1], tl.int32)
    for row in tl.range(start, end):
        highest = tl.full([], -1, tl.int32)
        best = tl.full([], 0, tl.int32)
        for column in tl.range(0, kv_blocks, TILE):
            columns = column + tl.arange(0, TILE)
            key = row_keys(error_ptr, always_ptr, row, columns, kv_blocks, q_blocks, ALWAYS)
            counts += tl.histogram(key >> SHIFT_1, BINS_1)  # of columns beyond the last in bin 0, which no cut needs
            top, at = tl.max(key, 0, return_indices=True, return_indices_tie_break_left=True)
            best = tl.where(top > highest, column + at, best)
            highest = tl.maximum(highest, top)
        tl.store(best_ptr + row, best)
        tl.atomic_add(counts_at + (highest >> EXPONENT_SHIFT), 1, sem="relaxed")
        tl.atomic_add(first_at + (highest >> SHIFT_1), -1, sem="relaxed")
    tl.atomic_add(first_at + tl.arange(0, BINS_1), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=_VARIES)
def count_second(
    error_ptr, always_ptr, counts_ptr, best_ptr, wanted, rows, run, runs, kv_blocks, q_blocks,
    OCTAVES: tl.constexpr, ALWAYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The second digit of those keys whose first is at the cut. Arguments as for `count_first`, whose work is done."""
    group, _, start, end = place(rows, run, runs)
    counts_at = counts_ptr + group.to(tl.int64) * COUNTS
    second_at = counts_at + EXPONENTS + BINS_1
    left, _ = budget(counts_at, wanted, OCTAVES)
    first, _ = last_bin(counts_at + EXPONENTS, left, BINS_1)
    for row in tl.range(start, end):
        best = tl.load(best_ptr + row)
        for column in tl.range(0, kv_blocks, TILE):
            columns = column + tl.arange(0, TILE)
            key = row_keys(error_ptr, always_ptr, row, columns, kv_blocks, q_blocks, ALWAYS)
            here = (key >> SHIFT_1 == first) & (columns != best) & (key > 0)
            tl.atomic_add(second_at + (key >> SHIFT_2 & BINS_2 - 1), tl.full([TILE], 1, tl.int64), here, sem="relaxed")


@triton.jit
def cut_above_last(counts_ptr, wanted, OCTAVES: tl.constexpr):
    """What the first two digits are at the cut, how many of these keys are wanted, and the exponent of the floor."""
    left, floor = budget(counts_ptr, wanted, OCTAVES)
    first, left = last_bin(counts_ptr + EXPONENTS, left, BINS_1)
    second, left = last_bin(counts_ptr + EXPONENTS + BINS_1, left, BINS_2)
    return first << SHIFT_1 - SHIFT_2 | second, left, floor


@triton.jit(do_not_specialize=_VARIES)
def count_third(
    error_ptr, always_ptr, counts_ptr, best_ptr, equal_ptr, wanted, rows, run, runs, kv_blocks, q_blocks,
    OCTAVES: tl.constexpr, ALWAYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The third digit of those keys whose others are at the cut; also for each run, int32 [G, runs, BINS_3], zeros."""
    group, number, start, end = place(rows, run, runs)
    counts_at = counts_ptr + group.to(tl.int64) * COUNTS
    third_at = counts_at + EXPONENTS + BINS_1 + BINS_2
    equal_at = equal_ptr + (group * runs + number).to(tl.int64) * BINS_3
    before, _, _ = cut_above_last(counts_at, wanted, OCTAVES)
    for row in tl.range(start, end):
        best = tl.load(best_ptr + row)
        for column in tl.range(0, kv_blocks, TILE):
            columns = column + tl.arange(0, TILE)
            key = row_keys(error_ptr, always_ptr, row, columns, kv_blocks, q_blocks, ALWAYS)
            here = (key >> SHIFT_2 == before) & (columns != best) & (key > 0)
            digit = key & BINS_3 - 1
            tl.atomic_add(third_at + digit, tl.full([TILE], 1, tl.int64), here, sem="relaxed")
            tl.atomic_add(equal_at + digit, tl.full([TILE], 1, tl.int32), here, sem="relaxed")


@triton.jit
def write_tile(taken, kept, column, idx_at, bits_at, kv_blocks, BITS: tl.constexpr, TILE: tl.constexpr):
    """Add the taken columns of a tile, int32 [TILE], to a row's list, in which `kept` are -> how many are now."""
    columns = column + tl.arange(0, TILE)
    at = idx_at + kept + tl.cumsum(taken) - 1
    tl.store(at, columns.to(idx_at.dtype.element_ty), mask=taken != 0)
    if BITS:
        bits = tl.sum(tl.reshape(taken, [TILE // 8, 8]) << 7 - tl.arange(0, 8)[None, :], 1)
        bytes_ = column // 8 + tl.arange(0, TILE // 8)
        tl.store(bits_at + bytes_, bits.to(tl.uint8), mask=bytes_ < tl.cdiv(kv_blocks, 8))
    return kept + tl.sum(taken)


@triton.jit
def write_end(kept, idx_at, cnt_at, work_at, kv_blocks, TILE: tl.constexpr):
    """The length of a list, zeros behind it, and its share of the head's work."""
    for column in tl.range(kept // TILE * TILE, kv_blocks, TILE):
        columns = column + tl.arange(0, TILE)
        zeros = tl.zeros([TILE], idx_at.dtype.element_ty)
        tl.store(idx_at + columns, zeros, mask=(columns >= kept) & (columns < kv_blocks))
    tl.store(cnt_at, kept)
    tl.atomic_add(work_at, kept, sem="relaxed")


@triton.jit(do_not_specialize=_VARIES)
def write_lists(
    error_ptr, always_ptr, counts_ptr, best_ptr, equal_ptr, idx_ptr, cnt_ptr, bits_ptr, work_ptr,
    wanted, rows, run, runs, kv_blocks, q_blocks, first, last,
    OCTAVES: tl.constexpr, ALWAYS: tl.constexpr, TILE: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Lists of what is taken of rows first .. last of each group.

    idx int16 or int32 [G, last - first, nK], cnt int32 and bits uint8 beside it, work int32 [G * heads], zeros. The
    other arguments as for `count_third`.
    """
    group, number, start, end = place(rows, run, runs)
    counts_at = counts_ptr + group.to(tl.int64) * COUNTS
    before, left, floor = cut_above_last(counts_at, wanted, OCTAVES)
    digit, left = last_bin(counts_at + EXPONENTS + BINS_1 + BINS_2, left, BINS_3)
    cut = before << SHIFT_2 | digit
    others = tl.arange(0, RUNS)
    equal_at = equal_ptr + (group * runs + others).to(tl.int64) * BINS_3 + digit
    left = tl.minimum(left - tl.sum(tl.load(equal_at, mask=others < number, other=0).to(tl.int64)), 1 << 30).to(
        tl.int32
    )
    lowest = (floor + 1) << EXPONENT_SHIFT
    for row in tl.range(start, end):
        best = tl.load(best_ptr + row)
        in_group = row - group * rows
        own = (in_group >= first) & (in_group < last)
        list_ = tl.cast(group * (last - first) + in_group - first, tl.int64)
        idx_at, bits_at = idx_ptr + list_ * kv_blocks, bits_ptr + list_ * tl.cdiv(kv_blocks, 8)
        kept = tl.full([], 0, tl.int32)
        for column in tl.range(0, kv_blocks, TILE):
            columns = column + tl.arange(0, TILE)
            key = row_keys(error_ptr, always_ptr, row, columns, kv_blocks, q_blocks, ALWAYS)
            equal = ((key == cut) & (columns != best)).to(tl.int32)
            taken = (key > cut) | (columns == best) | ((equal != 0) & (tl.cumsum(equal) <= left))
            taken = taken & (key >= lowest)
            left -= tl.sum(equal)
            if ALWAYS:
                at = always_ptr + tl.cast(row % q_blocks, tl.int64) * kv_blocks + columns
                taken = taken | (tl.load(at, mask=columns < kv_blocks, other=0) != 0)
            if own:
                kept = write_tile(taken.to(tl.int32), kept, column, idx_at, bits_at, kv_blocks, True, TILE)
        if own:
            write_end(kept, idx_at, cnt_ptr + list_, work_ptr + list_ // q_blocks, kv_blocks, TILE)


@triton.jit(do_not_specialize=_VARIES)
def unpack_bits(bits_ptr, idx_ptr, cnt_ptr, work_ptr, kv_blocks, q_blocks, TILE: tl.constexpr):
    """The list of one row of bits; arguments as for `write_lists`."""
    row = tl.program_id(0).to(tl.int64)
    bits_at, idx_at = bits_ptr + row * tl.cdiv(kv_blocks, 8), idx_ptr + row * kv_blocks
    kept = tl.full([], 0, tl.int32)
    for column in tl.range(0, kv_blocks, TILE):
        columns = column + tl.arange(0, TILE)
        bits = tl.load(bits_at + columns // 8, mask=columns < kv_blocks, other=0).to(tl.int32)
        kept = write_tile(bits >> 7 - columns % 8 & 1, kept, column, idx_at, bits_at, kv_blocks, False, TILE)
    write_end(kept, idx_at, cnt_ptr + row, work_ptr + row // q_blocks, kv_blocks, TILE)


@triton.jit(do_not_specialize=_VARIES)
def order_lists(cnt_ptr, work_ptr, order_ptr, heads, q_blocks, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The order of the lists: the head with the most work first, the longest list first within it, of equals the first.

    cnt int32 [heads, nQ], work int32 [heads], their sums; order int32 [heads * nQ]. A program places ROWS lists of a
    head, by how many others come before each.
    """
    parts = tl.cdiv(q_blocks, ROWS)
    head = tl.program_id(0) // parts
    rows = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    there = rows < q_blocks
    lengths = tl.load(cnt_ptr + head * q_blocks + rows, mask=there, other=0)
    before = tl.zeros([ROWS], tl.int32)
    for start in tl.range(0, q_blocks, TILE):
        others = start + tl.arange(0, TILE)
        theirs = tl.load(cnt_ptr + head * q_blocks + others, mask=others < q_blocks, other=-1)
        longer = (theirs[None, :] > lengths[:, None]) | (
            (theirs[None, :] == lengths[:, None]) & (others[None, :] < rows[:, None])
        )
        before += tl.sum(longer.to(tl.int32), 1)
    work = tl.load(work_ptr + head)
    turn = tl.full([], 0, tl.int32)
    for start in tl.range(0, heads, TILE):
        others = start + tl.arange(0, TILE)
        theirs = tl.load(work_ptr + others, mask=others < heads, other=-1)
        turn += tl.sum(((theirs > work) | ((theirs == work) & (others < head))).to(tl.int32))
    tl.store(order_ptr + turn * q_blocks + before, head * q_blocks + rows, mask=there)


def lists_of_largest(
    error: Tensor, share: float, always: Tensor | None, heads: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`select.lists_of_largest` in six launches, with lists as wide as the keys have blocks."""
    batch, all_heads, q_blocks, kv_blocks = error.shape
    rows, own = all_heads * q_blocks, (batch, heads[1] - heads[0], q_blocks)
    run = -(-rows // max(min(_MOST_RUNS // batch, rows), 1))
    runs = -(-rows // run)
    sizes = batch * COUNTS.value, batch * runs * BINS_3.value, own[0] * own[1]
    counts, equal, work = _zeros(error.device, *sizes)
    best = torch.empty(batch, rows, dtype=torch.int32, device=error.device)
    idx, cnt, order = _empty_lists(own, kv_blocks, error.device)
    bits = torch.empty(*own, -(-kv_blocks // 8), dtype=torch.uint8, device=error.device)
    error = error.float().contiguous()
    shared = {
        "error_ptr": error,
        "always_ptr": error if always is None else always.contiguous().view(torch.uint8),
        "counts_ptr": counts,
        "best_ptr": best,
        "rows": rows,
        "run": run,
        "runs": runs,
        "kv_blocks": kv_blocks,
        "q_blocks": q_blocks,
        **constants(kv_blocks, always is not None),
    }
    cut = {"wanted": select.wanted(error, share), "OCTAVES": select.OCTAVES}
    lists = {"idx_ptr": idx, "cnt_ptr": cnt, "bits_ptr": bits, "work_ptr": work, "equal_ptr": equal}
    part = {"first": heads[0] * q_blocks, "last": heads[1] * q_blocks, "RUNS": triton.next_power_of_2(runs)}
    _launch(count_first, batch * runs, error, **shared)
    _launch(count_second, batch * runs, error, **shared, **cut)
    _launch(count_third, batch * runs, error, **shared, **cut, equal_ptr=equal)
    _launch(write_lists, batch * runs, error, **shared, **cut, **lists, **part)
    _order(cnt, work, order)
    return idx, cnt, bits, order


def lists_of_bits(bits: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """`lists.lists_of_bits` in three launches, with lists as wide as the keys have blocks."""
    own = bits.shape[0], bits.shape[1], bits.shape[2]
    _, work = _zeros(bits.device, 0, own[0] * own[1])
    idx, cnt, order = _empty_lists(own, columns, bits.device)
    pointers = {"bits_ptr": bits.contiguous(), "idx_ptr": idx, "cnt_ptr": cnt, "work_ptr": work}
    sizes = {"kv_blocks": columns, "q_blocks": own[2], "TILE": _tile(columns)}
    _launch(unpack_bits, cnt.numel(), bits, **pointers, **sizes)
    _order(cnt, work, order)
    return idx, cnt, order


def constants(kv_blocks: int, always: bool) -> dict[str, int]:
    """The constants of the kernels that read errors."""
    return {"ALWAYS": always, "TILE": _tile(kv_blocks)}


def _tile(columns: int) -> int:
    """Columns at a time: few sizes, so that few kernels are compiled."""
    return int(min(max(triton.next_power_of_2(columns), _LEAST_TILE), _MOST_TILE))


def _zeros(device: torch.device, wide: int, *narrow: int) -> list[Tensor]:
    """So many zeros as int64, and as int32, by one launch."""
    whole, *parts = torch.zeros(2 * wide + sum(narrow), dtype=torch.int32, device=device).split([2 * wide, *narrow])
    return [whole.view(torch.int64), *parts]


def _empty_lists(own: tuple[int, int, int], columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for idx [B, H, nQ, columns], cnt [B, H, nQ] and order."""
    empty = partial(torch.empty, dtype=torch.int32, device=device)
    return torch.empty(*own, columns, dtype=number_type(columns), device=device), empty(own), empty(math.prod(own))


def _order(cnt: Tensor, work: Tensor, order: Tensor) -> None:
    """Launch `order_lists`."""
    heads, q_blocks = work.numel(), cnt.shape[2]
    sizes = {"heads": heads, "q_blocks": q_blocks, "ROWS": ORDERED_ROWS, "TILE": _LEAST_TILE}
    pointers = {"cnt_ptr": cnt, "work_ptr": work, "order_ptr": order}
    _launch(order_lists, heads * -(-q_blocks // ORDERED_ROWS), cnt, **pointers, **sizes)


def _launch(kernel: Any, programs: int, like: Tensor, **arguments: object) -> None:
    """Run so many programs of a kernel on the device of a tensor."""
    with torch.cuda.device_of(like):
        kernel[(programs,)](**arguments, num_warps=WARPS)
