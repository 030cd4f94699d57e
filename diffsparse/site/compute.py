"""One attention call as a strategy sees it: its place, what it may remember, and how it computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import diffsparse_kernels as kernels
from diffsparse.errors import ConfigError, DenseFallbackError
from diffsparse.orders.per_head import HeadOrders
from diffsparse.site.charge import MASS_PASS, summary_work
from diffsparse.site.place import Place
from diffsparse.site.record import CallRecord
from diffsparse.site.timing import Reading


@dataclass(frozen=True)
class Blocks:
    """The blocks of a sparse product, and what they stand for.

    Attributes:
        lists: which key blocks each query block visits.
        orders: the order of the tokens that the lists count in; None if they count q, k, v as these stand.
        boxes: hide keys token by token within the listed blocks; they count the tokens as the lists do.
        summary: how dropped blocks stand for their keys, or what was made for it, in tokens as the lists count them.
        correct: makes of the output [B, H, N, D], tokens as the lists count them, a better one, or says what is to be
            added to it, unless the call runs dense. What is added, is added as the tokens are put in order again: an
            output that has a correction goes back as it is.
        bits: of the numbers multiplied: 16 leaves them as they are; 8 and 4 are emulated where no kernel does them.
        heads: of the whole call, where q, k, v are a part of them and the others ran dense; for the report.
        about: the density that is to be expected, where the strategy knows it: a device is then not asked for it.
    """

    lists: kernels.BlockLists
    orders: HeadOrders | None = None
    boxes: kernels.Boxes | None = None
    summary: kernels.Summary | kernels.Summaries | None = None
    correct: Callable[[Tensor], Tensor | kernels.Correction] | None = None
    bits: int = 16
    heads: int | None = None
    about: float | None = None


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Method = Callable[[Tensor, Tensor, Tensor, "Site"], Tensor]
Product = Callable[[Tensor, Tensor, Tensor, Blocks, "Site"], tuple[Tensor, Tensor]]


class Pending(NamedTuple):
    """An output, and what is still to be added to it."""

    out: Tensor
    correction: kernels.Correction


class DenseBackend(NamedTuple):
    """The user's own dense attention, and its name."""

    name: str
    attend: Attend


def multiply(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, site: Site) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] and LSE [B, H, N] of a sparse product by our kernels, which is the call's own."""
    with site._heard() as ran:
        found = _multiplied(q, k, v, blocks, site)
    site.record.ran_sparse(site.density(blocks, q), ran[0].name)
    return found


def _multiplied(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, site: Site) -> tuple[Tensor, Tensor]:
    """Output and LSE, tokens as the lists count them."""
    lists, scale, keys, summary = blocks.lists, site.scale, site.key_mask, blocks.summary
    if blocks.bits < 16:
        rounded = partial(kernels.quantised_attention, bits=blocks.bits)
        return rounded(q, k, v, lists, scale=scale, key_mask=keys, summary=summary)
    if site.precision is not None and blocks.boxes is not None:
        raise ConfigError(
            f"precision {site.precision!r} can't hide single keys, as windows do that cut through tiles; "
            "give windows and strides of whole tiles, or leave it out"
        )
    return kernels.block_sparse_attention(
        q, k, v, lists, scale=scale, key_mask=keys, boxes=blocks.boxes, summary=summary, precision=site.precision
    )


