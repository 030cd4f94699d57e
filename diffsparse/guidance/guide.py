"""Head-level perturbation guidance (HeadHunter and SoftPAG, arXiv 2506.10978): `guide` puts it on, its handle off."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, hooks
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.guidance.heads import Heads
from diffsparse.guidance.perturb import perturbed
from diffsparse.guidance.prefix import Prefix
from diffsparse.guidance.preset import Preset
from diffsparse.orders.layout import Layout
from diffsparse.seam.call import Call
from diffsparse.seam.clock import Moment
from diffsparse.seam.hooks import run_of
from diffsparse.seam.models import argument_names, spec_of
from diffsparse.seam.patch import attach, detach
from diffsparse.seam.run import Layer, Run
from diffsparse.seam.targets import entrances_of, models_of

_ASIDE = "+perturbed"  # what the branch of an extra pass is called, after that of the pass it repeats


def guide(
    target: Any,
    heads: Preset | str | Path | Sequence[str],
    *,
    strength: float | None = None,
    scale: float | None = None,
    start: int | float | None = None,
    stop: int | float | None = None,
    rescale: float | None = None,
    kind: str | None = None,
    branch: str | None = None,
    text: bool | None = None,
    reuse: bool = True,
) -> GuideHandle:
    """Guide `target` away from what it draws with some heads perturbed, until the handle is removed.

    Each guided step gives `prediction + scale * (prediction - perturbed prediction)`, beside classifier-free guidance
    of any kind that is linear: in one batch, in one call after the other, distilled, or none. It works on whatever
    attention runs, dense or sparse, put on before or after. Guiding again replaces.

    Args:
        target: a Diffusers pipeline (all its transformers are taken), or a transformer.
        heads: names of heads ("5.3", "12.0-7", "single.4.*", "blocks.5.attn1:3"), a `Preset`, or a preset's file.
        strength, scale, start, stop, rescale, kind, branch, text: overrule the preset's; see `Preset`.
        reuse: don't compute blocks ahead of the first perturbed one a second time; changes no bit.

    Raises:
        UnsupportedModelError: `target` holds no attention that can be redirected.
        ConfigError: a value out of its range. UnknownNameError: no such heads. PlanError: another model's preset.
        InputFileError: the preset can't be read.
    """
    knobs = {"strength": strength, "scale": scale, "start": start, "stop": stop, "rescale": rescale}
    preset = Preset.read(heads, **knobs, kind=kind, branch=branch, text=text)
    pipe = None if isinstance(target, torch.nn.Module) else target
    models = models_of(target)
    chosen, entrances = preset.of(models), entrances_of(target)
    guides = []
    for name, model in models.items():
        earlier = getattr(run_of(model), "guidance", None)
        if earlier is not None:
            earlier.unhook()
        guides.append(Guide(preset, model, chosen[name], reuse, entrances[name]))
        attach(name, model, guides[-1], pipe)
    return GuideHandle(preset, models, guides)


@dataclass(frozen=True)
class GuideReport:
    """What guidance did in the last (or running) pipeline call.

    passes: extra forward passes. blocks_run, blocks_skipped: of those passes. whole: why passes were not shortened,
        by reason. perturbed: calls of attention that were perturbed.
    """

    preset: Preset
    heads: int
    passes: int
    blocks_run: int
    blocks_skipped: int
    whole: dict[str, int]
    perturbed: int

    def __str__(self) -> str:
        share = self.blocks_skipped / max(self.blocks_run + self.blocks_skipped, 1)
        whole = ", ".join(f"{reason} x{count}" for reason, count in self.whole.items())
        rows = [
            ("head guidance", str(self.preset)),
            ("heads", str(self.heads)),
            ("extra passes", f"{self.passes}, blocks re-used {share:.0%}" + (f" (whole: {whole})" if whole else "")),
            ("perturbed", f"{self.perturbed} attention calls"),
        ]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


class GuideHandle:
    """What `guide` gives back: `report()` tells what happened, `remove()` or leaving a `with` block undoes it."""

    def __init__(self, preset: Preset, models: dict[str, torch.nn.Module], guides: list[Guide]) -> None:
        self.preset = preset
        self._models, self._guides = models, guides

    def report(self) -> GuideReport:
        """Summary of the last (or running) pipeline call."""
        tallies = [guide.tally for guide in self._guides]
        return GuideReport(
            self.preset,
            heads=sum(len(heads) for guide in self._guides for heads in guide.heads.values()),
            passes=sum(tally.passes for tally in tallies),
            blocks_run=sum(tally.blocks_run for tally in tallies),
            blocks_skipped=sum(tally.blocks_skipped for tally in tallies),
            whole=dict(sum((tally.whole for tally in tallies), Counter())),
            perturbed=sum(tally.perturbed for tally in tallies),
        )

    def remove(self) -> None:
        """Take the guidance off. Removing twice does no harm."""
        for model, guide in zip(self._models.values(), self._guides, strict=True):
            guide.unhook()
            detach(model, guide)

    def __enter__(self) -> GuideHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"GuideHandle({self.preset!r} on {', '.join(self._models)})"


@dataclass
class _Tally:
    """What one transformer's guidance did in one pipeline call."""

    passes: int = 0
    blocks_run: int = 0
    blocks_skipped: int = 0
    perturbed: int = 0
    whole: Counter[str] = field(default_factory=Counter)
    touched: set[str] = field(default_factory=set)  # layers that were perturbed
    first_step: int | None = None
    delta: tuple[int, Tensor] | None = None  # of a step: what its passes get
    states: dict[Any, Any] = field(default_factory=dict)  # of step caches that know no contexts


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
        self.tally = _Tally()
        self._tally_of: tuple[Any, int] | None = None  # run of a model, and pipeline call
        self._names, self._cond_first = argument_names(model), spec_of(model).cond_first
        self._batch, self._paired = 1, False
        self._timesteps: Any = None
        self._seen: tuple[Any, int] | None = None  # run of a model, and its passes
        self._hooks: list[Any] = []
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
        heads = self.heads.get(layer.name)
        samples = None if heads is None or self.preset.idle else self._samples(call, moment, number)
        if heads is None or samples is None:
            return out
        local, shard = call.query.shape[1], layer.run.shard
        if heads[-1] >= local * shard.degree:
            raise ConfigError(f"{layer.name} runs with {local * shard.degree} heads here; got head {heads[-1]}")
        tally = self._tally(moment)
        tally.touched.add(layer.name)
        tally.perturbed += 1
        how = self.preset
        knobs: dict[str, Any] = {"kind": how.kind, "strength": how.strength, "text": how.text, "samples": samples}
        return perturbed(out, call.ungrouped(), shard.own_numbers(heads, local), layout, **knobs)

    def _samples(self, call: Call, moment: Moment, number: int) -> slice | None:
        """Which samples of the call to perturb; None: not one."""
        if self.preset.branch == "extra":
            return slice(None) if self.busy else None
        if not self.preset.covers(moment.step, moment.steps):
            return None
        if not self._paired:
            return slice(None) if _is_uncond(moment.branch) else None
        half, size = self._batch // 2, call.query.shape[0]
        first = half if self._cond_first else 0  # of the unconditional half
        if size % self._batch == 0:  # frames may be folded into the batch
            return slice(first * size // self._batch, (first + half) * size // self._batch)
        return slice(None) if first <= number < first + half else None  # Mochi: one product for each sample

    # --- forward passes ---------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.busy:
            return
        latents = {**dict(zip(self._names, args, strict=False)), **kwargs}.get(self._names[0])
        batch = len(latents) if torch.is_tensor(latents) or isinstance(latents, list) else 1
        timesteps = getattr(getattr(self.run.clock.pipe, "scheduler", None), "timesteps", None)
        if timesteps is None or timesteps is not self._timesteps or batch != self._batch:
            self._timesteps, self._batch, self._paired = timesteps, batch, self._is_pair(latents, batch)
        if self.prefix is not None:
            self.prefix.begin()

    def _is_pair(self, latents: Any, batch: int) -> bool:
        """Whether the batch is two halves for classifier-free guidance: then both hold the same latents.

        Looking at the values waits for the device: it is done once for a pipeline call.
        """
        context = self.run.context.current
        name = getattr(context, "name", context)
        if batch % 2 or name not in (None, "cond_uncond"):
            return False
        if not getattr(self.run.clock.pipe, "do_classifier_free_guidance", True):
            return False
        half = batch // 2
        return all(torch.equal(latents[i], latents[half + i]) for i in range(half))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if self.busy:
            return None
        try:
            return self._guided(model, args, kwargs, out)
        finally:
            if self.prefix is not None:
                self.prefix.end()

    def _guided(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """The output of a pass that has ended, with what guidance adds to it; None to leave it as it is."""
        moment, seen = self.run.clock.now, (self.run, self.run.clock.passes)
        if moment is None:
            raise ConfigError(
                f"{type(model).__name__} ran, but none of its attention was recognised as self-attention over its "
                "latents, so there is nothing to perturb (see diffsparse.seam.models.SPECS)"
            )
        if seen == self._seen:  # no attention: a step cache had all the answers
            return None
        self._seen = seen
        tally = self._tally(moment)
        if self.preset.branch == "uncond":
            return self._expect_uncond(tally, moment)
        if not self.preset.covers(moment.step, moment.steps):
            return None
        prediction = _first(out)
        if tally.delta is None or tally.delta[0] != moment.step:
            if _is_uncond(moment.branch) and not self._paired:
                _warn_of_order(moment.branch)
                return None
            tally.delta = moment.step, self._difference(model, args, kwargs, prediction, moment)
        delta = tally.delta[1]
        repeats = prediction.shape[0] // delta.shape[0]
        return _with_first(out, prediction + delta.repeat(repeats, *(1 for _ in delta.shape[1:])))

    def _tally(self, moment: Moment) -> _Tally:
        if (self.run, moment.run) != self._tally_of:
            self.tally, self._tally_of = _Tally(first_step=moment.step), (self.run, moment.run)
        return self.tally

    def _expect_uncond(self, tally: _Tally, moment: Moment) -> None:
        """Silence would look like guidance without effect."""
        before = moment.step - 1
        if before >= (tally.first_step or 0) and self.preset.covers(before, moment.steps) and not tally.touched:
            raise ConfigError(
                'branch "uncond" perturbs the unconditional pass, and this call has none (guidance off or distilled); '
                'use branch "extra"'
            )

    def _difference(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], prediction: Tensor, moment: Moment
    ) -> Tensor:
        """What guidance adds to a prediction: scale * (c - p), rescaled, for each conditional sample."""
        other = _first(self._extra_pass(model, args, kwargs, moment))
        c, p = self._conditional(prediction), self._conditional(other)
        delta = self.preset.scale * (c - p)
        if self.preset.rescale:  # Lin et al. 2023, section 3.4
            over, guided = tuple(range(1, c.ndim)), c + delta
            back = c.std(over, keepdim=True) / guided.std(over, keepdim=True)
            delta = guided * (1 - self.preset.rescale + self.preset.rescale * back) - c
        return delta

    def _conditional(self, x: Tensor) -> Tensor:
        return x.chunk(2)[0 if self._cond_first else 1] if self._paired else x

    def _extra_pass(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], moment: Moment) -> Any:
        tally = self.tally
        with self._aside(model, moment):
            if self.prefix is None:
                out = model(*args, **kwargs)
            else:
                with self.prefix.replayed() as skipped:
                    out = model(*args, **kwargs)
                tally.blocks_skipped += skipped
                tally.blocks_run += len(self.prefix.blocks) - skipped
                if self.prefix.obstacle:
                    tally.whole[self.prefix.obstacle] += 1
        tally.passes += 1
        if tally.passes == 1 and self.heads.keys() - tally.touched:
            missing = ", ".join(sorted(self.heads.keys() - tally.touched))
            raise ConfigError(
                f"{missing} was not perturbed: it is no self-attention over the latents, or did not run. Name heads of "
                "other layers"
            )
        return out

    @contextmanager
    def _aside(self, model: torch.nn.Module, moment: Moment) -> Iterator[None]:
        """Within: heads are perturbed, the clock stands still, and each cache sees a branch of its own."""
        context = self.run.context.current
        self.busy, self.run.extra_pass = True, moment._replace(branch=moment.branch + _ASIDE)
        if context is not None:
            _set_context(model, _renamed(context))
        try:
            with _own_states(model, self.tally.states):
                yield
        finally:
            self.busy, self.run.extra_pass = False, None
            if context is not None:
                _set_context(model, context)


