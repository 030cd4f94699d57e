"""Compensation of what a strategy drops: by summaries of the dropped blocks, or by what they gave when last seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.site.charge import summary_work
from diffsparse.site.compute import Blocks, Product, Site
from diffsparse.strategies.base import Strategy, Wrapper, as_strategy, is_attending
from diffsparse.strategies.work import Kind, Outline, Parts, Step
from diffsparse_kernels import BlockLists, Summary, merge_attention

WAYS = ("means", "first-order", "tail")
_SPARSE = ("sparse", "refresh")  # kinds of steps that drop blocks


@dataclass(frozen=True)
class Compensated(Wrapper):
    """Any block-sparse strategy with its dropped blocks made up for; on the command line `adaspa+means`.

    - "means": each dropped block stands in the same softmax as its mean key and mean value, weighted by its number of
      keys, as in PISA (arXiv 2602.01077), Sol-Attn (2607.24027) and, with centroids, SVG-EAR (2603.08982). Costs about
      one key for each block at every step, and no memory.
    - "first-order": the same, with the mass that varied scores add and, for each block of queries, one matrix that
      moves the mean values with the query; ours. It wants blocks of similar tokens. Costs D / N +
      D / (2 q_block kv_block) more, and no memory.
    - "tail": output and normaliser of what is left out are kept and merged, as in FlashBlock (2602.05305). The first
      sparse step after each choice of blocks runs dense too, and keeps for each query what the dropped blocks gave:
      O_rest = (O - w O_s) / (1 - w) with w = exp(LSE_s - LSE). Later steps merge it by its LSE. Costs that dense call,
      and 2HND + 4HN bytes for each layer, branch and sample.

    Attributes:
        strategy: whatever chooses the blocks, not compensated yet.
        by: "means", "first-order" or "tail".
        budget: GiB that all tails together may take.

    Raises:
        ConfigError: a value out of its range, or a strategy that is none, or compensated already.
    """

    strategy: Strategy
    by: Literal["means", "first-order", "tail"] = "means"
    budget: float = 4.0

    def __post_init__(self) -> None:
        if self.by not in WAYS:
            raise ConfigError(f"compensation wants one of {', '.join(WAYS)}; got {self.by!r}")
        if not is_attending(self.strategy) or as_strategy(self.strategy).is_compensated:
            raise ConfigError(
                f"wanted a strategy that is not compensated yet; got {self.strategy!r}. Leave Compensated out"
            )
        if not isinstance(self.budget, int | float) or not self.budget > 0:
            raise ConfigError(f"budget wants a positive number of GiB; got {self.budget!r}")
        object.__setattr__(self, "strategy", as_strategy(self.strategy))
        super().__post_init__()
        object.__setattr__(self, "is_compensated", True)

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes: the strategy's own, and what makes up for the rest."""
        steps = self.strategy.steps(run)
        return _with_tails(steps) if self.by == "tail" else [self._summarised(self.by, step, run) for step in steps]

    def _summarised(self, by: Summary, step: Step, run: Outline) -> Step:
        """At most: as if no head ran dense."""
        if step.kind not in _SPARSE or step.density is None or self.block is None:
            return step
        tokens, head_dim = None if run.layout is None else run.layout.tokens, run.head_dim
        if by == "first-order" and (tokens is None or head_dim is None):
            return replace(step, density=None)
        extra = summary_work(by, 1 - step.density, self.block, tokens or 1, head_dim or 1)
        return replace(step, density=step.density + extra, parts=Parts(step.density, by))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The strategy's attention over q, k, v [B, H, N, D], each sparse product compensated."""
        if self.by != "tail":
            return self.strategy.attend(q, k, v, replace(site, summary=self.by))
        product = partial(_with_kept_tail, site.product, self.budget)
        return self.strategy.attend(q, k, v, replace(site, product=product))


def _with_tails(steps: list[Step]) -> list[Step]:
    """The first sparse product with each choice of blocks runs dense too."""
    found, new = [], 0.0
    for step in steps:
        new = max(new, step.new)
        if step.kind in _SPARSE and new:
            found.append(_with_tail(step, new))
            new = 0.0
        else:
            found.append(step)
    return found


def _with_tail(step: Step, new: float) -> Step:
    kind: Kind = "tail" if step.kind == "sparse" else step.kind
    if step.density is None:
        return replace(step, kind=kind)
    return replace(
        step, kind=kind, density=step.density + new * (1 - step.density), beside=step.beside + new * step.density
    )


@dataclass(frozen=True)
class _Tail:
    """What the dropped blocks of `lists` gave: out bfloat16 [B, H, N, D], lse float32 [B, H, N]."""

    lists: BlockLists
    out: Tensor
    lse: Tensor

    @classmethod
    def of(cls, lists: BlockLists, dense: tuple[Tensor, Tensor], sparse: tuple[Tensor, Tensor]) -> _Tail:
        """The difference of dense and sparse attention, by their LSEs."""
        share = (sparse[1] - dense[1]).exp().clamp(max=1)[..., None]  # of the mass that the kept blocks hold
        rest = 1 - share
        none = rest <= torch.finfo(rest.dtype).eps
        out = ((dense[0] - share * sparse[0]) / rest.masked_fill(none, 1)).masked_fill(none, 0)
        lse = dense[1] + rest[..., 0].log()
        return cls(lists, out.bfloat16(), lse.masked_fill(none[..., 0], -torch.inf))

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return int(self.out.nbytes + self.lse.nbytes)


def _with_kept_tail(
    product: Product, budget: float, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, site: Site
) -> tuple[Tensor, Tensor]:
    """A sparse product with the tail of its blocks, which the first product with these blocks finds, in a dense call.

    Raises:
        ConfigError: the tails of all layers want more than `budget` GiB.
    """
    sparse, tail = product(q, k, v, blocks, site), site.memory.get("tail")
    if isinstance(tail, _Tail) and tail.lists is blocks.lists:
        return merge_attention(*sparse, tail.out, tail.lse)
    _check_budget(budget, q, v, site)
    site.record.beside += site.record.density
    dense = site.dense_with_lse(q, k, v, reason="tail")
    site.memory["tail"] = _Tail.of(blocks.lists, dense, sparse)
    return dense


def _check_budget(budget: float, q: Tensor, v: Tensor, site: Site) -> None:
    """Refuse tails that would not fit, before the first of them is made."""
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    wanted = site.layers * rows * (2 * v.shape[-1] + 4) / 2**30
    if wanted > budget:
        raise ConfigError(
            f"the tails of {site.layers} layers want {wanted:.1f} GiB for each guidance branch; the budget is "
            f"{budget:g} GiB. Give a larger budget, or compensate by means, which keeps nothing"
        )
