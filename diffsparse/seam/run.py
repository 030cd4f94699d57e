"""The state of one applied transformer, and the way of one attention call through it."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.hooks import ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from diffsparse.errors import DenseFallbackError, NoKernelError
from diffsparse.orders.layout import Layout
from diffsparse.schedule import Schedule
from diffsparse.seam import compiled
from diffsparse.seam.caches import Passes, StepCache
from diffsparse.seam.call import Call, autocasts
from diffsparse.seam.clock import MOST_SHAPES, Ahead, Clock, Context, Moment
from diffsparse.seam.geometry import Geometry, Grid
from diffsparse.seam.masks import KeyMask, Masks
from diffsparse.seam.models import ModelSpec
from diffsparse.seam.targets import entrances_of
from diffsparse.site.compute import DenseBackend, Method, Site
from diffsparse.site.ledger import Ledger, Tally
from diffsparse.site.record import CallRecord
from diffsparse.site.shard import WHOLE
from diffsparse.strategies.base import Strategy, in_order

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.utils.hooks import RemovableHandle

_KEPT_PASSES = 16  # of a loop whose length is unknown: how many passes keep the record of each call
_MOST_BRANCHES = 8  # guidance branches of a run, at most, for the number of its calls
_OBSTACLE = "no kernel"  # in a layer's memory: why no kernel of this device can do its calls


class Layer:
    """One attention module of an applied transformer.

    Attributes:
        name: of the module in the transformer.
        index: among the adopted modules.
        skipped: it stays as it is (`ModelSpec.skip`).
        dispatches: its processor obeys Diffusers' attention backends.
        cache: the step cache that it is behind.
        backend: what the user has set on its processor; None: the one that is set globally.
        handle: of this layer, for the ops of a compiled graph.
    """

    def __init__(self, name: str, index: int, run: Run) -> None:
        self.name, self.index, self.run = name, index, run
        # Decided here: a compiled graph that read the name would serve one layer only.
        self.skipped = any(part in name for part in run.spec.skip)
        self.dispatches = False
        self.cache: StepCache | None = None
        self.backend: AttentionBackendName | None = None
        self.handle = compiled.register(self)

    @property
    def warm_up(self) -> int:
        """Steps that are computed at the start for a step cache to extrapolate from."""
        return 0 if self.cache is None else self.cache.warm_up

    def intercept(self, call: Call, number: int, encoder_tokens: int | None) -> Tensor:
        """Answer one attention product; traced when the model is compiled.

        Nothing may be decided by a size here: the graph would be bound to it.

        Args:
            call: the product.
            number: of the product within one processor call.
            encoder_tokens: that the processor was given beside the tokens of its queries; None: no such.
        """
        call = call.cast()
        if self._is_outside(encoder_tokens):
            return call.dense(self.user_backend())
        if not torch.compiler.is_compiling():
            return self.answer(call, number, encoder_tokens)
        place = (self.handle, number, encoder_tokens, self.run.begun)
        if not call.needs_grad:
            return compiled.attend(call, place)
        return call.dense(self.user_backend()) + compiled.decline(call, place)  # autograd needs the graph's own product

    def report_unseen(self, out: Tensor | tuple[Tensor, ...], encoder_tokens: int | None) -> object:
        """A processor call is over, and none of its attention was seen. Gives its output back; traced as well."""
        if self._is_outside(encoder_tokens):
            return out
        if not torch.compiler.is_compiling():
            self.note_unseen()
            return out
        first, *rest = out if isinstance(out, tuple) else (out,)
        first = first + compiled.miss(self.handle, self.run.begun)
        return (first, *rest) if isinstance(out, tuple) else first

    def _is_outside(self, encoder_tokens: int | None) -> bool:
        """Whether this call can't be self-attention over the grid, whatever its sizes."""
        return self.skipped or (encoder_tokens is not None and self.run.spec.text == "none")

    def begin(self, geometry: Geometry) -> None:
        """A forward pass of the model begins."""
        self.run.grid = geometry.grid()

    def answer(self, call: Call, number: int, encoder_tokens: int | None) -> Tensor:
        """`intercept` when the sizes are known: in eager mode, or when a compiled graph runs."""
        queries, keys = call.query.shape[2], call.key.shape[2]
        if encoder_tokens is not None and keys != queries and (keys < queries or keys == encoder_tokens):
            return call.dense(self.user_backend())  # cross-attention
        layout, obstacle = self._layout(call)
        if self.run.spec.partial and (call.is_causal or (obstacle and self._is_beside(queries, keys))):
            return call.dense(self.user_backend())
        if obstacle or queries == keys:
            return self.run.attend(self, call, layout, number, obstacle)
        whole = None if call.needs_grad else call.of_all(layout)
        if whole is None:
            return self.run.attend(self, call, layout, number, "queries of a part of the tokens have rows of a mask")
        return layout.gathered(self.run.attend(self, whole, layout))  # the only one of its kind in a processor call

    def _is_beside(self, queries: int, keys: int) -> bool:
        """Whether this may be attention among texts or references alone, whose keys the output's tokens get too."""
        grid = self.run.grid
        return queries != keys or (grid is not None and keys < grid.tokens)

    def note_unseen(self) -> None:
        """`report_unseen` in eager mode, or when a compiled graph runs."""
        self.run.note_unseen(self, "the processor computes attention without scaled_dot_product_attention")

    def _layout(self, call: Call) -> tuple[Layout, str | None]:
        """The layout of the tokens; if it isn't known, that of one line of tokens, and why."""
        spec, queries, keys = self.run.spec, call.query.shape[2], call.key.shape[2]
        layout, line = spec.layout(self.run.grid, keys, queries), Layout(1, 1, queries)
        if layout is not None:
            return layout, None
        if queries == keys:
            return line, "the order of the tokens is not known"
        return line, "queries are not of the same tokens as the keys"

    def user_backend(self) -> AttentionBackendName:
        """The backend that would run this layer if it were untouched."""
        if not self.dispatches:
            return AttentionBackendName.NATIVE
        active: AttentionBackendName = _AttentionBackendRegistry.get_active_backend()[0]
        return self.backend or active


