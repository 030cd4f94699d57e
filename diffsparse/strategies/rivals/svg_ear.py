"""SVG-EAR (arXiv 2603.08982): clusters of tokens, their centroids, and blocks where the centroids err most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsparse.orders.layout import Layout, kept
from diffsparse.orders.per_head import HeadOrders
from diffsparse.site.compute import Blocks, Site
from diffsparse.strategies.blocks import keep_count
from diffsparse.strategies.rivals.routed import Routed
from diffsparse_kernels import Summaries, block_means, select_rows, summarise
from diffsparse_kernels.masks import each_head, shown

_ROUNDS = 2  # of 2-means for each halving


@dataclass(frozen=True)
class SVGEAR(Routed):
    """Cluster queries and keys apart, compute where centroids err most, let centroids stand for the rest.

    SVG-EAR, arXiv 2603.08982.

    1. The queries of each head are put into clusters, and so are its keys.
    2. A cluster of n keys that is not computed counts as n keys at its centroid, in the same softmax, with the mean
       of its values.
    3. A probe by the mean query of a cluster estimates how much a centroid errs (their Eq. 8): the sum over its keys of
       |exp(q . k) v - exp(q . centroid) mean v|^2.
    4. Computed are the blocks with the largest ratio of this error to their size.

    Theirs is k-means with clusters of any size, begun from those of the step before. Ours, for kernels of equal blocks,
    is 2-means with equal halves, halved again until each cluster is a block, from scratch in each call; nothing is kept
    between steps. Ours too: as many blocks in each row, for the exponentials of rows have no common measure. Text is in
    no cluster; its blocks are computed. Work beside blocks and means: the probe, 1 / 2n; two products of each token
    with a direction for each halving.

    Attributes:
        sparsity: share of attention dropped, in [0, 1): blocks, the summaries of the others and what chooses them
            count.
        block: edge of a block in tokens; by default 128 on a machine with a GPU, else 64.
        order: of the tokens before they are clustered.

    Raises:
        ConfigError: a value out of its range.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Blocks and centroids over q, k, v [B, H, N, D]."""
        queries, keys = (clusters(x, self.block, site.layout, site.key_mask) for x in (q, k))
        site.record.beside += self.routing(q.shape[2])
        method = partial(self._clustered, queries.keys(site.key_mask))
        return site.in_order(queries, method, q, k, v, keys=keys)

    def routing(self, tokens: int | None) -> float:
        """The probe, and the halvings of queries and of keys."""
        halvings = 0 if tokens is None else (-(-tokens // self.block) - 1).bit_length()
        return 0.5 / self.block + (halvings * _ROUNDS / tokens if tokens else 0.0)

    def _clustered(self, rows: Tensor | None, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The same with clusters as blocks; `rows` are the real queries, as a key mask says it."""
        means = summarise(k, v, self.block, scale=site.scale, key_mask=site.key_mask, by="means")
        middle = block_means(q.to(means.key.dtype), self.block, rows) * site.scale_of(q)
        errors = centroid_errors(middle, k, v, means, self.block, site.key_mask)
        keep = keep_count(1 - self.share(self.routing(q.shape[2])), errors.shape[-1])
        mask = select_rows(errors, keep, site.layout.sink(self.block, q.device))
        return site.sparse(q, k, v, Blocks(self.lists(mask, site), summary=means))


def centroid_errors(q: Tensor, k: Tensor, v: Tensor, means: Summaries, block: int, key_mask: Tensor | None) -> Tensor:
    """Error of each block's centroid to the queries q [B, H, nQ, D], over the block's size: [B, H, nQ, nK].

    Up to a factor for each row: the exponentials are those of the scores less the row's largest.
    """
    real = (
        k.new_ones(k.shape[:3], dtype=torch.bool)
        if key_mask is None
        else each_head(shown(key_mask)).expand(k.shape[:3])
    )
    count = means.log_count.exp().clamp(min=1).expand(means.key.shape[:3])[:, :, None]
    heads = zip(*(x.unbind(1) for x in (q, k, v, means.key, means.value, real)), strict=True)
    return torch.stack([_errors(block, *head) for head in heads], 1) / count  # one by one: each makes nQ N numbers


