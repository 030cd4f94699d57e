"""The state of one applied transformer, and the way of one attention call through it."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
)
from torch import Tensor

from diffsparse.errors import ConfigError, DenseFallbackError, NoKernelError
from diffsparse.orders.layout import Layout, kept
from diffsparse.schedule import Schedule
from diffsparse.seam.call import Call, autocasts
from diffsparse.seam.clock import MOST_SHAPES, Clock, Moment
from diffsparse.seam.masks import KeyMask, Masks
from diffsparse.seam.models import Geometry, Grid, ModelSpec
from diffsparse.site.compute import DenseBackend, Site
from diffsparse.site.ledger import Ledger
from diffsparse.site.record import CallRecord
from diffsparse.site.shard import WHOLE
from diffsparse.strategies.base import Strategy, in_order

_KEPT_PASSES = 16  # of a loop whose length is unknown: how many passes keep the record of each call
_MOST_BRANCHES = 8  # guidance branches of a run, at most, for the number of its calls
_OBSTACLE = "no kernel"  # in a layer's memory: why none of this device can do its calls


class Layer:
    """One attention module of an applied transformer.

    `dispatches` tells whether its processor obeys Diffusers' attention backends, `backend` which one the user has
    set on it (None: whatever is set globally).
    """

    def __init__(self, name: str, index: int, run: Run) -> None:
        self.name, self.index, self.run = name, index, run
        # Decided here, for a compiled graph that read the name would serve one layer only.
        self.ignored = any(part in name for part in run.spec.skip)
        self.dispatches = False
        self.backend: AttentionBackendName | None = None
        number = next(_NUMBERS)
        # A tensor is an input of a compiled graph where an int would be a constant: one graph serves all layers.
        self.handle = _scalar(number)
        _LAYERS[number] = self

    def intercept(self, call: Call, number: int, others: int | None) -> Tensor:
        """Answer the `number`-th attention product of one processor call; traced when the model is compiled.

        Nothing may be decided by a size here: the graph would be bound to it.

        others: tokens that the processor was given beside those of its queries, if any.
        """
        call = call.cast()
        if self.ignored or (others is not None and self.run.spec.text == "none"):
            return call.dense(self.user_backend())
        if not torch.compiler.is_compiling():
            return self.answer(call, number, others)
        q, k, v, mask = call.query, call.key, call.value, call.attn_mask
        place = (self.handle, number, others, self.run.begun)
        if not call.needs_grad:
            rest = (call.dropout_p, call.is_causal, call.scale)
            return torch.ops.diffsparse.attend(q, k, v, mask, *rest, *place)  # type: ignore[no-any-return]
        # Autograd wants the graph's own product; what is added, and so can't be left out, is 0.
        zero: Tensor = torch.ops.diffsparse.decline(q.detach(), k.detach(), *place)
        return call.dense(self.user_backend()) + zero

    def answer(self, call: Call, number: int, others: int | None) -> Tensor:
        """`intercept` when the sizes are known: in eager mode, or when a compiled graph runs."""
        queries, keys = call.query.shape[2], call.key.shape[2]
        if others is not None and keys != queries and (keys < queries or keys == others):  # of the other tokens alone
            return call.dense(self.user_backend())
        layout, obstacle = self._layout(call)
        return self.run.attend(self, call, layout, number, obstacle)

    def missed(self, out: Any, others: int | None) -> Any:
        """A processor call is over, and none of its attention was seen; its output, to which nothing is done."""
        if self.ignored or (others is not None and self.run.spec.text == "none"):
            return out
        if not torch.compiler.is_compiling():
            self.note_unseen()
            return out
        first, *rest = out if isinstance(out, tuple) else (out,)
        first = first + torch.ops.diffsparse.miss(self.handle, self.run.begun)  # 0, which can't be left out
        return (first, *rest) if isinstance(out, tuple) else first

    def note_unseen(self) -> None:
        """`missed`, when the call has run."""
        self.run.note_unseen(self, "the processor computes attention without scaled_dot_product_attention")

    def _layout(self, call: Call) -> tuple[Layout, str | None]:
        """Where the tokens are, or why that isn't known: then they are a plain run of tokens."""
        spec, tokens = self.run.spec, call.query.shape[2]
        plain = Layout(1, 1, tokens)
        if tokens != call.key.shape[2]:
            return plain, "queries are not of the same tokens as the keys"
        layout = spec.layout(self.run.grid, tokens)
        return (plain, "the order of the tokens is not known") if layout is None else (layout, None)

    def user_backend(self) -> AttentionBackendName:
        """The backend that would run this layer if it were untouched."""
        if not self.dispatches:
            return AttentionBackendName.NATIVE
        active: AttentionBackendName = _AttentionBackendRegistry.get_active_backend()[0]
        return self.backend or active


