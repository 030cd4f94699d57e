"""Sizes, masks and the comparison that all kernel tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import diffsparse_kernels as dk
from support import exact


@dataclass(frozen=True)
class Size:
    batch: int = 2
    heads: int = 3
    q_len: int = 96
    kv_len: int = 96
    dim: int = 32
    value_dim: int | None = None
    q_block: int = 32
    kv_block: int = 32

    def __str__(self) -> str:
        return f"b{self.batch}h{self.heads}q{self.q_len}k{self.kv_len}d{self.dim}x{self.q_block}-{self.kv_block}"

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, -(-self.q_len // self.q_block), -(-self.kv_len // self.kv_block)

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def qkv(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.randn(self.batch, self.heads, self.q_len, self.dim)
        k = torch.randn(self.batch, self.heads, self.kv_len, self.dim)
        v = torch.randn(self.batch, self.heads, self.kv_len, self.value_dim or self.dim)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def lists(self, mask: Tensor) -> dk.BlockLists:
        return dk.BlockLists.from_mask(
            mask, q_block=self.q_block, kv_block=self.kv_block, q_len=self.q_len, kv_len=self.kv_len
        )

    def allowed(self, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """Token by token what is seen, bool; or what is added to the scores, if keys are a bias."""
        tokens = exact.element_mask(mask, self.q_block, self.kv_block, self.q_len, self.kv_len)
        return tokens if keys is None else both(keys[:, None, None] if keys.ndim == 2 else keys[:, :, None], tokens)


def both(keys: Tensor, seen: Tensor) -> Tensor:
    """Keys, bool or a bias, of which only those that are seen remain."""
    if keys.dtype == torch.bool:
        return keys & seen
    return torch.where(seen & (keys > -1e29), keys.double(), -torch.inf)


def random_boxes(size: Size, axes: int = 2) -> dk.Boxes:
    """Some queries see nothing, some keys are seen by all."""
    place = torch.randint(0, 6, (axes, size.kv_len), dtype=torch.int32)
    place[0, ::7] = -1
    low = torch.randint(0, 6, (axes, size.q_len), dtype=torch.int32)
    high = low + torch.randint(-1, 6, (axes, size.q_len), dtype=torch.int32)
    return dk.Boxes(place, low, high)


def seen(boxes: dk.Boxes) -> Tensor:
    """bool [N_q, N_kv], one axis after the other."""
    inside = torch.ones(boxes.low.shape[1], boxes.place.shape[1], dtype=torch.bool)
    for place, low, high in zip(*boxes, strict=True):
        inside &= (place[None] >= low[:, None]) & (place[None] <= high[:, None])
    return inside | (boxes.place[0] < 0)[None]


def random_mask(size: Size, density: float = 0.5) -> Tensor:
    return torch.rand(size.blocks) < density


def uniform_mask(size: Size, keep: int = 1) -> Tensor:
    return dk.select_rows(torch.rand(size.blocks), keep)


MASKS = {
    "random": random_mask,
    "sparse": lambda size: random_mask(size, 0.15),  # with empty rows
    "equal": uniform_mask,
    "full": lambda size: torch.ones(size.blocks, dtype=torch.bool),
    "empty": lambda size: torch.zeros(size.blocks, dtype=torch.bool),
}


def prefixes(size: Size, *lengths: int) -> Tensor:
    """The first keys of each sample, as many as `lengths` says in turn: bool [B, N_kv]."""
    first = torch.tensor([lengths[sample % len(lengths)] for sample in range(size.batch)])
    return torch.arange(size.kv_len) < first[:, None]


def holes(size: Size) -> Tensor:
    """Keys here and there, none in the first block."""
    return (torch.rand(size.batch, size.kv_len) < 0.6) & (torch.arange(size.kv_len) >= size.kv_block)


KEY_MASKS = {
    "all": lambda size: prefixes(size, size.kv_len),
    "end": lambda size: prefixes(
        size, size.kv_len - size.kv_block // 2 - 3, size.kv_block
    ),  # of keys, in a block, at one
    "edge": lambda size: prefixes(size, 2 * size.kv_block - 1, size.kv_block + 1),
    "nothing": lambda size: prefixes(size, 0, size.kv_len - 1),
    "holes": holes,
}


def as_bias(keys: Tensor) -> Tensor:
    """What is added to the scores where a bool mask hides keys."""
    return torch.zeros(keys.shape).masked_fill(~keys, -torch.inf)


def uneven(size: Size) -> Tensor:
    """Keys that count more or less than once, some of them never; of a sample after the first none but one."""
    keys = (2 * torch.randn(size.batch, size.kv_len)).masked_fill(torch.rand(size.batch, size.kv_len) < 0.2, -torch.inf)
    keys[1:, 1:] = -torch.inf
    return keys


BIASES = {
    "uneven": uneven,
    "zero or one": lambda size: (torch.rand(size.batch, size.kv_len) < 0.8).float(),  # as Chroma has it
    "deep": lambda size: torch.where(holes(size), 30.0, -1e4),  # a row may see deep ones only
    "lowest": lambda size: torch.where(holes(size), 0.5, torch.finfo(torch.bfloat16).min),
    "nothing": lambda size: torch.full((size.batch, size.kv_len), -torch.inf),
}


def assert_attention(got: tuple[Tensor, Tensor], qkv: tuple[Tensor, ...], allowed: Tensor, scale: float) -> None:
    q, k, v = qkv
    out, lse = got
    want, want_lse = exact.softmax_attention(q, k, v, allowed, scale)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    low = exact.eager(q, k, v, allowed, scale)
    assert (out.double() - want).abs().max().item() <= exact.tolerance(want, low)
    dead = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), dead)
    assert (out[dead] == 0).all()
    scores = exact.masked(q @ k.mT * scale, allowed).logsumexp(-1)
    alive = ~dead
    if alive.any():
        limit = exact.tolerance(want_lse[alive], scores[alive])
        assert (lse.double() - want_lse)[alive].abs().max().item() <= limit
