"""The guidance of one transformer: hooks around its forward passes, and the perturbation of its attention."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from diffsparse.errors import ConfigError
from diffsparse.guidance.heads import Heads
from diffsparse.guidance.passes import (
    PERTURBED,
    Pass,
    is_uncond,
    own_contexts,
    own_states,
    perturbed_name,
    prediction_of,
    with_prediction,
)
from diffsparse.guidance.perturb import perturbed
from diffsparse.guidance.prefix import Prefix
from diffsparse.guidance.preset import Preset
from diffsparse.orders.layout import Layout
from diffsparse.seam.call import Call
from diffsparse.seam.clock import Moment, set_context
from diffsparse.seam.compiled import untraced
from diffsparse.seam.models import argument_names, spec_of
from diffsparse.seam.run import Layer, Run
from diffsparse.wrappers import class_of

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook
    from diffusers.hooks.hooks import BaseState

    from diffsparse.guidance.passes import Output


@dataclass
class CallTally:
    """What one transformer's guidance did in one pipeline call.

    Attributes:
        passes: extra forward passes.
        blocks_run: blocks computed in them.
        blocks_skipped: blocks that were not.
        perturbed: calls of attention that were perturbed.
        whole: why passes were not shortened, by reason.
        layers: names of those that were perturbed.
        first_step: of the call, as far as it was seen.
        delta: a step, and what is added to its predictions.
        states: of step caches that know no guidance branches, in the extra passes.
        contexts: of step caches that know no guidance branches, in the extra passes.
        cached: a step cache answered the latest conditional pass, which goes unguided.
    """

    passes: int = 0
    blocks_run: int = 0
    blocks_skipped: int = 0
    perturbed: int = 0
    whole: Counter[str] = field(default_factory=Counter)
    layers: set[str] = field(default_factory=set)
    first_step: int | None = None
    delta: tuple[int, Tensor] | None = None
    states: dict[ModelHook, BaseState] = field(default_factory=dict)
    contexts: dict[str, object] = field(default_factory=dict)
    cached: bool = False


class Guide:
    """The guidance of one transformer: hooks around its forward pass, and the perturbation of its attention.

    A step's first conditional pass is run once more with its heads perturbed; the difference goes to that pass and to
    each other pass of the step. Guidance that is linear has weights that add up to one, so the difference comes out of
    it once, at its own scale: u + g (c - u) + s (c - p).
    """

    run: Run

    def __init__(
        self, preset: Preset, model: torch.nn.Module, heads: Heads, reuse: bool, entrance: torch.nn.Module
    ) -> None:
        self.preset, self.heads = preset, heads
        self.busy = False  # in the extra pass
        self.replaced = False  # by later guidance
        self.tally = CallTally()
        self._tally_of: tuple[Run, int] | None = None  # run of a model, and pipeline call
        self._names, self._cond_first = argument_names(model), spec_of(model).cond_first
        self._batch, self._paired = 1, False
        self._timesteps: Tensor | None = None
        self._seen: tuple[Run, int] | None = None  # run of a model, and its passes
        self._hooks: list[RemovableHandle] = []
        self.prefix: Prefix | None = None
        if preset.idle:
            return
        self._hooks.append(entrance.register_forward_pre_hook(self._before, with_kwargs=True))
        self._hooks.append(entrance.register_forward_hook(self._after, with_kwargs=True))
        if reuse and preset.branch == "extra":
            self.prefix = Prefix(model, heads)

    def unhook(self) -> None:
        """Leave the model's forward passes alone from now on."""
        for hook in self._hooks:
            hook.remove()
        if self.prefix is not None:
            self.prefix.unhook()

    # --- attention --------------------------------------------------------------------------------------------------

    def perturb(self, out: Tensor, layer: Layer, call: Call, layout: Layout, moment: Moment, number: int) -> Tensor:
        """The output [B, H, N, D] of a self-attention call, perturbed if its layer is named and it is time to."""
        heads, how = self.heads.get(layer.name), self.preset
        samples = None if heads is None or how.idle else self._samples(call, moment, number)
        if heads is None or samples is None:
            return out
        local, shard = call.query.shape[1], layer.run.shard
        if heads[-1] >= local * shard.degree:
            raise ConfigError(f"{layer.name} runs with {local * shard.degree} heads here; got head {heads[-1]}")
        tally = self._tally(moment)
        tally.layers.add(layer.name)
        tally.perturbed += 1
        return perturbed(
            out,
            call.ungrouped(),
            shard.own_numbers(heads, local),
            layout,
            kind=how.kind,
            strength=how.head_strength,
            text=how.text,
            samples=samples,
        )

    def _samples(self, call: Call, moment: Moment, number: int) -> slice | None:
        """Which samples of the call to perturb; None: not one."""
        if self.preset.branch == "extra":
            return slice(None) if self.busy else None
        if not self.preset.covers(moment.step, moment.steps):
            return None
        if not self._paired:
            return slice(None) if is_uncond(moment.branch) else None
        half, size = self._batch // 2, call.query.shape[0]
        first = half if self._cond_first else 0  # of the unconditional half
        if size % self._batch == 0:  # frames may be folded into the batch
            return slice(first * size // self._batch, (first + half) * size // self._batch)
        return slice(None) if first <= number < first + half else None  # Mochi: one product for each sample

    # --- forward passes ---------------------------------------------------------------------------------------------

    @untraced
    def _before(self, model: torch.nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        if self.busy:
            return
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        latents = inputs.get("hidden_states", inputs.get("x"))
        latents = latents if isinstance(latents, Tensor | list) else None
        batch = 1 if latents is None else len(latents)
        timesteps = getattr(getattr(self.run.clock.pipe, "scheduler", None), "timesteps", None)
        if timesteps is None or timesteps is not self._timesteps or batch != self._batch:
            self._timesteps, self._batch, self._paired = timesteps, batch, self._is_pair(latents, batch)
        if self.prefix is not None:
            self.prefix.begin()

    def _is_pair(self, latents: Tensor | list[Tensor] | None, batch: int) -> bool:
        """Whether the batch is two halves for classifier-free guidance: then both hold the same latents.

        Comparing the values waits for the device: it is done once for a pipeline call.
        """
        if latents is None or batch % 2 or self.run.context.name not in (None, "cond_uncond"):
            return False
        if not getattr(self.run.clock.pipe, "do_classifier_free_guidance", True):
            return False
        half = batch // 2
        return all(torch.equal(latents[i], latents[half + i]) for i in range(half))

    @untraced
    def _after(
        self, model: torch.nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], out: Output
    ) -> Output | None:
        if self.busy:
            return None
        try:
            return self._guided(Pass(model, args, kwargs), out)
        finally:
            if self.prefix is not None:
                self.prefix.end()

    def _guided(self, forward: Pass, out: Output) -> Output | None:
        """The output of a pass that has ended, with what guidance adds to it; None to leave it as it is."""
        moment, seen = self._now(forward.model), (self.run, self.run.clock.passes)
        if seen == self._seen:  # no attention: a step cache had all the answers
            return self._unseen(out, moment)
        self._seen = seen
        tally = self._tally(moment)
        if self.preset.branch == "uncond":
            self._expect_uncond(tally, moment)
            return None
        if not self.preset.covers(moment.step, moment.steps):
            return None
        prediction = prediction_of(out)
        if tally.delta is None or tally.delta[0] != moment.step:
            if is_uncond(moment.branch) and not self._paired:
                if not tally.cached:
                    _warn_of_order(moment.branch)
                return None
            tally.delta, tally.cached = (moment.step, self._difference(forward, prediction, moment)), False
        return _shifted(out, tally.delta[1])

    def _unseen(self, out: Output, latest: Moment) -> Output | None:
        """Of a pass whose answers were cached: linear guidance wants the same difference in all passes of a step."""
        tally = self.tally
        if not is_uncond(self.run.context.name or ""):
            tally.cached = True
        if tally.cached or tally.delta is None or tally.delta[0] != latest.step:
            return None
        return _shifted(out, tally.delta[1])

    def _now(self, model: torch.nn.Module) -> Moment:
        """The moment of the pass that has ended."""
        moment = self.run.clock.now
        if moment is None:
            raise ConfigError(
                f"{class_of(model).__name__} ran, but none of its attention was recognised as self-attention over its "
                "latents, so there is nothing to perturb (see diffsparse.seam.models.SPECS)"
            )
        return moment

    def _tally(self, moment: Moment) -> CallTally:
        if (self.run, moment.run) != self._tally_of:
            self.tally, self._tally_of = CallTally(first_step=moment.step), (self.run, moment.run)
        return self.tally

    def _expect_uncond(self, tally: CallTally, moment: Moment) -> None:
        """Raise ConfigError if a guided step has had no unconditional pass: nothing was perturbed in it."""
        before = moment.step - 1
        if before >= (tally.first_step or 0) and self.preset.covers(before, moment.steps) and not tally.layers:
            raise ConfigError(
                'branch "uncond" perturbs the unconditional pass, and this call has none (guidance off or distilled); '
                'use branch "extra"'
            )

    def _difference(self, forward: Pass, prediction: Tensor, moment: Moment) -> Tensor:
        """What guidance adds to a prediction: head_scale * (c - p), rescaled, for each conditional sample."""
        other = prediction_of(self._extra_pass(forward, moment))
        c, p = self._conditional(prediction), self._conditional(other)
        delta = self.preset.head_scale * (c - p)
        if self.preset.rescale:  # Lin et al. 2023, section 3.4
            over, guided = tuple(range(1, c.ndim)), c + delta
            back = c.std(over, keepdim=True) / guided.std(over, keepdim=True)
            delta = guided * (1 - self.preset.rescale + self.preset.rescale * back) - c
        return delta

    def _conditional(self, x: Tensor) -> Tensor:
        return x.chunk(2)[0 if self._cond_first else 1] if self._paired else x

    def _extra_pass(self, forward: Pass, moment: Moment) -> Output:
        with self._perturbing(forward.model, moment):
            out = forward.again() if self.prefix is None else self._shortened(forward, self.prefix)
        tally = self.tally
        tally.passes += 1
        if tally.passes == 1 and self.heads.keys() - tally.layers:
            missing = ", ".join(sorted(self.heads.keys() - tally.layers))
            raise ConfigError(
                f"{missing} was not perturbed: it is no self-attention over the latents, or did not run. Name heads of "
                "other layers"
            )
        return out

    def _shortened(self, forward: Pass, prefix: Prefix) -> Output:
        """The pass once more, without the blocks ahead of the first perturbed one where they can be skipped."""
        with prefix.replayed() as skipped:
            out = forward.again()
        self.tally.blocks_skipped += skipped
        self.tally.blocks_run += len(prefix.blocks) - skipped
        if prefix.obstacle:
            self.tally.whole[prefix.obstacle] += 1
        return out

    @contextmanager
    def _perturbing(self, model: torch.nn.Module, moment: Moment) -> Iterator[None]:
        """Within: heads are perturbed, the clock stands still, and each cache sees a branch of its own."""
        context = self.run.context.current
        self.busy, self.run.extra_pass = True, moment._replace(branch=moment.branch + PERTURBED)
        if context is not None:
            set_context(model, perturbed_name(context))
        try:
            with own_states(model, self.tally.states), own_contexts(model, self.tally.contexts):
                yield
        finally:
            self.busy, self.run.extra_pass = False, None
            if context is not None:
                set_context(model, context)


def _shifted(out: Output, delta: Tensor) -> Output:
    prediction = prediction_of(out)
    repeats = prediction.shape[0] // delta.shape[0]
    delta = delta.repeat(repeats, *(1 for _ in delta.shape[1:]))
    if prediction.ndim == 3 and prediction.shape[1] != delta.shape[1]:  # after prompts of other lengths: Qwen-Image 2.1
        common = min(prediction.shape[1], delta.shape[1])
        ahead, last = prediction.split([prediction.shape[1] - common, common], 1)
        return with_prediction(out, torch.cat([ahead, last + delta[:, -common:]], 1))
    return with_prediction(out, prediction + delta)


def _warn_of_order(branch: str) -> None:
    warnings.warn(
        f"the pass {branch!r} ran ahead of the conditional one and so goes unguided: guidance comes out multiplied by "
        "the guidance scale. Run the conditional pass first",
        UserWarning,
        stacklevel=3,
    )