def _errors(block: int, q: Tensor, k: Tensor, v: Tensor, centroid: Tensor, value: Tensor, real: Tensor) -> Tensor:
    """|exp(q . k) v - exp(q . centroid) value|^2, summed over each block: [B, nQ, nK] for one head."""
    there = _tiles(real, block)[:, None]  # [B, 1, nK, n]
    scores = _tiles(q @ k.to(q.dtype).mT, block).masked_fill(~there, -torch.inf)
    top = scores.amax((-2, -1), keepdim=True)
    own = (scores - top).exp()
    excess = (own - (q @ centroid.mT - top[..., 0]).exp()[..., None]).masked_fill(~there, 0)
    value = value.repeat_interleave(block, 1)[:, : v.shape[1]]
    apart = v - value  # own v - exp(q . centroid) value = own apart + excess value, where nothing cancels
    within, across, whole = (
        _tiles((x * y).sum(-1), block)[:, None] for x, y in ((apart, apart), (apart, value), (value, value))
    )
    error: Tensor = own.square() * within + 2 * own * excess * across + excess.square() * whole
    return error.sum(-1)


def _tiles(x: Tensor, block: int) -> Tensor:
    """[..., N] -> [..., nK, n], zeros behind the last."""
    tiles: Tensor = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    return tiles


def clusters(x: Tensor, block: int, layout: Layout, key_mask: Tensor | None = None) -> HeadOrders:
    """The order of x's tokens [B, H, N, D] that has a cluster of equal size in each block; text stays where it is.

    Each part of the video is halved along the difference of the centroids of its halves, a few times over, and so are
    the halves, down to one block.
    """
    video = x[:, :, layout.span].to(torch.promote_types(x.dtype, torch.float32))
    if key_mask is not None:
        video = video.masked_fill(~each_head(shown(key_mask))[:, :, layout.span, None], 0)
    place = torch.arange(layout.video, device=x.device).expand(video.shape[:3])
    before = layout.text_before % block  # tokens that share the first block
    for part, averages in _halvings(layout.video, block, before, x.device):
        for _ in range(_ROUNDS):
            moved = video.gather(2, place[..., None].expand_as(video))
            sums = F.pad(moved, (0, 0, before, -(before + layout.video) % block)).unflatten(2, (-1, block)).sum(3)
            centroids = (averages.to(sums.dtype) @ sums).unflatten(2, (-1, 2))  # [B, H, parts, 2, D]
            direction = centroids[..., 1, :] - centroids[..., 0, :]
            place = place.gather(2, _sorted_within(part, (moved * direction[:, :, part]).sum(-1)))
    forward = torch.arange(layout.tokens, device=x.device).repeat(*x.shape[:2], 1)
    forward[:, :, layout.span] = place + layout.text_before
    return HeadOrders.each(forward)


def _sorted_within(part: Tensor, by: Tensor) -> Tensor:
    """Places sorted by `by` [B, H, M] within each part, consecutive places of one number in `part` [M]."""
    order = by.argsort(dim=-1, stable=True)
    return order.gather(-1, part[order].argsort(dim=-1, stable=True))


@lru_cache(maxsize=8)
@kept
def _halvings(tokens: int, block: int, before: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
    """For each halving the part of each token, int64 [tokens], and what averages sums of blocks over halves.

    The averages are [2 parts, blocks], halves of one part in two rows. The first block has room for `before` others.
    """
    sizes = torch.full((-(-(before + tokens) // block),), block)
    sizes[0] -= before
    sizes[-1] -= -(before + tokens) % block
    parts, found = [range(len(sizes))], []
    while max(map(len, parts)) > 1:
        halves = [half for part in parts for half in (part[: (len(part) + 1) // 2], part[(len(part) + 1) // 2 :])]
        members = torch.zeros(len(halves), len(sizes), dtype=torch.float64)
        for number, half in enumerate(halves):
            members[number, list(half)] = 1 / max(int(sizes[list(half)].sum()), 1)
        part = (members.argmax(0) // 2).repeat_interleave(sizes)
        found.append((part.to(device), members.to(device)))
        parts = [half for half in halves if half]
    return tuple(found)
