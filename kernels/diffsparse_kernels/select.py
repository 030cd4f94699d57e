"""Which blocks to keep, from their softmax mass. Static shapes, no device sync; of equals the lower number wins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffsparse_kernels.lists import lists_of_bits, number_type, to_bits
from diffsparse_kernels.strips import tiles

INFINITY = 0x7F800000  # as the bits of a float32, which count up as the number does where it isn't negative
EXPONENT = 23  # bits below it
OCTAVES = 40  # below the largest error, a block has none
DIGITS = ((22, 9), (11, 11), (0, 11))  # of a key: bits below it, bits of it
_PAIR_BYTES = 16  # that a pair of blocks takes for a moment


def select_rows(mass: Tensor, keep: int | Tensor, always: Tensor | None = None) -> Tensor:
    """The `keep` blocks of each query row with the most mass (AdaSpa, arXiv 2502.21079, row-wise selection).

    Args:
        mass: float [..., nQ, nK]; NaN counts as zero.
        keep: blocks a row, an int or an int tensor [...], one number for each head.
        always: bool, broadcastable to mass: blocks that are kept whatever their mass. They take their places first; a
            row that has more of them than `keep` keeps them all.

    Returns:
        bool mask [..., nQ, nK].
    """
    groups = mass.reshape(-1, 1, *mass.shape[-2:])
    always = None if always is None else always.expand(mass.shape).reshape(groups.shape)
    keep = keep if isinstance(keep, int) else keep.expand(mass.shape[:-2]).reshape(-1, 1)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=mass.device)
    for tile, taken in _best_of_rows(groups, keep, always):
        mask[tile] = taken
    return mask.view(mass.shape)


def bits_of_rows(mass: Tensor, keep: int | Tensor, always: Tensor | None) -> Tensor:
    """`select_rows` as bits, uint8 [B, H, nQ, ceil(nK / 8)], with no mask of all: mass is [B, H, nQ, nK]."""
    always = None if always is None else always.expand(mass.shape)
    bits = torch.empty(*mass.shape[:3], -(-mass.shape[3] // 8), dtype=torch.uint8, device=mass.device)
    for tile, taken in _best_of_rows(mass, keep, always):
        bits[tile] = to_bits(taken)
    return bits


def _best_of_rows(
    mass: Tensor, keep: int | Tensor, always: Tensor | None
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Tiles of mass [B, H, nQ, nK], and which of their blocks are taken."""
    for tile in tiles(mass, mass.shape[3] * _PAIR_BYTES):
        some, number = mass[tile].nan_to_num(0.0), keep if isinstance(keep, int) else keep[tile[:2]]
        if always is not None:
            some.masked_fill_(always[tile], torch.inf)
        threshold, number = _nth_largest(some, number)
        above, equal = some > threshold, some == threshold
        places = number - above.sum(-1, keepdim=True)
        taken = above | (equal & (equal.cumsum(-1) <= places))
        yield tile, taken if always is None else taken | always[tile]


def _nth_largest(mass: Tensor, n: int | Tensor) -> tuple[Tensor, int | Tensor]:
    """The n-th largest of each row [..., nQ, 1], and n as it compares with rows: one number needs no sort."""
    length = mass.shape[-1]
    if isinstance(n, int):
        return mass.kthvalue(length + 1 - min(max(n, 1), length), -1, keepdim=True).values, n
    n = n[..., None, None]
    ranked = mass.sort(-1, descending=True).values
    return ranked.gather(-1, (n - 1).clamp(0, length - 1).expand(*mass.shape[:-1], 1)), n


def select_heads(mass: Tensor, density: float) -> Tensor:
    """The share `density` of each head's blocks, rounded up, with the most mass; the best of each row among them.

    Args:
        mass: float [..., nQ, nK], compared as float32; what is negative or not finite counts as zero.
        density: share of blocks to keep, in (0, 1]; where rows are more than that, each has its best.

    Returns:
        bool mask [..., nQ, nK].
    """
    groups = mass.reshape(-1, 1, *mass.shape[-2:])
    mask = torch.empty(groups.shape, dtype=torch.bool, device=mass.device)
    cut = Cut.of(groups, density, None, 0)
    for tile, taken in cut.taken(groups, None):
        mask[tile] = taken
    return mask.view(mass.shape)