class Perturber(Protocol):
    """What `guide` puts on a run: it sees the output of each self-attention call, and may return another."""

    run: Run

    def perturb(self, out: Tensor, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int) -> Tensor:
        """`out` [B, H, N, D], or what replaces it."""

    def unhook(self) -> None:
        """Take its hooks off the model."""


class Addition(Protocol):
    """What is put on a transformer beside sparse attention; a call takes it off."""

    @property
    def note(self) -> str:
        """What the user should know about the latest run; empty if there is nothing."""

    def begin(self, ahead: Ahead) -> None:
        """A forward pass begins."""

    def reset(self) -> None:
        """Forget the current run."""

    def __call__(self) -> None:
        """Take it off."""


class Run(ModelHook):  # type: ignore[misc]
    """All that one applied transformer remembers; as a stateful hook of Diffusers it receives context and reset.

    Attributes:
        grid: of the forward pass that is under way.
        begun: what the ops of a compiled pass wait for.
        hooks: on the model's forward passes.
        guidance: head perturbation, if any.
        guidance_only: made for guidance alone, and removed with it.
        extra_pass: the moment of an extra pass for guidance, which the clock doesn't count.
        added: what was put on with it: a step cache.
        replaced: another run took its place on the model.
        made_registry: the model had none for hooks before.
    """

    _is_stateful = True

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        strategy: Strategy,
        schedule: Schedule,
        strict: bool,
        pipe: DiffusionPipeline | None,
    ) -> None:
        super().__init__()
        self.name, self.spec, self.strategy, self.schedule, self.strict = name, spec, strategy, schedule, strict
        self.context = Context()
        self.clock = Clock(pipe, self.context)
        self.grid: Grid | None = None
        self.begun = compiled.scalar(0)
        self.layers: list[Layer] = []
        self._memories: dict[tuple[Hashable, int, int], dict[str, Any]] = {}
        self._shapes: OrderedDict[Hashable, int] = OrderedDict()  # of the memories, by the pass that used them
        self._known: dict[Hashable, Collection[int] | None] = {}
        self.ledger = Ledger(memories=self._memories)
        self._masks = Masks()
        self._run, self._warned, self._recognised, self._takes_turns = -1, False, False, False
        self.hooks: list[RemovableHandle] = []
        self.shard = WHOLE
        self.guidance: Perturber | None = None
        self.guidance_only = False
        self.extra_pass: Moment | None = None
        self.added: Addition | None = None
        self.replaced = False
        self.made_registry = False

    # --- the state of a run -----------------------------------------------------------------------------------------

    def add_layer(self, name: str) -> Layer:
        """The layer for the attention module `name`."""
        self.layers.append(Layer(name, len(self.layers), self))
        return self.layers[-1]

    def begin_compiled(self, geometry: Geometry) -> None:
        """A forward pass begins, within the graph that is being traced: its grid is read when the graph runs."""
        self.begun = compiled.begin(self.layers[0].handle, geometry)

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
        self._known.clear()

    def begin_pass(self, caches: Callable[[], list[StepCache | None]]) -> None:
        """A forward pass begins, with the step caches that its layers are behind."""
        if self.added is not None and self.extra_pass is None:
            self.added.begin(self.clock.ahead())
        for layer, cache in zip(self.layers, caches(), strict=True):
            layer.cache = cache
        self._begin_pass()

    def _begin_pass(self) -> None:
        extra = self.extra_pass
        self.ledger.begin_pass(self.context.name if extra is None else extra.branch, extra is not None)

    def _open(self, layer: Layer, moment: Moment) -> CallRecord:
        """Begin the record of a call; in a new run nothing of the last one is left."""
        if moment.run != self._run:
            self._forget()
            self._run, self.ledger = moment.run, Ledger(memories=self._memories, length=moment.steps)
            self._begin_pass()
            pipe = self.clock.pipe
            self._takes_turns = pipe is not None and len(entrances_of(pipe)) > 1
            if moment.steps is None and (unknown := self.schedule.of_unknown_length()):
                self.ledger.note(unknown)
        record = self.ledger.open(
            layer.name, moment.step, moment.branch, None if layer.cache is None else layer.cache.name
        )
        if layer.cache is not None:
            self.ledger.cache_is_wide = layer.cache.is_wide
        record.note = "" if self.grid is None else self.grid.note
        self._bound(moment)
        return record

    def _bound(self, moment: Moment) -> None:
        """A loop may have no end: keep the records of a few passes, or of the whole run if its length is known."""
        passes = _KEPT_PASSES if moment.steps is None else moment.steps * _MOST_BRANCHES
        self.ledger.bound(max(passes * len(self.layers), 1))

    def _memory(self, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int) -> dict[str, Any]:
        """What this layer remembers in this branch, for sequences of this shape.

        A few shapes are remembered at once, and all that the last passes had: each sample may have one of its own.
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

    def _to_skip(self, layer: Layer, moment: Moment, tally: Tally, end: int | None) -> int:
        """How many of the steps to come before `end` a step cache will answer in place of this layer."""
        if end is None:
            return 0
        known = None if layer.cache is None else self._executed(layer.cache, moment, tally.first)
        if known is None or moment.step not in known:
            return tally.to_skip(end)
        return max(end - 1 - moment.step, 0) - sum(moment.step < step < end for step in known)

    def _executed(self, cache: StepCache, moment: Moment, first: int) -> Collection[int] | None:
        """The steps that a cache, which counts from the step `first`, leaves to layers behind it; asked once a run."""
        branches = self.ledger.beside(moment.branch) if cache.counts_branches else [moment.branch]
        key = cache, len(branches), branches.index(moment.branch), first
        if key not in self._known:
            timesteps = self.clock.timesteps if cache.counts_branches else None
            timesteps = timesteps if timesteps and cache.reads(timesteps[moment.step]) else None
            passes = Passes((moment.steps or 0) - first, *key[1:3], timesteps and timesteps[first:])
            steps = cache.executed(passes)
            self._known[key] = None if steps is None else frozenset(first + step for step in steps)
        return self._known[key]

    # --- what went another way --------------------------------------------------------------------------------------

    def warn_if_unused(self, model: str) -> None:
        """Warn, once, that a whole forward pass had no attention that could be made sparse."""
        if self._warned or self._recognised:
            return
        self._warned = True
        reason = (
            f"{model} ran, but none of its attention was recognised as self-attention over its latents, so nothing is "
            "sparse: the order of its tokens is not known (see diffsparse.seam.models.SPECS)"
        )
        if self.strict:
            raise DenseFallbackError(f"{reason}; apply with strict=False to allow it")
        warnings.warn(reason, UserWarning, stacklevel=2)

    def note_unseen(self, layer: Layer, reason: str) -> None:
        """Report a self-attention call that did not come through `attend`."""
        moment = self.extra_pass or self.clock.read(layer)
        self._open(layer, moment).ran_dense(reason, planned=False, backend="unknown")
        if self.strict:
            raise DenseFallbackError.of(layer.name, moment.step, reason, ran=True)

    # --- one call ---------------------------------------------------------------------------------------------------

    def attend(self, layer: Layer, call: Call, layout: Layout, number: int = 0, obstacle: str | None = None) -> Tensor:
        """One self-attention call: dense where the schedule or the call itself demands it, else the strategy's.

        Args:
            layer: where it is.
            call: the product.
            layout: of its tokens.
            number: of the product within one processor call.
            obstacle: why no strategy can compute it, if the sizes say so.
        """
        self._recognised = self._recognised or obstacle is None
        moment = self.extra_pass or self.clock.read(layer, number, (call.query.shape, layout))
        with _isolated(call.query.device.type):
            out = self._attend(layer, call, layout, moment, number, obstacle)
            if self.guidance is None or obstacle:
                return out
            return self.guidance.perturb(out, layer, call, layout, moment, number)

    def _attend(
        self, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int, obstacle: str | None
    ) -> Tensor:
        record = self._open(layer, moment)
        with record.timed(call.query.device):
            mask, obstacle = None, obstacle or call.obstacle
            if call.attn_mask is not None and not obstacle:
                place, now = (layer.index, number, moment.branch), (moment.run, moment.step, moment.branch)
                mask, obstacle = self._masks.read(call.attn_mask, len(call.query), layout, place, now)
            call = call if obstacle else call.ungrouped()
            tally = self.ledger.tallies[layer.name, moment.branch]
            site = self._site(layer, call, layout, moment, number, record, mask, tally)
            if obstacle:
                return site.fall_back(call.query, call.key, call.value, obstacle)
            out = self._choose(layer, call, site, moment)
            if mask is None or record.kind == "dense":
                return out
            return mask.repair(out, call, layout, layer.user_backend())

    def _choose(self, layer: Layer, call: Call, site: Site, moment: Moment) -> Tensor:
        """The strategy's answer, or dense attention where the schedule, the model or the kernels leave no choice."""
        q, k, v = call.query, call.key, call.value
        method = self._method(layer, moment)
        if method is None:
            return site.dense(q, k, v, reason="schedule")
        if self.grid is not None and not self.grid.known and self.strategy.wants_grid:
            return site.fall_back(q, k, v, "no geometry")
        if _OBSTACLE in site.memory:
            return site.fall_back(q, k, v, site.memory[_OBSTACLE])
        try:
            return in_order(self.strategy, method, (q, k, v), site)
        except NoKernelError as error:  # the same in all steps, so nothing is moved for it again
            site.memory[_OBSTACLE] = error.reason
            return site.fall_back(q, k, v, error.reason)

    def _method(self, layer: Layer, now: Moment) -> Method | None:
        """What the schedule wants of a call; None: dense attention, and nothing learned from it."""
        tally = self.ledger.tallies[layer.name, now.branch]
        first, end = self.schedule.bounds(now.steps, layer.warm_up)
        if (end is not None and now.step >= end) or self.schedule.excludes(layer.index, len(self.layers)):
            return None
        early = now.step < first
        tally.was_dense = tally.was_dense or early
        if early:  # a step cache may skip the steps between; one that decides as it goes may not, after all
            teaches = self._to_skip(layer, now, tally, first) == first - 1 - now.step
        else:
            teaches = tally.was_dense and tally.taught in (None, now.step)
        if teaches and self.strategy.observes:
            tally.taught = now.step
            return self.strategy.observe
        return None if early else self.strategy.attend

    def _site(
        self,
        layer: Layer,
        call: Call,
        layout: Layout,
        moment: Moment,
        number: int,
        record: CallRecord,
        mask: KeyMask | None,
        tally: Tally,
    ) -> Site:
        backend, to_skip = layer.user_backend(), self._to_skip(layer, moment, tally, moment.steps)
        end = self.schedule.bounds(moment.steps)[1]
        before_end = to_skip if end == moment.steps else self._to_skip(layer, moment, tally, end)
        reached = None if end is None else end - tally.skipped - before_end

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return replace(call, query=q, key=k, value=v).dense(backend)

        return Site(
            model=self.name,
            layer=layer.name,
            index=layer.index,
            step=moment.step,
            steps=moment.steps,
            end=None if self._takes_turns else reached,
            branch=moment.branch,
            layout=layout,
            layers=len(self.layers),
            shard=self.shard,
            skipped=tally.skipped,
            to_skip=to_skip,
            memory=self._memory(layer, call, layout, moment, number),
            dense_backend=DenseBackend(backend.value, dense),
            record=record,
            scale=call.scale,
            key_mask=None if mask is None else mask.keys,
            strict=self.strict,
        )


def _isolated(device: str) -> ExitStack:
    """Within: autocast and default device of the caller don't change what kernels and strategies compute."""
    stack = ExitStack()
    if autocasts(device):
        stack.enter_context(torch.autocast(device, enabled=False))
    if torch.get_default_device().type != "cpu":
        stack.enter_context(torch.device("cpu"))
    return stack
