"""What a call asks of a kernel, as far as that decides which kernel can compute it and whether it was tried."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from diffsparse_kernels.masks import Boxes, is_bias

DENSE_BLOCKS = 128, 128  # in which dense attention is computed
PRECISIONS: dict[str, tuple[str, str]] = {
    "int8": ("int8", "plain"),
    "int8-int8": ("int8", "int8"),
    "int8-fp8": ("int8", "fp8"),
    "fp8": ("fp8", "fp8"),
}
"""Precision -> number format of queries and keys, and of weights and values; "plain" is the inputs' own.

The mean key is taken away before keys are rounded (SageAttention, arXiv 2410.02367). Summaries are never rounded.
"""


class Format(NamedTuple):
    """A number format of eight bits.

    Attributes:
        largest: magnitude.
        one: what a softmax weight of 1 becomes.
    """

    dtype: torch.dtype
    largest: float
    one: float


FORMATS = {"int8": Format(torch.int8, 127.0, 127.0), "fp8": Format(torch.float8_e4m3fn, 448.0, 256.0)}
INTEGERS = "int8-int8"  # both products are of integers
Summary = Literal["means", "first-order"]
"""How a block that is not listed stands for its keys in the same softmax.

By "means", as so many keys at their mean, at about 1 / kv_block of dense attention; to "first-order", with what varies
about the means, at D / N + D / (2 q_block kv_block) more. `Summaries` has the formulas.
"""
Kind = Literal["attend", "fused", "mass", "summaries", "errors", "statistics", "selection", "rows", "fit"]


class Case(NamedTuple):
    """A class of calls.

    Attributes:
        kind: "attend" (dense or over lists), "fused" (dense with the block mass), "mass" (that alone), "summaries"
            (made ready for kernels, and merged into what one gave that doesn't take them), "errors" (of the summaries,
            estimated), "statistics" (that make summaries of first order), "selection" (lists of the largest errors;
            none of the sizes matters, all are 0), "rows" (moved and put back), "fit" (of a correction to some rows).
        dtype: of q, k, v.
        head_dim: channels of queries and keys.
        value_dim: channels of values.
        q_block: queries of a block.
        kv_block: keys of a block.
        masked: has a key mask, of whatever kind.
        axes: of its boxes, 0 for none.
        copyable: dense rows, all addresses and strides multiples of 16 bytes, as copy engines need them.
        precision: one of `PRECISIONS`, or None for the inputs' own.
        summary: how blocks that are not listed stand for their keys, where the kernel takes that into its own loop.
        biased: the key mask is added to the scores.
    """

    kind: Kind
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    q_block: int
    kv_block: int
    masked: bool = False
    axes: int = 0
    copyable: bool = True
    precision: str | None = None
    summary: Summary | None = None
    biased: bool = False

    @classmethod
    def of(
        cls,
        kind: Kind,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: tuple[int, int],
        key_mask: Tensor | None = None,
        boxes: Boxes | None = None,
    ) -> Case:
        """The case of a call.

        Args:
            kind: what is computed.
            q: [B, H, N_q, D].
            k: [B, H, N_kv, D].
            v: [B, H, N_kv, D_v].
            blocks: queries and keys of a block.
            key_mask: of the keys, or None.
            boxes: that hide keys within blocks, or None.
        """
        axes = 0 if boxes is None else boxes.place.shape[0]
        sizes = q.shape[3], v.shape[3], *blocks
        return cls(kind, q.dtype, *sizes, key_mask is not None, axes, copyable(q, k, v), biased=is_bias(key_mask))

    def words(self) -> list[str]:
        """One word a field, for `read`; the last only where it is set, so that others stay as they were kept."""
        return [str(value).removeprefix("torch.") for value in (self if self.biased else self[:-1])]

    @classmethod
    def read(cls, words: list[str]) -> Case:
        """The case that `words` gave."""
        kind, dtype, *sizes, masked, axes, copyable_, precision, summary = words[:_WORDS]
        head_dim, value_dim, q_block, kv_block = map(int, sizes)
        flags = masked == "True", int(axes), copyable_ == "True", None if precision == "None" else precision
        by = None if summary == "None" else cast(Summary, summary)
        return cls(
            cast(Kind, kind),
            getattr(torch, dtype),
            head_dim,
            value_dim,
            q_block,
            kv_block,
            *flags,
            by,
            len(words) > _WORDS,
        )

    def __str__(self) -> str:
        if self == SELECTION:
            return self.kind
        parts = [
            self.kind,
            str(self.dtype).removeprefix("torch."),
            f"D={self.head_dim}" if self.head_dim == self.value_dim else f"D={self.head_dim}/{self.value_dim}",
            f"blocks of {self.q_block}x{self.kv_block}",
        ]
        mask = "added key mask" if self.biased else "key mask"
        flags = {mask: self.masked, "boxes": self.axes, "odd strides": not self.copyable}
        flags[f"precision {self.precision}"] = self.precision is not None
        flags[f"summaries ({self.summary})"] = self.summary is not None
        return ", ".join([*parts, *(name for name, present in flags.items() if present)])


_WORDS = len(Case._fields) - 1
SELECTION = Case("selection", torch.float32, 0, 0, 0, 0)


def copyable(*tensors: Tensor) -> bool:
    """Whether the copy engine can read these: dense rows, all addresses and strides multiples of 16 bytes."""
    return all(
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        for x in tensors
    )