def lists_of_largest(
    error: Tensor, share: float, always: Tensor | None, heads: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`functional.lists_of_largest` in plain torch, a few rows at a time -> idx, cnt, bits, order.

    Args:
        heads: the first of those whose lists are made, and the one behind the last.
    """
    columns = error.shape[3]
    bits = torch.empty(*error.shape[:3], -(-columns // 8), dtype=torch.uint8, device=error.device)
    for tile, taken in Cut.of(error, share, always, OCTAVES).taken(error, always):
        bits[tile] = to_bits(taken if always is None else taken | always[tile[2]])
    bits = bits if heads == (0, error.shape[1]) else bits[:, slice(*heads)].clone()
    idx, cnt, order = lists_of_bits(bits, columns)
    return idx, cnt, bits, order


class Cut(NamedTuple):
    """What is taken of a group of heads: the best of each row, what lies above a key, and the first of its equals.

    A key is the bits of a float32 that isn't negative: it counts up as the number does.

    Attributes:
        best: number of the best block of each row, int64 [G, H, nQ, 1].
        key: int32 [G, 1, 1, 1].
        equals: how many that equal the key are taken beside the best of rows, int64 [G, 1, 1, 1].
        floor: the key up to which nothing is taken, int32 [G, 1, 1, 1].
    """

    best: Tensor
    key: Tensor
    equals: Tensor
    floor: Tensor

    @classmethod
    def of(cls, error: Tensor, share: float, always: Tensor | None, octaves: int) -> Cut:
        """What makes a share of each group's blocks, rounded up: the largest, and that of each row.

        Three passes, each of which counts a digit of the keys that the last one has left.

        Args:
            error: float [G, H, nQ, nK].
            always: bool [nQ, nK], blocks that are taken anyway and not of the share.
            octaves: what lies so far below the largest is not taken, wherever the budget has room; 0 sets no floor.
        """
        best = torch.empty(*error.shape[:3], 1, dtype=torch.int64, device=error.device)
        highest = torch.empty_like(best, dtype=torch.int32)
        counts = _no_counts(error, DIGITS[0][1])
        for tile in tiles(error, error.shape[3] * _PAIR_BYTES):
            keys = _keys(error, tile, always)
            highest[tile], best[tile] = keys.max(-1, keepdim=True)
            _count(counts[tile[0]], keys >> DIGITS[0][0], None)
        floor = _floor(highest, octaves)
        left = (wanted(error, share) - (highest > floor).sum((1, 2))).clamp(min=0)  # [G, 1]
        key = torch.zeros_like(floor)
        for shift, bits in DIGITS:
            if shift != DIGITS[0][0]:
                counts = _no_counts(error, bits)
                for tile in tiles(error, error.shape[3] * _PAIR_BYTES):
                    keys = _keys(error, tile, always)
                    _count(counts[tile[0]], *_digit(keys, key[tile[0]], shift, bits))
            counts.sub_(_count(_no_counts(error, bits), *_digit(highest, key, shift, bits)))
            digit, left = _last_bin(counts[:, :-1], left)
            key = key << bits | digit[..., None, None].int()
        return cls(best, key, left[..., None, None], floor)

    def taken(self, error: Tensor, always: Tensor | None) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Tiles of the groups, and which of their blocks are taken: bool [g, h, rows, nK]. Arguments as for `of`."""
        small = number_type(error.shape[3])
        left = self.equals.clone()
        for tile in tiles(error, error.shape[3] * _PAIR_BYTES):
            keys, best, part = _keys(error, tile, always), self.best[tile], tile[0]
            equal = (keys == self.key[part]).scatter_(-1, best, False)
            ties = equal.sum(-1, keepdim=True)
            until = ties.flatten(1).cumsum(1).view_as(ties)
            places = (left[part] - (until - ties)).clamp(0, error.shape[3]).to(small)
            taken = (keys > self.key[part]).logical_or_(equal & (equal.cumsum(-1, dtype=small) <= places))
            left[part] -= until.flatten(1)[:, -1, None, None, None]
            yield tile, taken.scatter_(-1, best, True).logical_and_(keys > self.floor[part])


def wanted(error: Tensor, share: float) -> int:
    """Blocks of a group [G, H, nQ, nK] that a share of them are: rounded up once, 0.7 of 10 is 7."""
    return math.ceil(round(share * math.prod(error.shape[1:]), 6))


def _keys(error: Tensor, tile: tuple[slice, ...], always: Tensor | None) -> Tensor:
    """Keys of a tile, int32 [g, h, rows, nK]; 0 for what is negative, not finite, or taken anyway."""
    keys = error[tile].float().contiguous().view(torch.int32).clamp(min=0)
    keys.masked_fill_(keys >= INFINITY, 0)
    return keys if always is None else keys.masked_fill_(always[tile[2]], 0)


def _floor(highest: Tensor, octaves: int) -> Tensor:
    """The key up to which nothing is taken: of whole octaves; beneath all keys where there is no floor."""
    top = highest.amax((1, 2), keepdim=True)
    if not octaves:
        return torch.full_like(top, -1)
    return (((top >> EXPONENT) - octaves).clamp(min=0) + 1 << EXPONENT) - 1


def _digit(keys: Tensor, key: Tensor, shift: int, bits: int) -> tuple[Tensor, Tensor]:
    """A digit of keys, and whether the digits before it are those of `key`."""
    return keys >> shift & (1 << bits) - 1, keys >> shift + bits == key


def _no_counts(error: Tensor, bits: int) -> Tensor:
    """Zeros for each digit, and for what is not counted: int64, for float32 stops at 2^24."""
    return torch.zeros(error.shape[0], (1 << bits) + 1, dtype=torch.int64, device=error.device)


def _count(counts: Tensor, digits: Tensor, those: Tensor | None) -> Tensor:
    """Add how often each digit comes, in place; of `those` alone."""
    if those is not None:
        digits = digits.masked_fill_(~those, counts.shape[1] - 1)
    digits = digits.flatten(1).long()
    return counts.scatter_add_(1, digits, counts.new_ones(()).expand(digits.shape))


def _last_bin(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The highest digit that leaves enough at it and above, and how many of its own are wanted: int64 [G, 1]."""
    from_top = counts.flip(-1).cumsum(-1).flip(-1)
    last = ((from_top >= wanted).sum(-1, keepdim=True) - 1).clamp(min=0)
    return last, wanted - (from_top - counts).gather(-1, last)


def select_mass(mass: Tensor, share: float) -> Tensor:
    """The fewest blocks of each query row that together hold at least `share` of the row's mass (top-p).

    Args:
        mass: float [..., nQ, nK]; NaN counts as zero.
        share: of the row's mass, in (0, 1].

    Returns:
        bool mask [..., nQ, nK]; a row without mass keeps its first block.
    """
    mass = mass.nan_to_num(0.0)
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    kept = (before < share * ranked.sum(-1, keepdim=True)) & (ranked > 0)
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)
