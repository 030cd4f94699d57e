"""How long a run takes on a device that isn't here: each piece of a step by its operations or its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from diffsparse.insight.cost import Flops
from diffsparse.insight.device import Device, Rate
from diffsparse.orders.layout import Layout
from diffsparse.orders.named import RASTER
from diffsparse.schedule import Schedule
from diffsparse.strategies.base import Strategy
from diffsparse.strategies.work import Outline, Parts, Step
from diffsparse_kernels import edges

_KEPT_GIGABYTES = 0.54  # of matrices H, as `diffsparse_kernels` keeps them on a device


class Piece(NamedTuple):
    """One thing that a step does in one layer, for one sample.

    Attributes:
        name: what is done, such as "blocks" or "probes".
        tflop: operations, in 1e12.
        gigabytes: bytes read and written, in 1e9.
        ms: time on the device.
    """

    name: str
    tflop: float
    gigabytes: float
    ms: float


@dataclass(frozen=True)
class Call:
    """One self-attention call in bfloat16, and the device that runs it.

    Attributes:
        device: what runs it.
        tokens: N, text included.
        heads: H.
        head_dim: D.
        block: of queries and of keys.
        masked: a key mask hides padding of a prompt.
        moved: the tokens change their order.
    """

    device: Device
    tokens: int
    heads: int
    head_dim: int
    block: tuple[int, int]
    masked: bool = False
    moved: bool = False

    @property
    def dense_tflop(self) -> float:
        """Both products of a dense call."""
        return 4e-12 * self.tokens**2 * self.heads * self.head_dim

    @property
    def tensor(self) -> float:
        """Gigabytes of q, and of k, v and the output."""
        return 2e-9 * self.tokens * self.heads * self.head_dim

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks of queries, and of keys."""
        rows, columns = (-(-self.tokens // edge) for edge in self.block)
        return rows, columns

    @property
    def pairs(self) -> float:
        """1e9 pairs of blocks, all heads."""
        rows, columns = self.counts
        return 1e-9 * self.heads * rows * columns

    def pieces(self, step: Step) -> list[Piece] | None:
        """What a step does; None if that is not known, or no model of its time is here."""
        known = step.kind in ("dense", "search") or (step.density is not None and step.kind != "tail")
        if not known or (step.kind == "sparse" and step.beside and step.parts is None):
            return None
        found = [self.dense] if step.kind == "dense" else [*self._search(step)]
        if step.kind in ("sparse", "refresh") or step.parts is not None:
            found += self._product(step)
        if self.moved and step != Step():
            back = 2 if self.masked and step.kind == "dense" else 1  # dense attention gets its own mask and order
            found.append(self._through("tokens moved", 8 * back * self.tensor, self.device.moved_tokens.value))
        host = self.device.host_of_blocks if step.parts is None else self.device.host_of_compensated
        waits = host.value - sum(piece.ms for piece in found)
        return [*found, Piece("host", 0.0, 0.0, waits)] if waits > 0 and step != Step() else found

    @property
    def dense(self) -> Piece:
        """The user's dense attention."""
        return self._multiplied(
            "dense", self.dense_tflop, self.device.dense_masked if self.masked else self.device.dense
        )

    def _search(self, step: Step) -> Iterator[Piece]:
        """Masses, in or beside a dense pass that has a log-sum-exp, and the lists that they give."""
        half, own, fused = self.dense_tflop / 2, self.device.dense_with_lse, self.device.fused_mass
        if step.kind == "search":
            yield self._multiplied("dense with LSE", self.dense_tflop, own)
        if step.kind == "search" and fused is not None:
            yield Piece("block mass", half, 0.0, 1e3 * self.dense_tflop / own.value * (fused.value - 1))
            # read for the summaries of the keys: k and v; for what these give: q, and an output that is not used
            yield self._multiplied("estimated LSE", self._over_means, self.device.mean_keys, 6 * self.tensor)
        elif step.kind in ("search", "refresh"):
            yield self._multiplied("block mass", half, self.device.block_mass)
        if step.kind in ("search", "refresh"):
            yield self._chosen(True)

    def _product(self, step: Step) -> Iterator[Piece]:
        """A sparse product and what belongs to it."""
        parts, listed, device = step.parts, step.density or 0.0, self.device
        yield self._multiplied(
            "blocks", self.dense_tflop * (listed if parts is None else parts.listed), device.listed_blocks
        )
        if parts is None:
            return
        yield from self._summaries(parts)
        if parts.routed:
            gigabytes = 4 * self.pairs
            yield self._multiplied("routing", self._over_means, device.block_mass, gigabytes)
        if parts.lists:
            yield self._chosen(parts.routed)
        if parts.probes:
            yield from self._probes(parts.probes)
        if parts.rank:
            yield self._through(
                "residual", 1e-9 * self.tokens * self.heads * (parts.rank + 2)
            )  # codes and their scales
        if step.kind == "dense":
            yield self._through("residual found", 3 * self.tensor, more=device.residual_directions.value)

    def _summaries(self, parts: Parts) -> Iterator[Piece]:
        """Mean keys in the softmax, and what is known of blocks; the matrices H and their mixture to first order."""
        (rows, columns), dim, device = self.counts, self.head_dim, self.device
        yield self._multiplied("mean keys", self._over_means, device.mean_keys)
        if parts.summary == "means":
            yield self._through("statistics", (6 if parts.routed else 2) * self.tensor)
            return
        matrix, token = 2e-9 * self.heads * dim**2, 2e-12 * self.tokens * self.heads * dim**2
        times = 1 if columns * matrix <= _KEPT_GIGABYTES else 2  # its size tells the blocks before it is mixed
        made = 2 * times * self.tensor + columns * matrix
        yield self._multiplied("statistics", times * token, device.matrix_product, made)
        mixed = (columns + rows) * matrix + self.tensor + 4 * self.pairs  # weights are written and read
        yield self._multiplied("mixing", 2e-3 * self.pairs * dim**2, device.matrix_product, mixed)
        yield self._multiplied("first-order steps", token, device.matrix_product, rows * matrix)

    def _probes(self, count: int) -> Iterator[Piece]:
        """Exact rows, of which there are too few for all processors, and their fit; it is added as tokens move back."""
        busy = min(1.0, self.heads * -(-count // 128) / self.device.processors.value)
        exact = self.device.dense_with_lse._replace(value=self.device.dense_with_lse.value * busy)
        yield self._multiplied("probes", self.dense_tflop * count / self.tokens, exact, 2 * self.tensor)
        yield Piece("their fit", 0.0, 0.0, self.device.fit.value)

    def _chosen(self, chosen: bool) -> Piece:
        """Blocks chosen from all pairs, if they are, and lists made of them."""
        nanoseconds = self.device.lists_of_a_pair.value + (self.device.selection_of_a_pair.value if chosen else 0.0)
        return Piece("selection and lists" if chosen else "lists", 0.0, 0.0, 1e3 * self.pairs * nanoseconds)

    @property
    def _over_means(self) -> float:
        """TFLOP of two products with the mean keys of all blocks."""
        return self.dense_tflop * self.counts[1] / self.tokens

    def _multiplied(self, name: str, tflop: float, rate: Rate, gigabytes: float = 0.0) -> Piece:
        """A kernel waits for its operations or for its bytes."""
        share = self.device.usable_share.value if rate is self.device.matrix_product else 1.0
        ms = 1e3 * tflop / (share * rate.value)
        return Piece(name, tflop, gigabytes, max(ms, self._through(name, gigabytes).ms))

    def _through(self, name: str, gigabytes: float, bandwidth: float = 0.0, more: float = 0.0) -> Piece:
        """Bytes through memory, and `more` ms."""
        bandwidth = bandwidth or self.device.copy.value * self.device.usable_share.value
        return Piece(name, 0.0, gigabytes, 1e3 * gigabytes / bandwidth + more)


class Stretch(NamedTuple):
    """Steps of a run that do the same.

    Attributes:
        name: "dense", "learning" (dense, beside a product that is compared), "search", "refresh" or "sparse".
        steps: how many there are.
        pieces: of a layer.
    """

    name: str
    steps: int
    pieces: tuple[Piece, ...]

    @property
    def ms(self) -> float:
        """Of a layer."""
        return sum(piece.ms for piece in self.pieces)

    def of(self, *names: str) -> float:
        """Milliseconds of some pieces."""
        return sum(piece.ms for piece in self.pieces if piece.name in names)


@dataclass(frozen=True)
class Forecast:
    """A run on a device.

    Attributes:
        stretches: in the order of their first steps.
        layers: number of layers that do them.
        dense_layers: number of layers that stay dense.
        dense_ms: time of a dense call of a layer.
        rest_ms: time of one pass through the rest of the model.
        passes: forward passes of the model in a step.
    """

    stretches: tuple[Stretch, ...]
    layers: int
    dense_layers: int
    dense_ms: float
    rest_ms: float
    passes: int = 1

    @classmethod
    def of(
        cls, count: Flops, strategy: Strategy, schedule: Schedule, steps: int, layout: Layout, call: Call, passes: int
    ) -> Forecast | None:
        """Foretell a run of a strategy.

        Args:
            count: operations of a dense pass.
            strategy: what computes attention.
            schedule: steps and layers that stay dense.
            steps: length of the run.
            layout: of the tokens.
            call: sizes of a self-attention call, and the device.
            passes: of the model in a step: 2 with classifier-free guidance.

        Returns:
            The forecast; None if what the strategy does, or how long that takes, is unknown.
        """
        run = Outline.of(schedule, steps, layout, call.head_dim)
        here = replace(call, block=edges(strategy.block or call.block), moved=strategy.order != RASTER)
        found = []
        for step, many in Counter(strategy.steps(run)).items():
            pieces = here.pieces(step)
            if pieces is None:
                return None
            found.append(Stretch(_name(step), many, tuple(pieces)))
        whole = [i for i, flop in enumerate(count.attention) if flop]
        fixed = sum(schedule.excludes(i, len(count.attention)) for i in whole)
        rest_ms = 1e-9 * count.rest / call.device.rest_of_model.value
        return cls(tuple(found), len(whole) - fixed, fixed, here.dense.ms, rest_ms, passes)

    @property
    def dense_seconds(self) -> float:
        """The same run, all dense."""
        return self._steps * self.passes * (self._dense_attention_ms + self.rest_ms) / 1e3

    @property
    def seconds(self) -> float:
        """The run."""
        return self._steps * self.passes * (self._attention_ms + self.rest_ms) / 1e3

    @property
    def attention_share(self) -> float:
        """Of a dense step."""
        return self._dense_attention_ms / (self._dense_attention_ms + self.rest_ms)

    @property
    def attention_speedup(self) -> float:
        """Of the attention of the whole run."""
        return self._dense_attention_ms / self._attention_ms

    @property
    def speedup(self) -> float:
        """Of the whole run."""
        return self.dense_seconds / self.seconds

    @property
    def search_share(self) -> float:
        """Share of the run that searches, and products that are only compared, add to dense and sparse steps."""
        more = sum(each.steps * (each.ms - self._without_search(each)) for each in self.stretches)
        return self.passes * self.layers * more / (1e3 * self.seconds)

    @property
    def beside(self) -> float | None:
        """What a sparse step takes beside its blocks, as a share of these; None without such steps."""
        sparse = next((each for each in self.stretches if each.name == "sparse"), None)
        return None if sparse is None else sparse.ms / sparse.of("blocks") - 1

    def _without_search(self, each: Stretch) -> float:
        if each.name == "refresh":
            return each.ms - each.of("block mass", "selection and lists")
        return self.dense_ms if each.name in ("search", "learning") else each.ms

    @property
    def _steps(self) -> int:
        return sum(each.steps for each in self.stretches)

    @property
    def _attention_ms(self) -> float:
        """Of one pass, on average."""
        mean = sum(each.steps * each.ms for each in self.stretches) / self._steps
        return self.layers * mean + self.dense_layers * self.dense_ms

    @property
    def _dense_attention_ms(self) -> float:
        return (self.layers + self.dense_layers) * self.dense_ms


def _name(step: Step) -> str:
    return "learning" if step.kind == "dense" and step.parts is not None else step.kind
