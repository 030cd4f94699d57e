"""What attention looks like: block masses, orders and recall of each head, summed up while a pipeline runs."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import diffsparse_kernels as kernels
from diffsparse.orders.named import AUTO, AXES, RASTER, check_order, permutation_on
from diffsparse.plans.sums import Index, Sums
from diffsparse.schedule import Schedule, evenly_spread
from diffsparse.site.compute import Blocks, Method, Site
from diffsparse.strategies.base import Attending, Strategy, Wrapper, as_strategy, found_orders, in_order
from diffsparse.strategies.blocks import keep_count
from diffsparse.strategies.planned import Planned

CELLS = 72  # largest edge of a map that is kept: finer ones are averaged


def best_recall(mass: Tensor, sparsity: float) -> Tensor:
    """Mass in the best blocks of each query row, and all mass: mass [B, H, nQ, nK] -> [2, H], sums over the batch."""
    best = mass.topk(keep_count(sparsity, mass.shape[-1]), -1).values
    return torch.stack((best.sum((0, 2, 3)), mass.sum((0, 2, 3))))


def order_masses(
    q: Tensor, k: Tensor, lse: Tensor, site: Site, orders: tuple[str, ...], block: kernels.Block
) -> list[Tensor]:
    """Softmax mass of the blocks, float32 [B, H, nQ, nK], with the tokens of q, k [B, H, N, D] in each order."""
    found = []
    for order in orders:
        if order == RASTER:
            found.append(site.block_mass(q, k, lse, block))
            continue
        forward, _ = permutation_on(order, site.layout, q.device)
        keys = None if site.key_mask is None else site.key_mask[:, forward]
        moved = q.index_select(2, forward), k.index_select(2, forward), lse.index_select(2, forward)
        found.append(replace(site, key_mask=keys).block_mass(*moved, block))
    return found


def sampled_steps(strategy: Strategy | Attending, schedule: Schedule, steps: int, count: int) -> frozenset[int]:
    """Up to `count` steps, evenly spread over those that `strategy` doesn't leave dense; over all if it leaves all."""
    listed = as_strategy(strategy).kinds(schedule, steps)
    open_ = [step for step, kind in enumerate(listed) if kind != "dense"] or list(range(steps))
    return frozenset(open_[place] for place in evenly_spread(count, len(open_)))


