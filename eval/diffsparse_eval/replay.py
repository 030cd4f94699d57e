"""Methods on recorded attention: a recording of a run, and what each method makes of it, as rows and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import diffsparse
from diffsparse import Dense, Schedule
from diffsparse.errors import ConfigError, DiffsparseError
from diffsparse.insight.recording import Recorder, Recording, paired_steps
from diffsparse.insight.replay import RANKS, Attempt, Pair, attempt, check_blocks, exact, pairs
from diffsparse.seam.targets import models_of
from diffsparse.strategies import STRATEGIES, parse
from diffsparse.strategies.planned import Planned
from diffsparse_eval.compared import label, strategy_name
from diffsparse_eval.environment import origin
from diffsparse_eval.rows import ReplayFacts, ReplayRow
from diffsparse_pipelines import generation
from diffsparse_pipelines.preflight import argument

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffsparse.strategies import Strategy
    from diffsparse_pipelines.bars import Bar
    from diffsparse_pipelines.commands.options import SparsityOptions

FILE = "replay.json"
SPARSITIES = (0.9, 0.8, 0.7)
_SHOWN = 0.8  # sparsity whose residual the table shows
HEADINGS = (
    "method",
    *(part for share in SPARSITIES for part in (f"dB, {1 - share:.0%}", "work")),
    f"residual at {1 - _SHOWN:.0%}: % in rank {' '.join(map(str, RANKS))}",
    "in the worst head",
)
SPARE = HEADINGS[-1:]  # goes where the terminal is narrow


def methods() -> str:
    """Names of all strategies that run on any recording, as `diffsparse.strategies.parse` takes them."""
    free = [name for name, cls in STRATEGIES.items() if not issubclass(cls, Planned) and cls is not Dense]
    return ",".join([*free, "adaspa+means"])


def at_each_sparsity(options: SparsityOptions) -> list[tuple[float, Strategy]]:
    """The strategies of `options` at each of `SPARSITIES`; one that has no sparsity is the same at all.

    Raises:
        ConfigError, ...: as `SparsityOptions.strategies`.
    """
    options.strategies()  # refuses knobs that none of them has
    return [(share, made) for share in SPARSITIES for made in parse(options.named, **options.knobs, sparsity=share)]


@dataclass(frozen=True)
class Recorded:
    """What is recorded of a run.

    Attributes:
        pairs: pairs of consecutive steps, evenly spread.
        layers: how many, or which, as `Recorder` takes them.
        heads: likewise.
        most: GiB that it may take.
    """

    pairs: int = 2
    layers: int | tuple[int, ...] = 3
    heads: int | tuple[int, ...] = 2
    most: float = 4.0


def record(
    pipe: DiffusionPipeline,
    prompt: str,
    progress: Bar,
    *,
    arguments: dict[str, object],
    what: Recorded = Recorded(),  # frozen
    seed: int = 0,
    model: str = "",
) -> Recording:
    """Run a pipeline with dense attention, and record some of it.

    Args:
        pipe: the model, loaded.
        prompt: of the run.
        progress: a running display, which gets a task for the steps, and a line on the size of the recording.
        arguments: of the pipeline call, without prompt.
        what: is recorded.
        seed: of the initial noise.
        model: a name, for the recording.

    Raises:
        ConfigError: the number of steps is unknown or too small, there are no such layers or heads, or the recording
            would be too large.
    """
    count = argument(pipe, arguments, "num_inference_steps")
    if count is None:
        raise ConfigError(f"{type(pipe).__name__} has no number of steps of its own; give --steps")

    def announce(size: int) -> None:
        progress.say(f"the recording will take {size / 2**20:.1f} MiB at most")

    recorder = Recorder(
        Dense(),
        paired_steps(count, what.pairs),
        layers=what.layers,
        heads=what.heads,
        most=what.most,
        announce=announce,
    )
    with diffsparse.apply(pipe, recorder, schedule=Schedule(0)):
        generation.generation(pipe, {**arguments, "prompt": prompt}, seed, progress)
    weights = next(next(iter(models_of(pipe).values())).parameters())
    return recorder.recording({"model": model, **origin(weights.device, weights.dtype)})


def replay(
    recording: Recording,
    strategies: Sequence[tuple[float, Strategy]],
    progress: Bar,
    *,
    device: str,
    dtype: torch.dtype,
) -> list[ReplayRow]:
    """Let each strategy attend at the recorded calls, and compare with dense attention in float32.

    Args:
        recording: with pairs of consecutive steps.
        strategies: each with the sparsity that it was asked for.
        progress: a running display, which gets a task for the calls.
        device: where it runs.
        dtype: of the q, k, v that the strategies get.

    Raises:
        ConfigError: no pair of steps was recorded, or its tokens are too few for the strategies' blocks.
    """
    found = pairs(recording)
    check_blocks(found, [strategy for _, strategy in strategies])
    trials = [_Trials(share, strategy) for share, strategy in strategies]
    task = progress.add_task("calls", total=len(found) * len(trials))
    for pair in found:
        dense = exact(pair.second, device)
        for trial in trials:
            trial.run(pair, dense, dtype)
            progress.advance(task)
    return [trial.row(found, device, dtype) for trial in trials]


class _Trials:
    """One strategy at all pairs of calls; at the first that it can't do, it is given up."""

    def __init__(self, sparsity: float, strategy: Strategy) -> None:
        self.sparsity, self.strategy, self.refused = sparsity, strategy, ""
        self.attempts: list[Attempt] = []

    def run(self, pair: Pair, dense: torch.Tensor, dtype: torch.dtype) -> None:
        """Attend once more."""
        if not self.refused:
            try:
                self.attempts.append(attempt(self.strategy, pair, dense, dtype))
            except DiffsparseError as error:
                self.refused = str(error)

    def row(self, found: list[Pair], device: str, dtype: torch.dtype) -> ReplayRow:
        """What came of it."""
        tried = [] if self.refused else self.attempts
        shares = torch.cat([one.spectrum for one in tried]) if tried else torch.zeros(0, len(RANKS))
        shares = shares[~shares.isnan().any(-1)]  # where a residual was
        return {
            "strategy": strategy_name(self.strategy),
            "label": label(self.strategy),
            "arguments": repr(self.strategy),
            "sparsity": self.sparsity,
            "error_db": _decibels([one.error for one in tried]),
            "work": sum(one.work for one in tried) / len(tried) if tried else None,
            "residual_mean": _by_rank(shares.mean(0)) if len(shares) else {},
            "residual_worst": _by_rank(shares.amin(0)) if len(shares) else {},
            "fallbacks": dict(Counter(one.fallback for one in tried if one.fallback)),
            "refused": self.refused,
            "calls": len(found),
            **origin(device, dtype),
        }