@dataclass(frozen=True, kw_only=True)
class Site(Place):
    """One self-attention call, as `Strategy.attend(q, k, v, site)` sees it.

    q, k, v are [B, H, N, D] after rotary embedding.

    Attributes:
        model: the transformer's name in the pipeline.
        layer: the attention module's name in the transformer.
        index: number of that module, in the order of the model's modules.
        step: denoising step, counted from 0.
        steps: length of the run in steps; None if it is unknown.
        end: first executed step after those that this transformer may run sparse; None if it is unknown, as where the
            experts of a pipeline take turns.
        branch: name of the guidance branch.
        layout: which of the N tokens lie on the grid.
        layers: how many such modules the model has.
        shard: which of all ranks' heads are this rank's H.
        skipped: earlier steps that did not reach this layer, for a step cache answered them.
        to_skip: steps to come that will not; an estimate where the cache decides as it goes.
        memory: starts empty for each run x layer x branch and lasts to the end of the run.
        dense_backend: the user's own dense attention.
        record: what is reported of this call. A strategy with a kernel of its own says so by `record.ran_sparse`.
        scale: of the scores; None is 1/sqrt(D).
        key_mask: which tokens may be attended to: bool [B, N], or [B, H, N] where the tokens' order differs by head.
        strict: raise instead of falling back to dense attention.
        summary: how dropped blocks stand for their keys in every product whose `Blocks` say nothing of it.
        precision: of every product whose `Blocks` say nothing of bits; None is that of the inputs.
        product: computes sparse products and reports what ran; a wrapper may put a function of its own here.
        pending: what an output lacks until its tokens are put in order again; None where they stand as they came.
    """

    memory: dict[str, Any]
    dense_backend: DenseBackend
    record: CallRecord
    scale: float | None = None
    key_mask: Tensor | None = None
    strict: bool = False
    summary: kernels.Summary | None = None
    precision: str | None = None
    product: Product = field(default=multiply, repr=False)
    pending: list[Pending] | None = field(default=None, repr=False)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, *, reason: str = "strategy") -> Tensor:
        """Dense attention [B, H, N, D] on the user's own backend, reported as planned.

        Args:
            q: queries [B, H, N, D].
            k: keys [B, H, N, D].
            v: values [B, H, N, D].
            reason: why it is dense, for the report.
        """
        self.record.ran_dense(reason, planned=True, backend=self.dense_backend.name)
        return self.dense_backend.attend(q, k, v)

    def fall_back(self, q: Tensor, k: Tensor, v: Tensor, reason: str) -> Tensor:
        """Dense attention [B, H, N, D] that was not planned: counted by reason.

        Args:
            q: queries [B, H, N, D].
            k: keys [B, H, N, D].
            v: values [B, H, N, D].
            reason: why it can't be sparse, for the report.

        Raises:
            DenseFallbackError: under `strict=True`.
        """
        if self.strict:
            raise DenseFallbackError.of(self.layer, self.step, reason)
        self.record.ran_dense(reason, planned=False, backend=self.dense_backend.name)
        return self.dense_backend.attend(q, k, v)

    def dense_with_lse(self, q: Tensor, k: Tensor, v: Tensor, *, reason: str = "search") -> tuple[Tensor, Tensor]:
        """Dense attention [B, H, N, D] on our own kernels, and its log-sum-exp, float32 [B, H, N].

        Args:
            q: queries [B, H, N, D].
            k: keys [B, H, N, D].
            v: values [B, H, N, D].
            reason: why it is dense, for the report.
        """
        with self._heard() as ran:
            found = kernels.attention(q, k, v, scale=self.scale, key_mask=self.key_mask)
        self.record.ran_dense(reason, planned=True, backend=ran[0].name, kind="search")
        return found

    def dense_with_mass(self, q: Tensor, k: Tensor, v: Tensor, block: kernels.Block) -> tuple[Tensor, Tensor, Tensor]:
        """Dense attention, its log-sum-exp and the `block_mass` [B, H, nQ, nK] that goes with it: a fused search.

        Args:
            q: queries [B, H, N, D].
            k: keys [B, H, N, D].
            v: values [B, H, N, D].
            block: tokens of a block, or its queries and keys.
        """
        q_block, kv_block = kernels.edges(block)
        with self._heard() as ran:
            found = kernels.attention_with_mass(
                q, k, v, q_block=q_block, kv_block=kv_block, scale=self.scale, key_mask=self.key_mask
            )
        self.record.ran_dense("search", planned=True, backend=ran[0].name, kind="search")
        self.record.beside += MASS_PASS
        return found

    def block_mass(self, q: Tensor, k: Tensor, lse: Tensor, block: kernels.Block) -> Tensor:
        """Sum of exp(score - lse) over each tile, float32 [B, H, nQ, nK].

        Args:
            q: queries [B, H, N, D].
            k: keys [B, H, N, D].
            lse: log-sum-exp [B, H, N]; it may be of an earlier step.
            block: tokens of a block, or its queries and keys.
        """
        self.record.beside += MASS_PASS
        q_block, kv_block = kernels.edges(block)
        with self._heard():
            return kernels.block_mass(
                q, k, lse, q_block=q_block, kv_block=kv_block, scale=self.scale, key_mask=self.key_mask
            )

    def scale_of(self, q: Tensor) -> float:
        """Of the scores of q [B, H, N, D]."""
        return float(q.shape[-1] ** -0.5) if self.scale is None else self.scale

    def summarise(self, k: Tensor, v: Tensor, block: int, by: kernels.Summary = "first-order") -> kernels.Summaries:
        """Summaries of the key blocks; counted with the product that uses them.

        Args:
            k: keys [B, H, N, D].
            v: values [B, H, N, D].
            block: keys of a block.
            by: "means" or "first-order".
        """
        with self._heard():
            return kernels.summarise(k, v, block, scale=self.scale, key_mask=self.key_mask, by=by)

    def summary_error(self, q: Tensor, summaries: kernels.Summaries, block: kernels.Block) -> Tensor:
        """Estimated error of each tile's summary, float32 [B, H, nQ, nK].

        Args:
            q: queries [B, H, N, D].
            summaries: of the keys.
            block: tokens of a block, or its queries and keys.
        """
        q_block, kv_block = kernels.edges(block)
        self.record.beside += MASS_PASS / kv_block
        with self._heard():
            return kernels.summary_error(q, summaries, q_block=q_block, scale=self.scale)

    def free_blocks(self, block: kernels.Block) -> int:
        """Key blocks that may be dropped, at least 1 for the sake of those who divide by it."""
        return max(int((~self.layout.exact_keys(kernels.edges(block)[1])).sum()), 1)

    def largest(self, error: Tensor, share: float, block: kernels.Block) -> kernels.BlockLists:
        """Lists of the blocks with the largest errors [B, H, nQ, nK], by one budget for the heads of all ranks.

        Args:
            error: float [B, H, nQ, nK].
            share: of all blocks, the best of each row among them; blocks with text are listed beside it.
            block: tokens of a block, or its queries and keys.
        """
        heads, rank, text = error.shape[1], self.shard.rank, self.layout.sink(block, error.device)
        own = heads * rank, heads * (rank + 1)
        if self.layout.asked:
            asks = self.layout.asked_blocks(kernels.edges(block)[0])
            error = error.masked_fill(~asks.to(error.device, non_blocking=True)[:, None], 0.0)
            share *= float(asks.float().mean())
        with self._heard():
            return kernels.lists_of_largest(
                self.shard.all_heads(error), share, **self._sizes(block), always=text, heads=own
            )

    def best_of_rows(self, mass: Tensor, keep: int | Tensor, block: kernels.Block) -> kernels.BlockLists:
        """Lists of the blocks of each row with the most mass.

        Args:
            mass: float [B, H, nQ, nK].
            keep: how many, an int or [B, H], beside those that are never dropped.
            block: tokens of a block, or its queries and keys.
        """
        keep = keep + mass.shape[-1] - self.free_blocks(block)
        with self._heard():
            return kernels.lists_of_rows(mass, keep, **self._sizes(block), always=self.layout.sink(block, mass.device))

    def unpacked(self, bits: Tensor, block: kernels.Block) -> kernels.BlockLists:
        """Lists of the blocks of an earlier step.

        Args:
            bits: as `BlockLists.packed` gave them.
            block: tokens of a block, or its queries and keys.
        """
        with self._heard():
            return kernels.lists_of_bits(bits, **self._sizes(block))

    def _sizes(self, block: kernels.Block) -> dict[str, int]:
        """Of lists in blocks of so many tokens."""
        (q_block, kv_block), tokens = kernels.edges(block), self.layout.tokens
        return {"q_block": q_block, "kv_block": kv_block, "q_len": tokens, "kv_len": tokens}

    def exact_rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a few queries [B, H, n, D] to all keys, on our own kernels; who asks for it counts it."""
        with self._heard():
            return kernels.attention_of_few(q, k, v, scale=self.scale, key_mask=self.key_mask)

    def fit_rows(self, exact: Tensor, out: Tensor, probes: Tensor, **kept: Tensor) -> kernels.Correction:
        """What exact rows say of an output, fitted to correct all its rows; who asks for it counts it.

        Args:
            exact: what the rows should be, [B, H, n, D].
            out: the output [B, H, N, D].
            probes: int64 [n], numbers of the rows.
            **kept: a residual of low rank, as `diffsparse_kernels.fit_rows` takes it.
        """
        with self._heard():
            return kernels.fit_rows(exact, out, probes, **kept)

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | kernels.BlockLists) -> Tensor:
        """Block-sparse attention [B, H, N, D]; dense, with the reason reported, where that is faster.

        Args:
            q: queries [B, H, N, D].
            k: keys [B, H, N, D].
            v: values [B, H, N, D].
            blocks: the blocks, and how dropped ones stand for their keys.

        Raises:
            DenseFallbackError: it would be dense under `strict=True`.
        """
        blocks = Blocks(blocks) if isinstance(blocks, kernels.BlockLists) else blocks
        blocks = replace(blocks, summary=blocks.summary or self.summary)
        if self.layout.asked:
            blocks = replace(blocks, lists=self._asked(blocks))
        known, limit = self._known_density(blocks, q), self._break_even(q, blocks.lists)
        if blocks.bits == 16 and known is not None and known > limit:
            return self.fall_back(q, k, v, f"density above the break-even of {limit:.2f}")

        def product(q: Tensor, k: Tensor, v: Tensor, here: Site) -> Tensor:
            return here._sparse(q, k, v, blocks)

        return product(q, k, v, self) if blocks.orders is None else self.in_order(blocks.orders, product, q, k, v)

    def _asked(self, blocks: Blocks) -> kernels.BlockLists:
        """The lists without the rows that nobody asks for; made once for the lists of several steps."""
        kept: _Asked | None = self.memory.get("asked")
        if kept is None or kept.of() is not blocks.lists:
            lists = blocks.lists
            asks = self._asking(blocks).to(lists.cnt.device, non_blocking=True)
            kept = _Asked(weakref.ref(lists), replace(lists, cnt=lists.cnt * asks))
            self.memory["asked"] = kept
        return kept.lists

    def _asking(self, blocks: Blocks) -> Tensor:
        """bool [nQ] or [B|1, H|1, nQ]: the query blocks, as the lists count them, with a token that asks."""
        asks, block = self.layout.asks(), blocks.lists.q_block
        if blocks.orders is not None:
            asks = asks.to(blocks.orders.orders.device)[blocks.orders.forward]
        found: Tensor = F.pad(asks, (0, -asks.shape[-1] % block)).unflatten(-1, (-1, block)).any(-1)
        return found

    def compare(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        """What `sparse` would give, for comparison: never dense, and counted as work beside the call's.

        Args:
            q: queries [B, H, N, D].
            k: keys [B, H, N, D].
            v: values [B, H, N, D].
            blocks: the blocks, and how dropped ones stand for their keys.
        """
        self.record.beside += self.density(blocks, q)
        with self._heard():
            return _multiplied(q, k, v, blocks, self)[0]

    def density(self, blocks: Blocks, q: Tensor) -> Tensor:
        """Share of dense attention that a product computes: 0-dim, on the device of the lists.

        Args:
            blocks: of the product.
            q: its queries [B, H, N, D].
        """
        share = self._computed(blocks, q)
        return share if blocks.heads is None else 1 - (1 - share) * q.shape[1] / blocks.heads

    def in_order(
        self, orders: HeadOrders, method: Method, q: Tensor, k: Tensor, v: Tensor, *, keys: HeadOrders | None = None
    ) -> Tensor:
        """Call `method(q, k, v, site)` with the tokens and their mask in another order; its output as q stands.

        The one place where tokens are moved. Dense attention with a mask of its own gets them as they stood.

        Args:
            orders: the order of each head, and of keys and values unless `keys` says otherwise.
            method: called with the moved tokens and their site.
            q: queries [B, H, N, D].
            k: keys [B, H, N, D].
            v: values [B, H, N, D].
            keys: the order of keys and values, if it is not that of the queries.
        """
        of_keys = orders if keys is None else keys
        here = replace(self, key_mask=of_keys.keys(self.key_mask), pending=[])
        if self.key_mask is not None or self.layout.asked:
            here = replace(here, dense_backend=self.dense_backend._replace(attend=_moved_back(orders, of_keys, self)))
        with self._heard():
            q, k, v = orders.apply(q, k, v) if keys is None else (*orders.apply(q), *keys.apply(k, v))
        out = method(q, k, v, here)
        with self._heard():
            return orders.undo(out, here._awaited(out))

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        """The product, with tokens as the lists count them."""
        here = self
        if self.key_mask is not None:
            here = replace(self, key_mask=self.key_mask.expand(len(q), *self.key_mask.shape[1:]))
        out, _ = self.product(q, k, v, blocks, here)
        better = out if blocks.correct is None else blocks.correct(out)
        if isinstance(better, Tensor):
            return better
        if self.pending is None:
            with self._heard():
                return kernels.restore_rows(out, correction=better)
        self.pending.append(Pending(out, better))
        return out

    def _awaited(self, out: Tensor) -> kernels.Correction | None:
        """What an output still lacks, of the call that ends with it."""
        if not self.pending:
            return None
        if len(self.pending) > 1 or self.pending[0].out is not out:
            raise ConfigError(
                f"wanted an output that has a correction to go back as it is; layer {self.layer} made another of it. "
                "Leave `Blocks.correct` away, or let it return the better output itself"
            )
        return self.pending[0].correction

    @contextmanager
    def _heard(self) -> Iterator[list[kernels.Choice]]:
        """What computes the calls in this block; who was passed over for it goes into the record."""
        with kernels.record() as ran:
            yield ran
        self.record.passed_over += tuple(reason for choice in ran for reason in choice.passed_over)

    def _break_even(self, q: Tensor, lists: kernels.BlockLists) -> float:
        """Density above which dense attention is faster."""
        masked, block = self.key_mask is not None, (lists.q_block, lists.kv_block)
        return kernels.break_even(q.device, q.dtype, q.shape[-1], block, q.shape[2], masked)

    def _computed(self, blocks: Blocks, q: Tensor) -> Tensor:
        """Share of dense attention in the listed blocks and in summaries; gaps of tiles are computed too."""
        known: _Density | None = self.memory.get("density")
        by, mixed = _kind(blocks.summary)
        if known is not None and known.of() is blocks.lists and known.by == by:
            return known.share
        lists, tokens = blocks.lists, self.layout.tokens
        whole = lists.q_len * lists.kv_len / (tokens * self.layout.queries)
        count = lists.cnt.mean(dtype=torch.float32)
        if by is None:
            return count / (lists.kv_blocks / whole)
        work = partial(summary_work, by, block=(lists.q_block, lists.kv_block), tokens=tokens)
        none, every = (work(dropped=x, head_dim=q.shape[3], mixed=mixed) for x in (0.0, 1.0))
        return torch.rsub(count, every, alpha=-whole / lists.kv_blocks * (1 + none - every))  # it is linear: one launch

    def _known_density(self, blocks: Blocks, q: Tensor) -> float | None:
        """The density as a number; on a device that of an earlier call, where this one's isn't here: none waits."""
        if blocks.about is not None and q.device.type != "cpu":
            return blocks.about
        last: _Density | None = self.memory.get("density")
        if last is not None and last.of() is blocks.lists:
            return last.number()
        share = self._computed(blocks, q)  # strategies may make new lists at each call
        before = None if last is None else last.number()
        here = _Density(weakref.ref(blocks.lists), _kind(blocks.summary)[0], share, Reading(share), before)
        self.memory["density"] = here
        return here.number()


class _Asked(NamedTuple):
    """Some lists without the rows that nobody asks for."""

    of: weakref.ref[kernels.BlockLists]
    lists: kernels.BlockLists


class _Density(NamedTuple):
    """Share of dense attention in some lists and in summaries, and what is known of it.

    Attributes:
        of: the lists.
        by: the summaries.
        share: 0-dim, on the device of the lists.
        reading: the same on its way.
        before: of the lists before these.
    """

    of: weakref.ref[kernels.BlockLists]
    by: kernels.Summary | None
    share: Tensor
    reading: Reading
    before: float | None

    def number(self) -> float | None:
        """Of the latest lists whose share is here."""
        number = self.reading.value()
        return self.before if number is None else number


def _kind(summary: kernels.Summary | kernels.Summaries | None) -> tuple[kernels.Summary | None, bool]:
    """How dropped blocks stand for their keys, and whether each query block mixes their slopes."""
    return (summary.by, summary.mixed) if isinstance(summary, kernels.Summaries) else (summary, True)


def _moved_back(orders: HeadOrders, keys: HeadOrders, site: Site) -> Attend:
    """The site's dense attention for moved queries, and moved keys and values."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return orders.apply(site.dense_backend.attend(orders.undo(q), keys.undo(k), keys.undo(v)))[0]

    return attend