class Inspector(Wrapper):
    """A strategy that lets another one run, and measures some of its calls.

    At the sampled steps, every layer's attention is computed once more for its log-sum-exp, and once for each order
    for its block masses. What is kept are sums on the CPU: no map of tokens, and block maps of at most `CELLS` a side.

    Args:
        strategy: the one that runs.
        steps: sampled ones, from 0.
        orders: candidates; raster order is always among them.
        sparsity: at which recall is measured.
        block: tokens of a block, or its queries and keys; None for the machine's default.
        layers: which self-attention layers, by number in the order of running; None for all.

    Raises:
        ConfigError: an order that is none.

    Examples:
        >>> from diffsparse import AdaSpa, Inspector, apply
        >>> inspector = Inspector(AdaSpa(sparsity=0.8), steps={1, 3})
        >>> with apply(pipe, inspector):
        ...     video = pipe("a red ball").frames[0]
        >>> for view in inspector.views():
        ...     print(view.layer, view.best)  # the order of most recall for each head
        blocks.0.attn1 (...)
        blocks.1.attn1 (...)
    """

    sparsity: float
    block: kernels.Block

    def __init__(
        self,
        strategy: Strategy | Attending,
        steps: Collection[int],
        *,
        orders: tuple[str, ...] = AXES,
        sparsity: float = 0.8,
        block: kernels.Block | None = None,
        layers: Collection[int] | None = None,
    ) -> None:
        self.orders = tuple(dict.fromkeys((RASTER, *orders)))
        for order in self.orders:
            check_order(order)
        self.strategy, self.probed, self.sparsity, self.layers = as_strategy(strategy), steps, sparsity, layers
        self.block, self.needs_grid = block or kernels.default_block(), self.strategy.wants_grid
        self.sums = Sums()
        self.seen: dict[tuple[str, str], int] = {}  # (model, layer) -> its number
        self.found: dict[tuple[str, str], tuple[str, ...]] = {}  # (model, layer) -> the orders that its heads picked

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """What the strategy makes of q, k, v [B, H, N, D] in the last dense step."""
        return self._watch(self.strategy.observe, q, k, v, site)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """What the strategy makes of q, k, v [B, H, N, D]."""
        return self._watch(self.strategy.attend, q, k, v, site)

    def _watch(self, method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        number = self.seen.setdefault((site.model, site.layer), len(self.seen))
        call = partial(in_order, self.strategy, method, (q, k, v))
        if site.step not in self.probed or (self.layers is not None and number not in self.layers):
            return call(site)
        _, lse = kernels.attention(q, k, v, scale=site.scale, key_mask=site.key_mask)
        apart = replace(site, record=copy(site.record))  # measuring is no work of the strategy's
        masses = order_masses(q, k, lse, apart, self.orders, self.block)
        for i, mass in enumerate(masses):
            self._add(site, "recall", best_recall(mass, self.sparsity), (len(self.orders), 2, q.shape[1]), i)
            self._add(site, "mass", _pooled(mass), (len(self.orders), *_pooled(mass).shape), i)
        rest = torch.ones(q.shape[1], dtype=torch.bool)
        out = call(replace(site, product=partial(self._product, site, q, rest)))
        if self.strategy.order == AUTO:
            self.found[site.model, site.layer] = found_orders(self.strategy, site)
        if site.record.kind != "search":  # which chooses, but does not yet use its choice
            self._dense(site, masses[self.orders.index(RASTER)], rest)
        return out

    def _product(
        self, whole: Site, all_heads: Tensor, rest: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, site: Site
    ) -> tuple[Tensor, Tensor]:
        """One block-sparse product of some or all heads, its tokens in the order that the strategy has chosen."""
        lists, scale, keys = blocks.lists, site.scale, site.key_mask
        _, lse = kernels.attention(q, k, k, scale=scale, key_mask=keys)
        mass = kernels.block_mass(q, k, lse, q_block=lists.q_block, kv_block=lists.kv_block, scale=scale, key_mask=keys)
        heads = _heads(q, all_heads)
        rest[heads] = False
        self._chosen(whole, mass, lists.to_mask(), heads, len(rest))
        return whole.product(q, k, v, blocks, site)

    def _dense(self, site: Site, mass: Tensor, rest: Tensor) -> None:
        """The heads that no block-sparse product was made of."""
        if rest.any():
            every = torch.ones_like(mass[:, rest], dtype=torch.bool)
            self._chosen(site, mass[:, rest], every, rest.nonzero()[:, 0], len(rest))

    def _chosen(self, site: Site, mass: Tensor, mask: Tensor, heads: Tensor, count: int) -> None:
        held = torch.stack(((mass * mask).sum((0, 2, 3)), mass.sum((0, 2, 3))))
        kept = mask.float().expand(mass.shape)
        self._add(site, "held", held, (2, count), (slice(None), heads))
        self._add(site, "density", kept.mean((0, 2, 3)), (count,), heads)
        self._add(site, "calls", torch.ones(len(heads)), (count,), heads)
        for what, x in (("own", mass), ("kept", kept)):
            self._add(site, what, _pooled(x), (count, *_pooled(x).shape[1:]), heads)

    def _add(self, site: Site, what: str, value: Tensor, shape: tuple[int, ...], at: Index) -> None:
        self.sums.layer(site.model, site.layer, site.layout).add(what, value, shape, at)

    def views(self) -> list[LayerView]:
        """What was found, layer by layer."""
        found = []
        for model, layer in self.seen:
            start = f"{model}.{layer}."
            sums = {name.removeprefix(start): x for name, x in self.sums.tensors.items() if name.startswith(start)}
            if "mass" in sums:
                found.append(_view(self, model, layer, sums))
        return found


@dataclass(frozen=True, eq=False)
class LayerView:
    """One self-attention layer: means over sampled steps, samples and branches.

    Attributes:
        model: name of the transformer in the pipeline.
        layer: name of the attention module in the transformer.
        number: of the layer, in the order of running.
        orders: candidates.
        recall: mass in the best blocks of each row, in each order, [orders, H].
        mass: block maps in each order, [orders, H, rows, columns], 1 where attention would be uniform.
        own_orders: the strategy's order of each head.
        chosen: mass that the strategy's blocks hold, [H]; None, as all that follows, if it didn't choose at these
            steps.
        density: their share of all blocks, [H].
        own: block maps in the strategy's order, [H, rows, columns].
        kept: share of the calls in which a block is computed, [H, rows, columns].
    """

    model: str
    layer: str
    number: int
    orders: tuple[str, ...]
    recall: Tensor
    mass: Tensor
    own_orders: tuple[str, ...]
    chosen: Tensor | None
    density: Tensor | None
    own: Tensor | None
    kept: Tensor | None

    @property
    def raster(self) -> Tensor:
        """Recall in raster order, [H]."""
        return self.recall[self.orders.index(RASTER)]

    @property
    def best(self) -> tuple[str, ...]:
        """The order of most recall for each head."""
        return tuple(self.orders[int(i)] for i in self.recall.argmax(0))


def _view(inspector: Inspector, model: str, layer: str, sums: dict[str, Tensor]) -> LayerView:
    recall, mass, calls = sums["recall"], sums["mass"], sums.get("calls")
    heads = mass.shape[1]
    return LayerView(
        model,
        layer,
        inspector.seen[model, layer],
        inspector.orders,
        recall[:, 0] / recall[:, 1],
        _relative(mass),
        inspector.found.get((model, layer)) or _own_orders(inspector.strategy, model, layer, heads),
        None if calls is None else sums["held"][0] / sums["held"][1],
        None if calls is None else sums["density"] / calls,
        None if calls is None else _relative(sums["own"]),
        None if calls is None else sums["kept"] / calls[:, None, None],
    )


def _own_orders(strategy: Strategy, model: str, layer: str, heads: int) -> tuple[str, ...]:
    name = f"{model}.{layer}.orders"
    if isinstance(strategy, Planned) and name in strategy.plan.tensors:
        return tuple(strategy.plan.settings["orders"][int(i)] for i in strategy.plan.tensors[name])
    return (strategy.order,) * heads


def _relative(mass: Tensor) -> Tensor:
    """Maps [..., rows, columns] in units of uniform attention."""
    mean: Tensor = mass.mean((-2, -1), keepdim=True)
    return mass / mean.clamp(min=torch.finfo(mass.dtype).tiny)


def _pooled(blocks: Tensor) -> Tensor:
    """Block maps [B, H, nQ, nK] -> [H, rows, columns], at most CELLS of each: means over the batch and over blocks."""
    rows, columns = (min(n, CELLS) for n in blocks.shape[-2:])
    return F.adaptive_avg_pool2d(blocks.mean(0), (rows, columns))


def _heads(part: Tensor, whole: Tensor) -> Tensor:
    """Which heads of `whole` [B, H, N, D] the heads of `part` are, whatever the order of their tokens, int64 [h].

    Found by the sum of the bits of all their numbers, which no reordering changes.
    """
    if part.shape[1] == whole.shape[1]:
        return torch.arange(whole.shape[1])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.dtype.itemsize]
    sums, known = (x[0].contiguous().view(bits).long().sum((-2, -1)) for x in (part, whole))
    return (sums[:, None] == known).int().argmax(1).cpu()
