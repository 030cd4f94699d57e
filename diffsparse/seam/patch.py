"""Put on, take off: `apply` runs the attention of transformers by a strategy, `remove` gives them back as they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.nn import Module

from diffsparse.errors import ConfigError, DiffsparseError
from diffsparse.schedule import Schedule
from diffsparse.seam.hooks import install, run_of, uninstall
from diffsparse.seam.models import spec_of
from diffsparse.seam.parallel import shard_of
from diffsparse.seam.run import Addition, Perturber, Run
from diffsparse.seam.targets import controlnets_of, models_of, notes_on
from diffsparse.site.report import Report
from diffsparse.strategies.base import Attending, Strategy, as_strategy
from diffsparse.strategies.dense import Dense
from diffsparse.wrappers import unwrapped

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LATER = "apply or accelerate"


def replaced_by(later: str) -> str:
    """The note of a report whose handle a later call has replaced."""
    return f"replaced by a later {later}: the numbers are of the last run before that"


def warn_replaced(what: str, later: str) -> None:
    """Warn at the end of a `with` block, whose `__exit__` calls this, that a later call had replaced its handle."""
    warnings.warn(
        f"{what} was replaced by a later {later} within its block and not put back: what ran after that ran without "
        "it. Leave one block before you enter the next",
        UserWarning,
        stacklevel=3,
    )


class Handle:
    """What `apply` gives back: `report()` says what happened, `remove()` or leaving a `with` block undoes it.

    Attributes:
        strategy (Strategy): what was applied, as it was given.
        cache (object): the step cache that was put on with it; None if there is none.
    """

    cache: object = None

    def __init__(
        self, strategy: Strategy | Attending, models: dict[str, Module], runs: list[Run], notes: tuple[str, ...] = ()
    ) -> None:
        self.strategy = strategy
        self._models, self._runs, self._notes = models, runs, notes

    def report(self) -> Report:
        """Summary of the last (or running) pipeline call; empty before the first.

        Examples:
            >>> from diffsparse import Random, apply
            >>> with apply(pipe, Random(sparsity=0.5, block=4)) as sparse:
            ...     video = pipe("a red ball").frames[0]
            >>> report = sparse.report()
            >>> report.steps, report.dense_steps
            (4, 1)
            >>> report.density < 1
            True
        """
        modules = sum(len(run.layers) for run in self._runs)
        report = Report.of(self.strategy, modules, [run.ledger for run in self._runs])
        own = (run.added.note for run in self._runs if run.added is not None)
        notes = dict.fromkeys([*self._notes, replaced_by(_LATER) * self._is_replaced, *own, *report.notes])
        return replace(report, notes=[note for note in notes if note])

    @property
    def _is_replaced(self) -> bool:
        """Whether a later `apply` or `accelerate` took its place."""
        return any(run.replaced for run in self._runs)

    def note(self, text: str) -> None:
        """Add to the notes of all reports."""
        self._notes = (*self._notes, text)

    def also(self, put_on: Callable[[Module], Addition]) -> None:
        """Put something more on each transformer but controlnets, such as a step cache; it goes with the handle.

        If that fails, the handle is removed.
        """
        try:
            for (name, model), run in zip(self._models.items(), self._runs, strict=True):
                if "controlnet" not in name:
                    run.added = put_on(model)
        except BaseException:
            self.remove()
            raise

    def reset(self) -> None:
        """Forget the current run. Needed only between two runs of a hand-written loop over a transformer."""
        for run in self._runs:
            run.reset_state()
            if run.added is not None:
                run.added.reset()

    def remove(self) -> None:
        """Give every processor, hook and backend back as it was. Removing twice does no harm."""
        for model, run in zip(self._models.values(), self._runs, strict=True):
            if run_of(model) is run:
                uninstall(model)
                if run.guidance is not None:  # guidance stays, on dense attention
                    attach(run.name, model, run.guidance, run.clock.pipe)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.remove()
        if self._is_replaced and kind is None:
            warn_replaced(type(self.strategy).__name__, _LATER)

    def __repr__(self) -> str:
        names = ", ".join(f"{name} ({len(run.layers)})" for name, run in zip(self._models, self._runs, strict=True))
        return f"Handle({self.strategy!r} on attention modules of {names})"


def apply(
    target: DiffusionPipeline | Module,
    strategy: Strategy | Attending,
    *,
    schedule: Schedule | None = None,
    strict: bool = False,
) -> Handle:
    """Run the self-attention of `target` by `strategy` until the handle is removed.

    Nothing of the pipeline's code or weights changes. Applying again replaces the strategy.

    Args:
        target: a Diffusers pipeline (all its transformers are taken, and controlnets made of such blocks), or a
            transformer.
        strategy: any object with `attend(q, k, v, site)`, such as `AdaSpa(sparsity=0.8)`.
        schedule: steps and layers that stay dense; by default the first fifth of the steps.
        strict: raise `DenseFallbackError` where a call that should be sparse would have to run dense.

    Returns:
        The handle, which a `with` block may take; its `report()` says what happened, `remove()` undoes it.

    Raises:
        UnsupportedModelError: `target` holds no attention that can be redirected.
        ConfigError: `strategy` is no strategy, or `schedule` no `Schedule`.

    Examples:
        >>> from diffsparse import AdaSpa, apply
        >>> with apply(pipe, AdaSpa(sparsity=0.8)) as sparse:
        ...     video = pipe("a red ball").frames[0]
        >>> sparse.report().sparse_calls > 0
        True
    """
    asked = as_strategy(strategy)
    if not isinstance(schedule, Schedule | None):
        raise ConfigError(f"schedule wants a Schedule, such as Schedule(dense_first=0.2); got {schedule!r}")
    pipe = None if isinstance(target, Module) else target
    models = models_of(target)
    asked.check(models)
    models |= _served(asked, controlnets_of(target))
    for model in models.values():
        shard_of(model, spec_of(model), not isinstance(strategy, Dense))
    schedule = Schedule() if schedule is None else schedule
    runs = []
    for name, model in models.items():
        guidance = guidance_of(model)
        if (earlier := run_of(model)) is not None:
            earlier.replaced = True
        uninstall(model)
        runs.append(install(name, model, asked, schedule, strict, pipe))
        _set_guidance(runs[-1], guidance)
    return Handle(strategy, models, runs, tuple(notes_on(target)))


def _served(strategy: Strategy, controlnets: dict[str, Module]) -> dict[str, Module]:
    """The controlnets that a strategy is for: a plan may have been made without them."""
    found = {}
    for name, model in controlnets.items():
        with suppress(DiffsparseError):
            strategy.check({name: model})
            found[name] = model
    return found


def remove(target: DiffusionPipeline | Module) -> None:
    """Undo `apply` and `guide`; a model that was never touched stays as it is.

    Args:
        target: a Diffusers pipeline, or a transformer.

    Examples:
        >>> from diffsparse import AdaSpa, apply, remove
        >>> handle = apply(pipe, AdaSpa(sparsity=0.8))
        >>> remove(pipe)  # handle.remove() takes off the strategy alone, and leaves guidance on
    """
    for model in (models_of(target) | controlnets_of(target)).values():
        guidance = guidance_of(model)
        if guidance is not None:
            guidance.unhook()
        uninstall(model)


def attach(name: str, model: Module, guidance: Perturber, pipe: DiffusionPipeline | None) -> None:
    """Put `guidance` on the run of `model`, or on a dense one that is made for it."""
    model = unwrapped(model)
    shard_of(model, spec_of(model), ordered=True)
    run = run_of(model)
    if run is None:
        run = install(name, model, Dense(), Schedule(0), False, pipe)
        run.guidance_only = True
    _set_guidance(run, guidance)


def detach(model: Module, guidance: Perturber) -> None:
    """Undo `attach`, unless other guidance has taken its place."""
    run = run_of(model)
    if run is None or run.guidance is not guidance:
        return
    run.guidance = None
    if run.guidance_only:
        uninstall(unwrapped(model))


def guidance_of(model: Module) -> Perturber | None:
    """The guidance on a transformer, if any."""
    run = run_of(model)
    return None if run is None else run.guidance


def _set_guidance(run: Run, guidance: Perturber | None) -> None:
    run.guidance = guidance
    if guidance is not None:
        guidance.run = run
