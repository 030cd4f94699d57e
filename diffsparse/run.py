"""The state of one applied transformer, and the way of one attention call through it."""

from __future__ import annotations

import itertools
import warnings
import weakref
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor

from diffsparse.clock import Clock, Moment
from diffsparse.errors import ConfigError, DenseFallbackError, NoKernelError
from diffsparse.layout import Layout
from diffsparse.masks import KeyMask, read_mask
from diffsparse.models import Geometry, Grid, ModelSpec
from diffsparse.order import AUTO, RASTER, in_order
from diffsparse.report import CallRecord, Ledger
from diffsparse.schedule import Schedule
from diffsparse.site import Site

_OBSTACLE = "no kernel"  # in a layer's memory: why none of this device can do its calls
SDPA = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Call:
    """One attention product as the processor asked for it: [B, H, N, D], fewer key heads if `enable_gqa`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def needs_grad(self) -> bool:
        """Whether autograd watches this product."""
        watched = self.query.requires_grad or self.key.requires_grad or self.value.requires_grad
        return watched and torch.is_grad_enabled()

    def ungrouped(self) -> Call:
        """The same product with as many key and value heads as query heads."""
        groups = self.query.shape[1] // self.key.shape[1]
        if groups == 1:
            return self
        key, value = (x.repeat_interleave(groups, 1) for x in (self.key, self.value))
        return replace(self, key=key, value=value, enable_gqa=False)

    def dense(self, backend: AttentionBackendName) -> Tensor:
        """The product on one of Diffusers' backends; NATIVE is torch's SDPA, called just as it was asked for."""
        rest = (self.attn_mask, self.dropout_p, self.is_causal)
        if backend is AttentionBackendName.NATIVE:
            return SDPA(self.query, self.key, self.value, *rest, scale=self.scale, enable_gqa=self.enable_gqa)
        q, k, v = (x.transpose(1, 2) for x in (self.query, self.key, self.value))  # [B, N, H, D]
        out: Tensor = dispatch_attention_fn(q, k, v, *rest, self.scale, self.enable_gqa, backend=backend)
        return out.transpose(1, 2)


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

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is not applied: its processors find no layer and run as they always did."""
        return

    def intercept(self, call: Call, number: int, cross: bool) -> Tensor:
        """Answer the `number`-th attention product of one processor call; traced when the model is compiled.

        Nothing may be decided by a size here: the graph would be bound to it.
        """
        if self.ignored or (cross and self.run.spec.text == "none"):
            return call.dense(self.user_backend())
        if not torch.compiler.is_compiling():
            return self.answer(call, number)
        q, k, v, mask = call.query, call.key, call.value, call.attn_mask
        place = (self.handle, number, self.run.begun)
        if not call.needs_grad:
            rest = (call.dropout_p, call.is_causal, call.scale)
            return torch.ops.diffsparse.attend(q, k, v, mask, *rest, *place)  # type: ignore[no-any-return]
        # Autograd wants the graph's own product; what is added, and so can't be left out, is 0.
        zero: Tensor = torch.ops.diffsparse.decline(q.detach(), k.detach(), *place)
        return call.dense(self.user_backend()) + zero

    def answer(self, call: Call, number: int) -> Tensor:
        """`intercept` when the sizes are known: in eager mode, or when a compiled graph runs."""
        layout = None
        if call.query.shape[2] == call.key.shape[2]:
            layout = self.run.spec.layout(self.run.grid, call.query.shape[2])
        if layout is None:  # no self-attention over the grid: left alone
            return call.dense(self.user_backend())
        return self.run.attend(self, call, layout, number)

    def user_backend(self) -> AttentionBackendName:
        """The backend that would run this layer if it were untouched."""
        if not self.dispatches:
            return AttentionBackendName.NATIVE
        active: AttentionBackendName = _AttentionBackendRegistry.get_active_backend()[0]
        return self.backend or active


_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()


@torch.inference_mode(False)
def _scalar(number: int) -> Tensor:
    """On the CPU and no inference tensor, whatever surrounds the caller: no graph waits for it."""
    return torch.tensor(number, device="cpu")


class _Declined(Call):
    """A product that a compiled graph computes itself, for autograd watches it: it is only to be reported."""

    needs_grad = True

    def dense(self, backend: AttentionBackendName) -> Tensor:
        return self.query


# The compiler's view. The ops are opaque: grid, step, branch and memory are read in them, when the graph runs. `begun`
# makes each op of a pass wait for the one that begins it.


@torch.library.custom_op("diffsparse::begin", mutates_args=())
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


@torch.library.custom_op("diffsparse::attend", mutates_args=())
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
    begun: Tensor,
) -> Tensor:
    """`Layer.answer`."""
    call = Call(q, k, v, mask, dropout, causal, scale, enable_gqa=q.shape[1] != k.shape[1])
    return _token_major(_LAYERS[int(handle)].answer(call, number))


@torch.library.custom_op("diffsparse::decline", mutates_args=())
def _decline(q: Tensor, k: Tensor, handle: Tensor, number: int, begun: Tensor) -> Tensor:
    """Report the dense product of q and k that stands in the graph, or raise as `strict` demands; 0."""
    out = _LAYERS[int(handle)].answer(_Declined(q, k, k), number)
    if out is not q:
        raise ConfigError("head guidance of a compiled model wants torch.no_grad(): its graph computes the attention")
    return torch.zeros((), dtype=torch.int64, device="cpu")


