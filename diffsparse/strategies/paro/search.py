"""The offline search of PAROAttention: an order for each head, then static masks (arXiv 2506.16054, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.orders.named import AXES, check_order
from diffsparse.orders.per_head import HeadOrders
from diffsparse.plans.sealed import Values
from diffsparse.plans.sums import Sums
from diffsparse.site.compute import Site
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.blocks import check_count, check_share, check_square, keep_count
from diffsparse.strategies.paro.strategy import MOST_ORDERS, pack
from diffsparse.strategies.planned import group_of
from diffsparse.strategies.search import Watcher, is_sampled, sums_of
from diffsparse_kernels import block_mass, default_block, incoherence, select_heads
from diffsparse_kernels.lists import blocks_of
from diffsparse_kernels.masks import each_head, is_bias

_SMALL, _SPARSE = 1e-3, 0.9  # epsilon and sigma of section 4.1
_STRIP = 512  # query rows of the attention map that exist at a time


@dataclass(frozen=True)
class PAROSearch:
    """Find what `PARO` runs on: two passes over each prompt, both dense.

    The first scores every candidate order for every head; the second adds up the softmax mass of each block, in the
    order chosen, over the steps of each group. A head keeps the blocks above a threshold that leaves the share asked.

    Attributes:
        strategy: "paro", the name of the strategy that runs on its plans.
        passes: 2, how often each prompt is run.
        sparsity: share of the video's blocks dropped, in [0, 1). Text is always kept and not counted.
        orders: candidates (`diffsparse.orders`). The paper's are the six orders of the axes.
        metric: "recall", the mass in the best blocks at this sparsity (ours), or "paper", block sparsity and
            incoherence together. In print the larger-is-better block sparsity enters a minimum with the wrong sign;
            here it is corrected: alpha * (1 - M_sparse) + (1 - alpha) * M_quant, each normalised over the candidates.
        alpha: weight of block sparsity in the paper's metric, which leaves it open.
        groups: parts of the run with masks of their own.
        block: edge of a block in tokens; by default 128 on a machine with a GPU, else 64.
        looks: number of sampled steps of a run, evenly spread, at which orders are scored.
        bits: of the numbers that both products multiply: 8, 4, or 16 to leave them as they are. The plan then also
            holds the incoherence, max|x| / mean|x| of a block (section 4.1), of queries, keys and map, before and
            after reordering.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> from diffsparse import PARO, PAROSearch, calibrate
        >>> calls = [lambda: pipe("a red ball", generator=torch.manual_seed(0))]
        >>> plan = calibrate(pipe, PAROSearch(orders=("FHW", "HWF")), calls, ["ball"], folder / "plan.safetensors")
        >>> print(PARO(plan).facts()["orders"])  # of how many heads in all layers
        FHW x4
    """

    sparsity: float = 0.8
    orders: tuple[str, ...] = AXES
    metric: Literal["recall", "paper"] = "recall"
    alpha: float = 0.5
    groups: int = 4
    block: int = field(default_factory=default_block)
    looks: int = 4
    bits: Literal[16, 8, 4] = 16

    strategy: ClassVar[str] = "paro"
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_square(self.block)
        if not isinstance(self.orders, tuple) or not self.orders:
            raise ConfigError(f"orders wants a tuple of one or more orders; got {self.orders!r}")
        for order in self.orders:
            check_order(order)
        if self.metric not in ("recall", "paper"):
            raise ConfigError(f"metric wants 'recall' or 'paper'; got {self.metric!r}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha wants a number in [0, 1]; got {self.alpha!r}")
        if self.bits not in (16, 8, 4):
            raise ConfigError(f"bits wants 16, 8 or 4; got {self.bits!r}")
        if len(self.orders) > MOST_ORDERS:
            raise ConfigError(f"orders wants at most {MOST_ORDERS} of them; got {len(self.orders)}")
        for name in ("groups", "looks"):
            check_count(name, getattr(self, name))

    def watcher(self, number: int, sums: Sums) -> Strategy:
        """Scores orders in the first pass, sums masses in the second."""
        if number == 0:
            return Watcher(partial(self._score, sums))
        return Watcher(partial(self._sum, sums))

    def plan(self, sums: Sums) -> tuple[Values, dict[str, Tensor]]:
        """Orders and masks of all layers."""
        tensors = {}
        for name, mass in sums.of("mass").items():  # [groups, H, nQ, nK]
            tensors[f"{name}.masks"] = pack(select_heads(mass, 1 - self.sparsity))
            tensors[f"{name}.orders"] = self._picked(sums, name, mass.shape[1]).to(torch.uint8)
        for name, figures in sums.of("incoherence").items():
            tensors[f"{name}.incoherence"] = figures / sums.of("looked")[name]
        knobs = ("sparsity", "block", "groups", "metric", "alpha", "bits")
        return {"orders": list(self.orders), **{knob: getattr(self, knob) for knob in knobs}}, tensors

    def _score(self, sums: Sums, q: Tensor, k: Tensor, lse: Tensor, site: Site) -> None:
        if not is_sampled(site, self.looks):
            return
        heads, shape = q.shape[1], (2, len(self.orders), q.shape[1])
        scores = self._recall if self.metric == "recall" else self._paper
        for i in range(len(self.orders)):
            video = self._ordered(torch.full((heads,), i), q, k, lse, site)
            sums_of(sums, site).add("scores", scores(video, site.scale), shape, (slice(None), i))

    def _ordered(self, picked: Tensor, q: Tensor, k: Tensor, lse: Tensor, site: Site) -> _Video:
        """The video rows of q, k and lse, head h in the order `picked[h]`."""
        orders, video = HeadOrders.of(self.orders, picked, site.layout, q.device), site.layout.video
        lse, keys = lse.gather(-1, orders.forward.expand(lse.shape)), orders.keys(site.key_mask)
        keys = None if keys is None else keys[..., :video]
        q, k = (x[:, :, :video] for x in orders.apply(q, k))
        return _Video(q, k, lse[..., :video], keys)

    def _recall(self, video: _Video, scale: float | None) -> Tensor:
        """Mass in the best blocks, and all mass: [2, H]."""
        mass = self._mass(video, scale).flatten(2)  # [B, H, n * n]
        kept = keep_count(self.sparsity, mass.shape[-1])
        return torch.stack((mass.topk(kept).values.sum(-1).sum(0), mass.sum(-1).sum(0)))

    def _mass(self, video: _Video, scale: float | None) -> Tensor:
        """Softmax mass of the video's blocks, [B, H, n, n]."""
        q, k, lse, keys = video
        return block_mass(q, k, lse, q_block=self.block, kv_block=self.block, scale=scale, key_mask=keys)

    def _paper(self, video: _Video, scale: float | None) -> Tensor:
        """Sums of 1 - M_sparse and of M_quant over the batch: [2, H]."""
        heads, tokens = video.q.shape[1:3]
        busy, incoherent = torch.zeros(2, heads, device=video.q.device)
        blocks = blocks_of(tokens, self.block) ** 2
        for tiles, real in _tiles(video, self.block, scale):
            small = ((tiles < _SMALL) & real).sum((-3, -1)) / real.sum((-3, -1))  # [B, H, rows, nK]
            mean = tiles.sum((-3, -1)) / real.sum((-3, -1))
            busy += (small < _SPARSE).float().sum((0, 2, 3)) / blocks
            incoherent += (tiles.amax((-3, -1)) / mean.clamp(min=1e-30)).sum((0, 2, 3)) / blocks
        return torch.stack((busy, incoherent))

    def _choose(self, scores: Tensor) -> Tensor:
        """Best candidate of each head, int64 [H], from sums [2, orders, H]."""
        if self.metric == "recall":
            recall: Tensor = scores[0] / scores[1].clamp(min=torch.finfo(torch.float32).tiny)
            return recall.argmax(0)
        busy, incoherent = scores / scores.sum(1, keepdim=True).clamp(min=1e-30)
        cost: Tensor = self.alpha * busy + (1 - self.alpha) * incoherent
        return cost.argmin(0)

    def _picked(self, sums: Sums, name: str, heads: int) -> Tensor:
        """Order of each head, int64 [H]; the first candidate for an expert that ran at none of the sampled steps."""
        scores = sums.of("scores").get(name)
        return torch.zeros(heads, dtype=torch.int64) if scores is None else self._choose(scores)

    def _sum(self, sums: Sums, q: Tensor, k: Tensor, lse: Tensor, site: Site) -> None:
        here = sums_of(sums, site)
        video = self._ordered(self._picked(sums, here.name, q.shape[1]), q, k, lse, site)
        mass = self._mass(video, site.scale).sum(0)  # [H, n, n]
        here.add("mass", mass, (self.groups, *mass.shape), group_of(site.step, site.steps, self.groups))
        if self.bits < 16 and is_sampled(site, self.looks):
            inside, keys = site.layout.span, site.key_mask
            keys = None if keys is None else keys[:, inside]
            raster = _Video(q[:, :, inside], k[:, :, inside], lse[:, :, inside], keys)
            figures = torch.stack([self._incoherence(x, site.scale) for x in (raster, video)])
            here.add("incoherence", figures, tuple(figures.shape))
            here.add("looked", torch.ones(()), ())

    def _incoherence(self, video: _Video, scale: float | None) -> Tensor:
        """Mean over blocks of max|x| / mean|x| of queries, keys and the map: [3, H]."""
        flat = [incoherence(x, self.block).mean((0, 2)) for x in video[:2]]
        return torch.stack([*flat, self._paper(video, scale)[1] / len(video.q)])


class _Video(NamedTuple):
    """The video rows of a call: q, k [B, H, N, D], LSE [B, H, N], and a key mask [B, N] or [B, H, N], or None."""

    q: Tensor
    k: Tensor
    lse: Tensor
    keys: Tensor | None


def _tiles(video: _Video, block: int, scale: float | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The softmax map in strips of whole block rows: [B, H, rows, block, n, block], and which entries are real."""
    q, k, lse, keys = video
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for part in torch.arange(q.shape[2]).split(max(_STRIP // block, 1) * block):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        weights = ((q[:, :, rows].float() * scale) @ k.float().mT - lse[:, :, rows, None]).exp()
        if keys is not None:
            weights *= (each_head(keys).exp() if is_bias(keys) else each_head(keys))[:, :, None]
        yield _cut(weights, block), _cut(torch.ones_like(weights[0, 0], dtype=torch.bool), block)


def _cut(x: Tensor, block: int) -> Tensor:
    """[..., rows, columns] -> [..., nR, block, nC, block], ragged ends filled with zeros."""
    padded: Tensor = F.pad(x, (0, -x.shape[-1] % block, 0, -x.shape[-2] % block))
    tiles: Tensor = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    return tiles