_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()


@kept
def _scalar(number: int) -> Tensor:
    """On the CPU and no inference tensor, whatever surrounds the caller: no graph waits for it."""
    return torch.tensor(number, device="cpu")


class _Declined(Call):
    """A product that a compiled graph computes itself, for autograd watches it: it is only to be reported."""

    needs_grad = True

    def dense(self, backend: AttentionBackendName) -> Tensor:
        return self.query


# The compiler's view. The ops are opaque: grid, step, branch and memory are read in them, when the graph runs. `begun`
# makes each op of a pass wait for the one that begins it. A CUDA graph would replay one step's answer for ever: they
# stay out of it, where torch knows how to say so.
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_TAGS: Any = {} if _UNSAFE is None else {"tags": _UNSAFE}


@torch.library.custom_op("diffsparse::begin", mutates_args=(), **_TAGS)
def _begin(
    handle: Tensor,
    places: Tensor | None,
    sizes: list[int],
    tokens: int | None,
    coordinates: bool,
    behind: int,
    axes: list[int],
    channels: list[int],
) -> Tensor:
    """A forward pass begins, of the model that the layer `handle` belongs to."""
    geometry = Geometry(sizes, tokens, places, coordinates, behind, axes, channels)
    _LAYERS[int(handle)].run.grid = geometry.grid()
    return torch.zeros((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("diffsparse::attend", mutates_args=(), **_TAGS)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    handle: Tensor,
    number: int,
    others: int | None,
    begun: Tensor,
) -> Tensor:
    """`Layer.answer`."""
    call = Call(q, k, v, mask, dropout, causal, scale, enable_gqa=q.shape[1] != k.shape[1])
    out = _token_major(_LAYERS[int(handle)].answer(call, number, others))
    given = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    return out.clone() if out.untyped_storage().data_ptr() in given else out  # an op may not give back its arguments


@torch.library.custom_op("diffsparse::decline", mutates_args=(), **_TAGS)
def _decline(q: Tensor, k: Tensor, handle: Tensor, number: int, others: int | None, begun: Tensor) -> Tensor:
    """Report the dense product of q and k that stands in the graph, or raise as `strict` demands; 0."""
    out = _LAYERS[int(handle)].answer(_Declined(q, k, k), number, others)
    if out is not q:
        raise ConfigError("head guidance of a compiled model wants torch.no_grad(): its graph computes the attention")
    return torch.zeros((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("diffsparse::miss", mutates_args=(), **_TAGS)
def _miss(handle: Tensor, begun: Tensor) -> Tensor:
    """`Layer.note_unseen`; 0."""
    _LAYERS[int(handle)].note_unseen()
    return torch.zeros((), dtype=torch.int64, device="cpu")


@_begin.register_fake
@_miss.register_fake
def _(handle: Tensor, *_: Any) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device="cpu")


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _token_major(q.new_empty(*q.shape[:3], v.shape[-1]))


@_decline.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device="cpu")


def _token_major(out: Tensor) -> Tensor:
    """[B, H, N, D] stored as [B, N, H, D]: processors flatten it so next, which then costs them no copy."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


class _Context(StateManager):  # type: ignore[misc]
    """Told by `cache_context` which pass this is: a name in Diffusers 0.40, a record with a name and more later."""

    def __init__(self) -> None:
        super().__init__(dict)
        self.current: Any = None

    def set_context(self, context: Any) -> None:
        """Called when a context is entered, and with None when it is left."""
        self.current = context


class Perturber(Protocol):
    """What `guide` puts on a run: it sees the output of each self-attention call, and may return another."""

    run: Run

    def perturb(self, out: Tensor, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int) -> Tensor:
        """`out` [B, H, N, D], or what stands in its place."""

    def unhook(self) -> None:
        """Leave the model's forward passes alone from now on."""


class Run(ModelHook):  # type: ignore[misc]
    """All that one applied transformer remembers. As a stateful hook it is told the branch and the end of a call."""

    _is_stateful = True

    def __init__(
        self, name: str, spec: ModelSpec, strategy: Strategy, schedule: Schedule, strict: bool, pipe: Any
    ) -> None:
        super().__init__()
        self.name, self.spec, self.strategy, self.schedule, self.strict = name, spec, strategy, schedule, strict
        self.context = _Context()
        self.clock = Clock(pipe, lambda: self.context.current)
        self.grid: Grid | None = None
        self.begun = _scalar(0)
        self.layers: list[Layer] = []
        self._memories: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._shapes: OrderedDict[tuple[Any, ...], int] = OrderedDict()  # of the memories, by the pass that used them
        self.ledger = Ledger(memories=self._memories)
        self._masks = Masks()
        self._run, self._idle, self._recognised = -1, False, False
        self.pre_hook: Any = None
        self.post_hook: Any = None
        self.shard = WHOLE
        self.bare = False  # made for guidance alone, and gone with it
        self.guidance: Perturber | None = None
        self.aside: Moment | None = None  # the moment of an extra pass, which the clock doesn't count

    def add_layer(self, name: str) -> Layer:
        """The layer for the attention module `name`."""
        self.layers.append(Layer(name, len(self.layers), self))
        return self.layers[-1]

    def begin_compiled(self, geometry: Geometry) -> None:
        """A forward pass begins, within the graph that is being traced: its grid is read when the graph runs."""
        facts = (geometry.places, geometry.sizes, geometry.tokens, geometry.coordinates, geometry.behind)
        self.begun = torch.ops.diffsparse.begin(self.layers[0].handle, *facts, geometry.axes, geometry.channels)

    def reset_state(self, module: torch.nn.Module | None = None) -> torch.nn.Module | None:
        """Drop what strategies remember; the report of the last run stays readable."""
        self._forget()
        self.clock.reset()
        return module

    def _forget(self) -> None:
        self.ledger.close()
        self._memories = {}
        self._shapes.clear()
        self._masks.clear()

    def notice_idleness(self, model: str) -> None:
        """Say, once, that a whole forward pass went by without any attention that could be made sparse."""
        if self._idle or self._recognised:
            return
        self._idle = True
        reason = (
            f"{model} ran, but none of its attention was recognised as self-attention over its latents, so nothing is "
            "sparse: the order of its tokens is not known (see diffsparse.seam.models.SPECS)"
        )
        if self.strict:
            raise DenseFallbackError(f"{reason}; apply with strict=False to allow it")
        warnings.warn(reason, UserWarning, stacklevel=2)

    def note_unseen(self, layer: Layer, reason: str) -> None:
        """Report a self-attention call that went another way than ours."""
        moment = self.aside or self.clock.read(layer)
        self._open(layer, moment).ran_dense(reason, planned=False, backend="unknown")
        if self.strict:
            raise DenseFallbackError.of(layer.name, moment.step, f"ran dense ({reason})")

    def attend(self, layer: Layer, call: Call, layout: Layout, number: int = 0, obstacle: str | None = None) -> Tensor:
        """One self-attention call: dense where the schedule or the call itself demands it, else the strategy's.

        obstacle: why no strategy can be asked, if the call's place says so.
        """
        self._recognised = self._recognised or obstacle is None
        moment = self.aside or self.clock.read(layer, number, (call.query.shape, layout))
        with _own_ways(call.query.device.type):
            out = self._attend(layer, call, layout, moment, number, obstacle)
            if self.guidance is None or obstacle:
                return out
            return self.guidance.perturb(out, layer, call, layout, moment, number)

    def _open(self, layer: Layer, moment: Moment) -> CallRecord:
        """Begin the record of a call; in a new run nothing of the last one is left."""
        if moment.run != self._run:
            self._forget()
            self._run, self.ledger = moment.run, Ledger(memories=self._memories)
            if moment.steps is None and (unknown := self.schedule.of_unknown_length()):
                self.ledger.note(unknown)
        record = self.ledger.open(layer.name, moment.step, moment.branch)
        record.note = "" if self.grid is None else self.grid.note
        self._bound(moment)
        return record

    def _attend(
        self, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int, obstacle: str | None
    ) -> Tensor:
        record = self._open(layer, moment)
        with record.timed(call.query.device):
            mask, obstacle = (None, obstacle) if obstacle else self._examine(layer, call, layout, moment, number)
            call = call if obstacle else call.ungrouped()
            site = self._site(layer, call, layout, moment, number, record, mask)
            if obstacle:
                return site.fall_back(call.query, call.key, call.value, obstacle)
            out = self._choose(layer, call, site)
            if mask is None or record.kind == "dense":
                return out
            return mask.repair(out, call, layout, layer.user_backend())

    def _bound(self, moment: Moment) -> None:
        """A loop may have no end: keep the records of a few passes, or of all if there are so many to come."""
        passes = _KEPT_PASSES if moment.steps is None else moment.steps * _MOST_BRANCHES
        self.ledger.bound(max(passes * len(self.layers), 1))

    def _memory(self, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int) -> dict[str, Any]:
        """What this layer remembers in this branch, for sequences of this shape.

        Few shapes are remembered at once, and all that the last passes had: each sample may have one of its own.
        """
        shape = (moment.branch, moment.steps, call.query.shape, layout)
        self._shapes[shape] = now = self.clock.passes
        self._shapes.move_to_end(shape)
        oldest = next(iter(self._shapes))
        if len(self._shapes) > MOST_SHAPES and now - self._shapes[oldest] >= MOST_SHAPES:
            del self._shapes[oldest]
            for key in [key for key in self._memories if key[0] == oldest]:
                del self._memories[key]
        return self._memories.setdefault((shape, layer.index, number), {})

    def _choose(self, layer: Layer, call: Call, site: Site) -> Tensor:
        """The strategy's answer, or dense attention where the schedule, the model or the kernels leave no choice."""
        q, k, v = call.query, call.key, call.value
        if self.schedule.is_dense(site.step, site.steps, layer.index, len(self.layers)):
            last_dense = site.step == self.schedule.last_dense(site.steps)
            if not (last_dense and self.strategy.observes) or self.schedule.excludes(layer.index, len(self.layers)):
                return site.dense(q, k, v, reason="schedule")
            method = self.strategy.observe
        else:
            method = self.strategy.attend
        if self.grid is not None and not self.grid.known and self.strategy.wants_grid:
            return site.fall_back(q, k, v, "no geometry")
        if _OBSTACLE in site.memory:
            return site.fall_back(q, k, v, site.memory[_OBSTACLE])
        try:
            return in_order(self.strategy, method, (q, k, v), site)
        except NoKernelError as error:  # the same in all steps, so nothing is moved for it again
            site.memory[_OBSTACLE] = error.reason
            return site.fall_back(q, k, v, error.reason)

    def _site(
        self,
        layer: Layer,
        call: Call,
        layout: Layout,
        moment: Moment,
        number: int,
        record: CallRecord,
        mask: KeyMask | None,
    ) -> Site:
        backend = layer.user_backend()

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return replace(call, query=q, key=k, value=v).dense(backend)

        return Site(
            model=self.name,
            layer=layer.name,
            index=layer.index,
            step=moment.step,
            steps=moment.steps,
            branch=moment.branch,
            layout=layout,
            layers=len(self.layers),
            shard=self.shard,
            memory=self._memory(layer, call, layout, moment, number),
            dense_backend=DenseBackend(backend.value, dense),
            record=record,
            scale=call.scale,
            key_mask=None if mask is None else mask.keys,
            strict=self.strict,
        )

    def _examine(
        self, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int
    ) -> tuple[KeyMask | None, str | None]:
        """The call's mask as one over keys, and what (if anything) forbids a sparse kernel."""
        if not call.query.dtype == call.key.dtype == call.value.dtype:
            return None, "queries, keys and values of different dtypes"
        if call.needs_grad:
            return None, "gradients are wanted"
        if call.is_causal:
            return None, "causal attention"
        if call.dropout_p:
            return None, "dropout"
        if call.attn_mask is None:
            return None, None
        place, now = (layer.index, number, moment.branch), (moment.run, moment.step, moment.branch)
        return self._masks.read(call.attn_mask, len(call.query), layout, place, now)


def _own_ways(device: str) -> ExitStack:
    """Within: arithmetic keeps the dtypes and devices that it chose, whatever autocast and default device there are."""
    ways = ExitStack()
    if autocasts(device):
        ways.enter_context(torch.autocast(device, enabled=False))
    if torch.get_default_device().type != "cpu":
        ways.enter_context(torch.device("cpu"))
    return ways
