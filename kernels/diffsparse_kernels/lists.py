"""`BlockLists`: which key blocks each query block visits. The contract of all block-sparse kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from diffsparse_kernels.errors import KernelInputError
from diffsparse_kernels.strips import tiles

_PAIR_BYTES = 16  # that a pair of blocks takes for a moment
Block = int | tuple[int, int]
"""Tokens of a block: one number, or those of queries and of keys."""


def edges(block: Block) -> tuple[int, int]:
    """Queries and keys of a block: 64 is (64, 64), (128, 64) stays."""
    return block if isinstance(block, tuple) else (block, block)


def written(block: Block) -> int | str:
    """A block as tables have it: 64, or "128x64" where queries and keys differ."""
    q_block, kv_block = edges(block)
    return q_block if q_block == kv_block else f"{q_block}x{kv_block}"


def blocks_of(length: int, block: int) -> int:
    """Number of blocks of `block` tokens in `length`; the last may be ragged."""
    return -(-length // block)


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Ascending lists of the key blocks that each query block visits.

    Attributes:
        idx: int16 or int32 [B|1, H, nQ, W], block numbers; entries at or behind `cnt` are padding (zero).
        cnt: int32 [B|1, H, nQ], how many entries of each list count.
        q_block: queries of a block.
        kv_block: keys of a block.
        q_len: queries in all; the last block may be ragged.
        kv_len: keys in all; the last block may be ragged.
        order: int32 [B|1 * H * nQ], the lists in the order in which a GPU starts them, or None.
        bits: uint8 [B|1, H, nQ, ceil(nK / 8)], the same blocks as `to_bits` has them, where they are at hand, or None.

    Raises:
        KernelInputError: shapes, dtypes, devices or block counts that don't belong together.
    """

    idx: Tensor
    cnt: Tensor
    q_block: int
    kv_block: int
    q_len: int
    kv_len: int
    order: Tensor | None = None
    bits: Tensor | None = None

    def __post_init__(self) -> None:
        if min(self.q_block, self.kv_block) < 1:
            raise KernelInputError(f"wanted blocks of at least 1 token; got {self.q_block} and {self.kv_block}")
        self._check_tensors()
        idx = self.idx
        if idx.shape[2] != self.q_blocks or not 1 <= idx.shape[3] <= self.kv_blocks:
            raise KernelInputError(
                f"{self.q_len} x {self.kv_len} tokens in blocks of {self.q_block} x {self.kv_block} want lists for "
                f"{self.q_blocks} rows, 1 to {self.kv_blocks} wide; got {idx.shape[2]} rows, {idx.shape[3]} wide"
            )

    def _check_tensors(self) -> None:
        idx, cnt, order = self.idx, self.cnt, self.order
        if idx.ndim != 4 or cnt.shape != idx.shape[:3]:
            raise KernelInputError(
                f"wanted idx [B|1, H, nQ, W] and cnt [B|1, H, nQ]; got {tuple(idx.shape)} and {tuple(cnt.shape)}"
            )
        if idx.dtype not in (torch.int16, torch.int32) or cnt.dtype != torch.int32:
            raise KernelInputError(f"wanted idx as int16 or int32 and cnt as int32; got {idx.dtype} and {cnt.dtype}")
        if idx.device != cnt.device:
            raise KernelInputError(f"wanted idx and cnt on one device; got {idx.device} and {cnt.device}")
        if order is not None and (order.dtype != torch.int32 or order.shape != (cnt.numel(),)):
            raise KernelInputError(
                f"wanted the order of {cnt.numel()} lists as int32; got {order.dtype} {tuple(order.shape)}"
            )
        wanted = *cnt.shape, blocks_of(self.kv_blocks, 8)
        if self.bits is not None and (self.bits.dtype != torch.uint8 or self.bits.shape != wanted):
            raise KernelInputError(f"wanted bits as uint8 {wanted}; got {self.bits.dtype} {tuple(self.bits.shape)}")

    @property
    def q_blocks(self) -> int:
        """nQ, the number of query blocks."""
        return blocks_of(self.q_len, self.q_block)

    @property
    def kv_blocks(self) -> int:
        """nK, the number of key blocks."""
        return blocks_of(self.kv_len, self.kv_block)

    @property
    def nbytes(self) -> int:
        """Bytes that the lists hold."""
        return sum(x.nbytes for x in (self.idx, self.cnt, self.order, self.bits) if x is not None)

    def density(self) -> Tensor:
        """Share of all blocks that are listed: float32, 0-dim, on the lists' device (no sync)."""
        return self.cnt.mean(dtype=torch.float32) / self.kv_blocks

    @classmethod
    def none(
        cls, batch: int, heads: int, q_block: int, kv_block: int, q_len: int, kv_len: int, device: torch.device
    ) -> BlockLists:
        """Lists without any block.

        Args:
            batch: B.
            heads: H.
            q_block: queries of a block.
            kv_block: keys of a block.
            q_len: queries in all.
            kv_len: keys in all.
            device: where they are.
        """
        rows, columns = blocks_of(q_len, q_block), blocks_of(kv_len, kv_block)
        idx = torch.zeros(batch, heads, rows, 1, dtype=torch.int16, device=device)
        bits = torch.zeros(batch, heads, rows, blocks_of(columns, 8), dtype=torch.uint8, device=device)
        return cls(idx, idx[..., 0].int(), q_block, kv_block, q_len, kv_len, bits=bits)

    @classmethod
    def from_mask(
        cls, mask: Tensor, *, q_block: int, kv_block: int, q_len: int, kv_len: int, width: int | None = None
    ) -> BlockLists:
        """Lists of the True blocks of `mask`.

        Block numbers are int16 where that suffices: wide lists of many layers are what fills a device's memory. Lists
        that are built on a device are `ordered`.

        Args:
            mask: bool [B|1, H, nQ, nK].
            q_block: queries of a block.
            kv_block: keys of a block.
            q_len: queries in all.
            kv_len: keys in all.
            width: length of the padded lists. By default the longest list on the CPU, and nK elsewhere, where asking
                for the longest would wait for the device. Entries beyond a given width are dropped, the highest first.

        Raises:
            KernelInputError: a mask of another dtype or shape.

        Examples:
            >>> import torch
            >>> from diffsparse_kernels import BlockLists
            >>> mask = torch.tensor([[True, False, True], [False, True, False]])[None, None]
            >>> lists = BlockLists.from_mask(mask, q_block=64, kv_block=64, q_len=128, kv_len=192)
            >>> lists.idx.tolist(), lists.cnt.tolist()
            ([[[[0, 2], [1, 0]]]], [[[2, 1]]])
            >>> float(lists.density())
            0.5
        """
        _check_mask(mask, (blocks_of(q_len, q_block), blocks_of(kv_len, kv_block)), (q_block, kv_block, q_len, kv_len))
        cnt = mask.sum(-1, dtype=torch.int32)
        if width is None:
            width = _longest(cnt, mask.shape[-1])
        idx = torch.empty(*cnt.shape, width, dtype=number_type(mask.shape[-1]), device=mask.device)
        for tile in tiles(mask, mask.shape[3] * _PAIR_BYTES):
            idx[tile] = _compacted(mask[tile], width)
        lists = cls(idx, cnt.clamp(max=width), q_block, kv_block, q_len, kv_len)
        return lists if mask.device.type == "cpu" else lists.ordered()

    def trimmed(self, width: int) -> BlockLists:
        """The same lists in less memory; the longest has at most `width` entries."""
        if width >= self.idx.shape[3]:
            return self
        return replace(self, idx=self.idx[..., : max(width, 1)].contiguous())

    def ordered(self) -> BlockLists:
        """The same lists with their order: the head with the most work first, and within it the longest list first.

        A device starts blocks of threads in order, each as soon as there is room, so the short ones fill the gaps at
        the end. Heads stay together, for their keys and values then stay in the cache.
        """
        return replace(self, order=order_of(self.cnt))

    def by_head(self, batch: int) -> BlockLists:
        """The same lists for `batch` samples whose heads stand as samples of one head: idx [B * H, 1, nQ, W]."""
        idx, cnt = (_by_head(x, batch) for x in (self.idx, self.cnt))
        bits = None if self.bits is None else _by_head(self.bits, batch)
        order = self.order
        if order is not None and len(self.cnt) < batch:
            first = torch.arange(batch, dtype=torch.int32, device=order.device) * self.cnt.numel()
            order = (first[:, None] + order).flatten()
        return replace(self, idx=idx, cnt=cnt, order=order, bits=bits)

    def to(self, device: torch.device | str) -> BlockLists:
        """The same lists on another device."""
        idx, cnt = (x.to(device, non_blocking=True) for x in (self.idx, self.cnt))
        order, bits = (None if x is None else x.to(device, non_blocking=True) for x in (self.order, self.bits))
        return replace(self, idx=idx, cnt=cnt, order=order, bits=bits)

    def packed(self) -> Tensor:
        """The same blocks as bits, uint8 [B|1, H, nQ, ceil(nK / 8)]; made a few rows at a time, if need be."""
        if self.bits is not None:
            return self.bits
        bits = torch.empty(*self.cnt.shape, blocks_of(self.kv_blocks, 8), dtype=torch.uint8, device=self.cnt.device)
        for tile in tiles(bits, self.kv_blocks * _PAIR_BYTES):
            bits[tile] = to_bits(mask_of(self.idx[tile], self.cnt[tile], self.kv_blocks))
        return bits

    def to_mask(self) -> Tensor:
        """The same blocks as a bool mask [B|1, H, nQ, nK]."""
        if self.bits is not None:
            return from_bits(self.bits, self.kv_blocks)
        return mask_of(self.idx, self.cnt, self.kv_blocks)

    def to_token_mask(self, rows: slice, mask: Tensor) -> Tensor:
        """The same for some query rows, token by token: bool [B|1, H, rows, N_kv].

        Args:
            rows: they start with a block and end with one, or with the last row.
            mask: what `to_mask` gives, made once for all rows.
        """
        blocks = mask[:, :, rows.start // self.q_block : blocks_of(rows.stop, self.q_block)]
        tokens = blocks.repeat_interleave(self.q_block, 2)[:, :, : rows.stop - rows.start]
        return tokens.repeat_interleave(self.kv_block, 3)[..., : self.kv_len]

    def to_block_mask(self) -> BlockMask:
        """The same blocks for torch's FlexAttention, all of them full blocks."""
        mask, (q_block, kv_block) = self.to_mask(), (self.q_block, self.kv_block)
        samples = mask.shape[0]

        def listed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return mask[b % samples, h, q // q_block, kv // kv_block]  # uncompiled, FlexAttention asks nothing else

        lengths = {"q_len": self.q_len, "kv_len": self.kv_len}
        wide = self.from_mask(mask, q_block=q_block, kv_block=kv_block, **lengths, width=self.kv_blocks)
        return BlockMask.from_kv_blocks(
            torch.zeros_like(wide.cnt),
            torch.zeros_like(wide.idx, dtype=torch.int32),
            wide.cnt,
            wide.idx.int(),
            BLOCK_SIZE=(q_block, kv_block),
            mask_mod=listed,
            seq_lengths=(self.q_len, self.kv_len),
        )

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> BlockLists:
        """Lists of the full blocks of torch's `BlockMask`.

        Raises:
            KernelInputError: it has partial blocks, which have no equal here.
        """
        idx, cnt = block_mask.full_kv_indices, block_mask.full_kv_num_blocks
        if idx is None or cnt is None or bool(block_mask.kv_num_blocks.any()):
            raise KernelInputError(
                "wanted a BlockMask of full blocks only; got one with partial blocks, which need its mask_mod"
            )
        q_block, kv_block = block_mask.BLOCK_SIZE
        q_len, kv_len = block_mask.seq_lengths
        return cls(idx.int(), cnt.int(), q_block, kv_block, q_len, kv_len)


def to_bits(mask: Tensor) -> Tensor:
    """bool [..., n] in an eighth of the bytes: uint8 [..., n / 8], rounded up, the first in the highest bit."""
    whole = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    bits: Tensor = (whole.to(torch.uint8) << _places(mask.device)).sum(-1, dtype=torch.uint8)
    return bits


def from_bits(bits: Tensor, length: int) -> Tensor:
    """The mask, bool [..., length], that `to_bits` was given."""
    each = bits[..., None] >> _places(bits.device) & 1
    return each.flatten(-2)[..., :length].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, device=device).to(torch.uint8)


def _by_head(x: Tensor, batch: int) -> Tensor:
    """[B|1, H, ...] of `batch` samples as [B * H, 1, ...]."""
    return x.expand(batch, *x.shape[1:]).flatten(0, 1)[:, None]


def _check_mask(mask: Tensor, blocks: tuple[int, int], sizes: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool or mask.ndim != 4:
        raise KernelInputError(f"wanted a bool mask [B|1, H, nQ, nK]; got {mask.dtype} {tuple(mask.shape)}")
    if not mask.numel():
        raise KernelInputError(f"wanted a mask of at least one block; got {tuple(mask.shape)}")
    q_block, kv_block, q_len, kv_len = sizes
    if tuple(mask.shape[2:]) != blocks:
        raise KernelInputError(
            f"{q_len} x {kv_len} tokens in blocks of {q_block} x {kv_block} want a mask of {blocks[0]} x "
            f"{blocks[1]} blocks; got {mask.shape[2]} x {mask.shape[3]}"
        )


def mask_of(idx: Tensor, cnt: Tensor, columns: int) -> Tensor:
    """The blocks of lists [..., W] as a mask, bool [..., columns]."""
    behind = torch.arange(idx.shape[-1], device=idx.device) >= cnt[..., None]
    spare = idx.long().masked_fill_(behind, columns)
    mask = torch.zeros(*cnt.shape, columns + 1, dtype=torch.bool, device=idx.device)
    return mask.scatter_(-1, spare, True)[..., :-1]


def number_type(blocks: int) -> torch.dtype:
    """Of the numbers of so many blocks: wide lists of many layers are what fills a device's memory."""
    return torch.int16 if blocks <= torch.iinfo(torch.int16).max else torch.int32


def lists_of_bits(bits: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.lists_of_bits` in plain torch, a few rows at a time -> idx, cnt, order."""
    cnt = torch.empty(bits.shape[:3], dtype=torch.int32, device=bits.device)
    for tile in tiles(bits, columns * _PAIR_BYTES):
        cnt[tile] = from_bits(bits[tile], columns).sum(-1, dtype=torch.int32)
    width = _longest(cnt, columns)
    idx = torch.empty(*cnt.shape, width, dtype=number_type(columns), device=bits.device)
    for tile in tiles(bits, columns * _PAIR_BYTES):
        idx[tile] = _compacted(from_bits(bits[tile], columns), width)
    return idx, cnt, order_of(cnt)


def order_of(cnt: Tensor) -> Tensor:
    """`BlockLists.ordered` for lists of these lengths [B|1, H, nQ]."""
    rows = cnt.flatten(0, 1).argsort(dim=-1, descending=True, stable=True)  # [B|1 * H, nQ]
    heads = cnt.sum(-1).flatten().argsort(descending=True, stable=True)
    return (heads[:, None] * cnt.shape[2] + rows[heads]).flatten().int()


def _longest(cnt: Tensor, columns: int) -> int:
    """Of the lists on the CPU; elsewhere, where one would have to wait for the device, as many as there may be."""
    return max(int(cnt.max()), 1) if cnt.device.type == "cpu" else columns


def _compacted(mask: Tensor, width: int) -> Tensor:
    """Numbers of the True blocks of each row, ascending, the first `width` of them: [B|1, H, nQ, width].

    Without a sort: the running count gives each True block its place, all others share one that is cut off.
    """
    place = mask.cumsum(-1).sub_(1).masked_fill_(~mask, width).clamp_(max=width)
    numbers = torch.arange(mask.shape[-1], dtype=number_type(mask.shape[-1]), device=mask.device).expand(mask.shape)
    return numbers.new_zeros(*mask.shape[:3], width + 1).scatter_(-1, place, numbers)[..., :width]