def _decibels(errors: Collection[float]) -> float | None:
    """Of relative squared errors, by their mean; None where there is none."""
    mean = sum(errors) / len(errors) if errors else 0.0
    return -10 * torch.tensor(mean).log10().item() if mean else None


def _by_rank(shares: torch.Tensor) -> dict[str, float]:
    return {str(rank): share for rank, share in zip(RANKS, shares.tolist(), strict=True)}


def facts(recording: Recording) -> ReplayFacts:
    """What was recorded."""
    places = [call.place for call in recording.calls]
    return {
        "recorded": recording.about,
        "layout": str(places[0].layout),
        "layers": list(dict.fromkeys(f"{place.model}.{place.layer}" for place in places)),
        "steps": sorted({place.step + 1 for place in places}),
        "run_steps": places[0].steps,
        "heads": sorted({head for call in recording.calls for head in call.heads}),
        "head_dim": recording.calls[0].q.shape[-1],
    }


# --- the table ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[ReplayRow]) -> list[list[str]]:
    """Lines below `HEADINGS`, one a method: error and work at each sparsity, and the spectrum of what is missing."""
    found = {(row["strategy"], row["sparsity"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["strategy"] for row in rows):
        own = [found[name, share] for share in SPARSITIES]
        shown = found[name, _SHOWN]
        spectra = (" ".join(f"{100 * x:.0f}" for x in shown[of].values()) for of in ("residual_mean", "residual_worst"))
        lines.append([name, *(cell for row in own for cell in _cells(row)), *spectra])
    return lines


def _cells(row: ReplayRow) -> tuple[str, str]:
    if row["work"] is None:
        return "-", "-"
    return "exact" if row["error_db"] is None else f"{row['error_db']:.1f}", f"{row['work']:.3f}"


def notes(rows: Sequence[ReplayRow]) -> Iterator[str]:
    """Lines below the table: who ran dense or not at all, and why."""
    for row in rows:
        reasons = [f"{count} of {row['calls']} calls ran dense: {why}" for why, count in row["fallbacks"].items()]
        if reasons or row["refused"]:
            yield f"{row['label']}: {row['refused'] or '; '.join(reasons)}"


def legend(facts: ReplayFacts, rows: Sequence[ReplayRow]) -> str:
    """What the table shows, and where it comes from."""
    row, versions = rows[0], rows[0]["versions"]
    model, steps = facts["recorded"].get("model") or "a model", ", ".join(map(str, facts["steps"]))
    return (
        f"{model}, {facts['layout']}, heads of {facts['head_dim']}; steps {steps} of "
        f"{facts['run_steps'] or 'an unknown number'}; {len(facts['layers'])} layers, {row['calls']} calls\n"
        "dB: -20 log10 |output - dense| / |dense|, by the mean square over calls; work: of a call, in dense passes\n"
        "residual: share of the square of dense less output that the first singular directions hold, mean over heads\n"
        f"{row['device']}, {row['dtype']}, diffsparse {versions.get('diffsparse')} {row['commit'] or ''}, "
        f"torch {versions.get('torch')}"
    )
