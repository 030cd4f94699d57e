"""Drive an offline search over runs of a pipeline; what it has added up is on disk after each run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from diffsparse.errors import ConfigError, PlanError
from diffsparse.orders.layout import Layout
from diffsparse.plans.plan import Plan, fingerprints
from diffsparse.plans.sealed import Values
from diffsparse.plans.store import Store
from diffsparse.plans.sums import Sums
from diffsparse.schedule import Schedule
from diffsparse.seam.parallel import check_alone
from diffsparse.seam.patch import apply
from diffsparse.seam.targets import models_of
from diffsparse.strategies.search import Search

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def calibrate(
    pipe: DiffusionPipeline | nn.Module,
    search: Search,
    calls: Sequence[Callable[[], object]],
    names: Sequence[str],
    out: str | Path,
    after_run: Callable[[int], object] = lambda done: None,
) -> Plan:
    """Run `calls` under each pass of `search`, and write the plan to `out`.

    A search that was stopped goes on after the last run that it finished, and ends with the same plan.

    Args:
        pipe: a Diffusers pipeline, or a transformer.
        search: such as `PAROSearch(sparsity=0.8)`.
        calls: functions that run `pipe` once, each with its own prompt and seed, always in the same way.
        names: identify the calls; a search is only continued with the same ones.
        out: a `.safetensors` file; the work so far is kept beside it until the plan is written.
        after_run: called with the number of runs that are done, at first those of an earlier attempt.

    Raises:
        ConfigError: no calls, or the file beside `out` is of another search.
        OutputFileError: `out` can't be written, or another process is at it.
        PlanError: the calls differ in size, or the pipeline never attended.
        UnsupportedModelError: this process sees only some of the heads.

    Examples:
        >>> from diffsparse import PARO, PAROSearch, apply, calibrate
        >>> prompts = ["a red ball", "a quiet sea"]
        >>> calls = [lambda prompt=prompt: pipe(prompt, generator=torch.manual_seed(0)) for prompt in prompts]
        >>> plan = calibrate(pipe, PAROSearch(sparsity=0.8), calls, prompts, folder / "plan.safetensors")
        >>> with apply(pipe, PARO(plan)):
        ...     video = calls[0]().frames[0]
    """
    if not calls or len(calls) != len(names):
        raise ConfigError(f"a search wants one or more calls, each with a name; got {len(calls)} and {len(names)}")
    check_alone(models_of(pipe))
    models = fingerprints(models_of(pipe))
    store = Store.beside(out, "search", [repr(search), models, list(names)], tensors=True)
    progress, runs = _Progress(), search.passes * len(calls)
    with store.resumed(progress.restore, lambda: f"{progress.done} of {runs} runs"):
        after_run(progress.done)
        for number in range(progress.done, runs):
            turn, call = divmod(number, len(calls))
            with apply(pipe, search.watcher(turn, progress.sums), schedule=Schedule(dense_first=0)):
                calls[call]()
            progress.done = number + 1
            store.save(progress.values(), progress.sums.tensors)
            after_run(progress.done)
        if progress.sums.layout is None:
            raise PlanError("the runs held no self-attention over a token grid; there is nothing to plan")
        settings, tensors = search.plan(progress.sums)
        plan = Plan(search.strategy, models, progress.sums.layout, settings, tensors)
        plan.save(out)
    return plan


@dataclass
class _Progress:
    """Where a search stands: how many runs are done, and what they add up to."""

    done: int = 0
    sums: Sums = field(default_factory=Sums)

    def values(self) -> Values:
        """What is kept beside the sums."""
        layout = self.sums.layout
        return {"done": self.done, "layout": None if layout is None else asdict(layout)}

    def restore(self, values: Values, tensors: dict[str, Tensor]) -> None:
        """Take over what an earlier attempt has kept."""
        layout = values["layout"]
        self.done, self.sums = values["done"], Sums(tensors, None if layout is None else Layout.of(layout))