@_begin.register_fake
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

    def __init__(self, name: str, spec: ModelSpec, strategy: Any, schedule: Schedule, strict: bool, pipe: Any) -> None:
        super().__init__()
        self.name, self.spec, self.strategy, self.schedule, self.strict = name, spec, strategy, schedule, strict
        self.context = _Context()
        self.clock = Clock(pipe, lambda: self.context.current)
        self.grid: Grid | None = None
        self.begun = _scalar(0)
        self.layers: list[Layer] = []
        self.ledger = Ledger()
        self._memories: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._masks: dict[tuple[Any, ...], str | None] = {}
        self._run, self._forwards = -1, 0
        self.pre_hook: Any = None
        self.bare = False  # made for guidance alone, and gone with it
        self.guidance: Perturber | None = None
        self.aside: Moment | None = None  # the moment of an extra pass, which the clock doesn't count

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        """A copied model is not applied: its hook has no layers."""
        return Run(self.name, self.spec, self.strategy, self.schedule, self.strict, None)

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
        self._memories.clear()
        self._masks.clear()

    def notice_idleness(self, model: str) -> None:
        """Say, once, that a whole forward pass went by without any attention that could be made sparse."""
        self._forwards += 1
        if self._forwards != 2 or self.ledger.calls:
            return
        reason = (
            f"{model} ran, but none of its attention was recognised as self-attention over its latents, so nothing is "
            "sparse: the order of its tokens is not known (see diffsparse.models.SPECS)"
        )
        if self.strict:
            raise DenseFallbackError(f"{reason}; apply with strict=False to allow it")
        warnings.warn(reason, UserWarning, stacklevel=2)

    def attend(self, layer: Layer, call: Call, layout: Layout, number: int = 0) -> Tensor:
        """One self-attention call: dense where the schedule or the call itself demands it, else the strategy's."""
        moment = self.aside or self.clock.read(layer, number)
        out = self._attend(layer, call, layout, moment, number)
        if self.guidance is None:
            return out
        return self.guidance.perturb(out, layer, call, layout, moment, number)

    def _attend(self, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int) -> Tensor:
        if moment.run != self._run:
            self._run, self.ledger = moment.run, Ledger()
            self._forget()
        record = self.ledger.open(layer.name, moment.step, moment.branch)
        record.note = "" if self.grid is None else self.grid.note
        with record.timed(call.query.device):
            mask, obstacle = self._examine(call, layout, moment)
            call = call if obstacle else call.ungrouped()
            site = self._site(layer, call, layout, moment, number, record, mask)
            if obstacle:
                return site.fall_back(call.query, call.key, call.value, obstacle)
            out = self._choose(layer, call, site)
            if mask is None or record.kind == "dense":
                return out
            return mask.repair(out, call, layout, layer.user_backend())

    def _choose(self, layer: Layer, call: Call, site: Site) -> Tensor:
        qkv = call.query, call.key, call.value
        if self.schedule.is_dense(site.step, site.steps, layer.index, len(self.layers)):
            observe = getattr(self.strategy, "observe", None)
            last_dense = site.step == self.schedule.bounds(site.steps)[0] - 1
            if observe is None or not last_dense or self.schedule.excludes(layer.index, len(self.layers)):
                return site.dense(*qkv, reason="schedule")
            method = observe
        else:
            method = self.strategy.attend
        if self.grid is not None and not self.grid.known and needs_grid(self.strategy):
            return site.fall_back(*qkv, "no geometry")
        if _OBSTACLE in site.memory:
            return site.fall_back(*qkv, site.memory[_OBSTACLE])
        try:
            out = in_order(self.strategy, method, qkv, site)
        except NoKernelError as error:  # the same in all steps, so nothing is moved for it again
            site.memory[_OBSTACLE] = error.reason
            return site.fall_back(*qkv, error.reason)
        self.ledger.memory[layer.name, site.branch] = _nbytes(site.memory)
        return out

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
        key = (layer.index, number, moment.branch, moment.steps, call.query.shape, layout)
        backend = layer.user_backend()
        return Site(
            self.name,
            layer.name,
            layer.index,
            moment.step,
            moment.steps,
            moment.branch,
            layout,
            self._memories.setdefault(key, {}),
            call.scale,
            None if mask is None else mask.keys,
            self.strict,
            len(self.layers),
            _dense=lambda q, k, v: replace(call, query=q, key=k, value=v).dense(backend),
            _backend=backend.value,
            _record=record,
        )

    def _examine(self, call: Call, layout: Layout, moment: Moment) -> tuple[KeyMask | None, str | None]:
        """The call's mask as one over keys, and what (if anything) forbids a sparse kernel."""
        if call.needs_grad:
            return None, "gradients are wanted"
        if call.is_causal:
            return None, "causal attention"
        if call.dropout_p:
            return None, "dropout"
        if call.attn_mask is None:
            return None, None
        key = (moment.branch, call.attn_mask.shape, call.attn_mask.dtype)
        return read_mask(call.attn_mask, layout, self._masks, key)


def needs_grid(strategy: Any) -> bool:
    """Whether a strategy means something else, or nothing, where the tokens' places are not known."""
    return getattr(strategy, "order", RASTER) not in (RASTER, AUTO) or getattr(strategy, "needs_grid", False)


def _nbytes(memory: dict[str, Any]) -> int:
    return sum(int(getattr(value, "nbytes", 0)) for value in memory.values())