def _is_uncond(branch: str) -> bool:
    """Whether a pass that is not in one batch with the conditional one is unconditional: by name, or the second."""
    return branch.startswith(("uncond", "neg")) or (branch.startswith("#") and branch != "#0")


def _warn_of_order(branch: str) -> None:
    warnings.warn(
        f"the pass {branch!r} ran ahead of the conditional one and so goes unguided: guidance comes out multiplied by "
        "the guidance scale. Run the conditional pass first",
        UserWarning,
        stacklevel=3,
    )


def _first(out: Any) -> Tensor:
    """The prediction [B, ...] of a model's output: a tensor, a tuple's or output class's first, a list of samples."""
    x = out[0] if not torch.is_tensor(out) else out
    return torch.stack(tuple(x)) if isinstance(x, list | tuple) else x


def _with_first(out: Any, prediction: Tensor) -> Any:
    """The same output with another prediction."""
    if torch.is_tensor(out):
        return prediction
    value: Any = prediction.unbind(0) if isinstance(out[0], tuple) else prediction
    value = list(prediction.unbind(0)) if isinstance(out[0], list) else value
    if isinstance(out, dict):
        return type(out)(**{**out, next(iter(out)): value})
    return (value, *out[1:])


def _renamed(context: Any) -> Any:
    if isinstance(context, str):
        return context + _ASIDE
    return replace(context, name=context.name + _ASIDE)


def _set_context(model: torch.nn.Module, context: Any) -> None:
    """Tell every step cache which pass this is, as `cache_context` does; from release to release in another way."""
    registry: Any = HookRegistry.check_if_exists_or_initialize(model)
    if hasattr(registry, "_set_context"):  # until 0.41
        registry._set_context(context)
    else:
        hooks._set_cache_context(model, context)


@contextmanager
def _own_states(model: torch.nn.Module, states: dict[Any, Any]) -> Iterator[None]:
    """Within: step caches that know no contexts (PyramidAttentionBroadcast, FasterCache) work on `states`."""
    plain = list(_plain_caches(model)) if getattr(model, "is_cache_enabled", False) else []
    kept = [hook.state for hook in plain]
    for hook in plain:
        hook.state = states.setdefault(hook, type(hook.state)())
    try:
        yield
    finally:
        for hook, state in zip(plain, kept, strict=True):
            hook.state = state


def _plain_caches(model: torch.nn.Module) -> Iterator[Any]:
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            if hook._is_stateful and hasattr(hook, "state"):
                yield hook
