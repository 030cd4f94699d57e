"""Compensation of what a strategy drops: by the means of the dropped blocks, or by what they gave when last seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

import diffsparse_kernels as kernels
from diffsparse.errors import ConfigError
from diffsparse.orders.order import RASTER
from diffsparse.site.place import Site
from diffsparse.strategies.digest import Digest
from diffsparse.strategies.work import Kind, Outline, Step, expected
from diffsparse_kernels import BlockLists

_SPARSE = ("sparse", "refresh")  # kinds of steps that drop blocks


@dataclass(frozen=True)
class Compensated:
    """Any block-sparse strategy with its dropped blocks made up for; on the command line `adaspa+means`.

    by: "means": each dropped block stands in the same softmax as its mean key and mean value, weighted by its number of
        keys, as in PISA (arXiv 2602.01077), Sol-Attn (2607.24027) and, with centroids, SVG-EAR (2603.08982). Costs
        about 1 / block of dense attention at every step, and no memory.
        "tail": output and normaliser of what is left out are kept and merged, as in FlashBlock (2602.05305). The first
        sparse step after each choice of blocks runs dense too, and keeps for each query what the dropped blocks gave:
        O_rest = (O - w O_s) / (1 - w) with w = exp(LSE_s - LSE). Later steps merge it by its LSE.
        Costs that dense call, and 2HND + 4HN bytes for each layer, branch and sample.
    budget: GiB that all tails together may take.
    """

    strategy: Any
    by: Literal["means", "tail"] = "means"
    budget: float = 4.0

    def __post_init__(self) -> None:
        if self.by not in _SITES:
            raise ConfigError(f"compensation wants one of {', '.join(_SITES)}; got {self.by!r}")
        if isinstance(self.strategy, Compensated | Digest) or not hasattr(self.strategy, "attend"):
            raise ConfigError(f"wanted a strategy that is not compensated yet; got {self.strategy!r}")
        if not isinstance(self.budget, int | float) or not self.budget > 0:
            raise ConfigError(f"budget wants a positive number of GiB; got {self.budget!r}")

    @property
    def order(self) -> str:
        """The strategy's own token order."""
        return str(getattr(self.strategy, "order", RASTER))

    @property
    def needs_grid(self) -> bool:
        """Whether the strategy does."""
        return bool(getattr(self.strategy, "needs_grid", False))

    @property
    def block(self) -> int:
        """The strategy's own edge of a block."""
        return int(self.strategy.block)

    @property
    def sparsity(self) -> float | None:
        """The strategy's own sparsity; None if it has none."""
        sparsity: float | None = getattr(self.strategy, "sparsity", None)
        return sparsity

    def check(self, models: dict[str, torch.nn.Module]) -> None:
        """Called by `diffsparse.apply`: whatever the strategy checks."""
        if hasattr(self.strategy, "check"):
            self.strategy.check(models)

    @property
    def observe(self) -> Callable[..., Tensor] | None:
        """The strategy's own; None if it has none."""
        method: Callable[..., Tensor] | None = getattr(self.strategy, "observe", None)
        return method

    def expected(self, run: Outline) -> list[Step]:
        """What each step computes: the strategy's own, and what makes up for the rest."""
        steps = expected(self.strategy, run)
        return [self._with_means(step) for step in steps] if self.by == "means" else _with_tails(steps)

    def _with_means(self, step: Step) -> Step:
        if step.kind not in _SPARSE or step.density is None:
            return step
        return replace(step, density=step.density + (1 - step.density) / self.block)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The strategy's attention over q, k, v [B, H, N, D], each sparse product compensated."""
        ours = _SITES[self.by](**vars(site))
        if isinstance(ours, _TailSite):
            ours.budget = self.budget
        return self.strategy.attend(q, k, v, ours)  # type: ignore[no-any-return]


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


class _MeansSite(Site):
    """Lets dropped blocks stand as their means."""

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **rest: Any) -> Tensor:
        return super().sparse(q, k, v, lists, **{**rest, "means": True})


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

    def merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Sparse output and LSE with the tail added to the softmax."""
        both = torch.logaddexp(lse, self.lse)
        base = both.masked_fill(both.isneginf(), 0)
        mine, theirs = ((x - base).exp()[..., None] for x in (self.lse, lse))
        return (theirs * out + mine * self.out).to(out.dtype), both

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return int(self.out.nbytes + self.lse.nbytes)


class _TailSite(Site):
    """Keeps what dropped blocks gave at the first product with each choice of blocks, and adds it to later ones."""

    budget: float

    def _product(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **rest: Any) -> tuple[Tensor, Tensor]:
        sparse = super()._product(q, k, v, lists, **rest)
        tail = self.memory.get("tail")
        if tail is not None and tail.lists is lists:
            return tail.merged(*sparse)  # type: ignore[no-any-return]
        self._afford(q, v)
        self._record.beside += self._record.density
        self._ran_search(q, k, v, rest["key_mask"], "tail")
        dense = kernels.attention(q, k, v, scale=self.scale, key_mask=rest["key_mask"])
        self.memory["tail"] = _Tail.of(lists, dense, sparse)
        return dense

    def _afford(self, q: Tensor, v: Tensor) -> None:
        """Refuse tails that would not fit, before the first of them is made."""
        rows = q.shape[0] * q.shape[1] * q.shape[2]
        wanted = self.layers * rows * (2 * v.shape[-1] + 4) / 2**30
        if wanted > self.budget:
            raise ConfigError(
                f"the tails of {self.layers} layers want {wanted:.1f} GiB for each guidance branch; the budget is "
                f"{self.budget:g} GiB. Give a larger budget, or compensate by means, which keeps nothing"
            )


_SITES: dict[str, type[Any]] = {"means": _MeansSite, "tail": _TailSite}
