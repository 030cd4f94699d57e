"""Run strategies beside dense attention, of the same prompt and seed, in one process; go on where a run stopped."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffsparse
from diffsparse import Dense, Handle, Preset, Schedule
from diffsparse.errors import ConfigError, InputFileError
from diffsparse.files import folder, locked, read_bytes, write_json
from diffsparse.strategies import SEARCHES, Compensated, name_of
from diffsparse.strategies.planned import Planned
from diffsparse_eval import environment, metrics
from diffsparse_pipelines import media
from diffsparse_pipelines.generation import Generation, generation

if TYPE_CHECKING:
    from rich.progress import Progress

RESULTS = "results.json"
_KEY = ("prompt", "seed", "arguments")  # tells the runs of an experiment apart
_LONGEST = 120  # letters of a file's name
_HEADS = "+heads"  # after the name of a strategy that runs under head guidance
Row = dict[str, Any]


@dataclass(frozen=True)
class Guided:
    """A strategy, and head guidance on top of it."""

    strategy: Any
    preset: Preset

    @property
    def sparsity(self) -> float | None:
        """That of the strategy."""
        sparsity: float | None = getattr(self.strategy, "sparsity", 0.0)
        return sparsity


@contextmanager
def put_on(pipe: Any, strategy: Any, schedule: Schedule, strict: bool = False) -> Iterator[Handle]:
    """Within: `pipe` runs by a strategy or by a `Guided` one."""
    with ExitStack() as stack:
        inner = strategy.strategy if isinstance(strategy, Guided) else strategy
        handle = stack.enter_context(diffsparse.apply(pipe, inner, schedule=schedule, strict=strict))
        if isinstance(strategy, Guided):
            stack.enter_context(diffsparse.guide(pipe, strategy.preset))
        yield handle


@dataclass(frozen=True)
class Experiment:
    """What is compared.

    model: a name for the rows. arguments: of the pipeline call, without prompt. schedule: of the sparse runs.
    """

    model: str
    strategies: tuple[Any, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    arguments: dict[str, Any]
    schedule: Schedule = field(default_factory=Schedule)
    strict: bool = False
    fps: int = 16

    def settings(self, pipe: Any) -> dict[str, Any]:
        """All that decides the rows, as plain values: results of other settings are never mixed."""
        weights = pipe.transformer
        return {
            "model": self.model,
            "arguments": self.arguments,
            "schedule": repr(self.schedule),
            "strict": self.strict,
            "device": environment.device_name(weights.device),
            "dtype": str(weights.dtype).removeprefix("torch."),
            "versions": environment.versions(),
        }

    def jobs(self) -> list[tuple[str, int, list[Any]]]:
        """Prompt, seed and strategies in the order of running; `Dense()` on the first gives the noise floor."""
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        first = [s for s in self.strategies if s != Dense()]
        return [(*pair, [Dense(), *first] if i == 0 else list(self.strategies)) for i, pair in enumerate(pairs)]


class Results:
    """The rows of one experiment and the folder they live in: `results.json` is whole after each row.

    Several processes may add rows of one experiment to a folder at the same time.
    """

    def __init__(self, out: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.out, self.settings, self.rows = folder(out), settings, []
        self.path = self.out / RESULTS
        if overwrite and self.path.exists():
            with locked(self.path):
                self._write()
        self.rows = self._read()  # files are whole at any time

    rows: list[Row]

    def kept(self) -> str:
        """What a run that is stopped leaves behind."""
        rows = "1 row is" if len(self.rows) == 1 else f"{len(self.rows)} rows are"
        return f"{rows} in {self.path}; the same command goes on with the next"

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        try:
            kept = json.loads(read_bytes(self.path, most=2**30))
            settings, rows = kept["settings"], kept["rows"]
            if not all(isinstance(row, dict) and row.keys() >= set(_KEY) for row in rows):
                raise ValueError(f"rows without {', '.join(_KEY)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputFileError(
                f"can't read {self.path}: {error!r}; choose another --out or use --overwrite"
            ) from error
        changed = [key for key, value in self.settings.items() if settings.get(key) != _plain(value)]
        if changed:
            raise ConfigError(
                f"{self.path} holds results of another experiment (it differs in {', '.join(changed)}); "
                "choose another --out or use --overwrite"
            )
        return list(rows)

    def find(self, prompt: str, seed: int, strategy: Any) -> Row | None:
        """The row of a run that is done."""
        wanted = (prompt, seed, repr(strategy))
        return next((row for row in self.rows if _key(row) == wanted), None)

    def add(self, row: Row) -> None:
        """Keep a row, on disk too, beside those that other processes have added meanwhile."""
        with locked(self.path):
            self.rows = list({_key(known): known for known in [*self._read(), *self.rows, row]}.values())
            self._write()

    def _write(self) -> None:
        kept = {"settings": self.settings, "definitions": metrics.DEFINITIONS, "rows": self.rows}
        write_json(kept, self.path)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def run(experiment: Experiment, pipe: Any, results: Results, progress: Progress) -> Iterator[Row]:
    """Yield each new row when its run is done; rows that `results` has are not run again."""
    jobs = experiment.jobs()
    total = sum(1 + len(strategies) for _, _, strategies in jobs)
    task = progress.add_task("runs", total=total)
    warm = False
    for number, (prompt, seed, strategies) in enumerate(jobs):
        missing = [s for s in strategies if results.find(prompt, seed, s) is None]
        progress.advance(task, len(strategies) - len(missing))
        if not missing:
            progress.advance(task)
            continue
        if not warm:
            warm = True
            _warm_up(experiment, pipe, prompt, missing, progress)
        call = {**experiment.arguments, "prompt": prompt}
        dense = generation(pipe, call, seed, progress)
        progress.advance(task)
        which = hashlib.sha256(prompt.encode()).hexdigest()[:6]  # other prompts may share the folder
        run_name = f"p{number // len(experiment.seeds):02}-{which}-s{seed}"
        dense_file = _save(experiment, results.out, f"dense {run_name}", dense)
        for strategy in missing:
            row, sparse = _row(experiment, pipe, call, seed, strategy, dense, progress)
            again = strategy == Dense()
            row["file"] = dense_file if again else _save(experiment, results.out, f"{row['label']} {run_name}", sparse)
            _compare_attention(row, results.rows)
            results.add(row)
            progress.advance(task)
            yield row


def _warm_up(experiment: Experiment, pipe: Any, prompt: str, strategies: list[Any], progress: Progress) -> None:
    """Two steps each, one dense and one sparse: kernels are built and memory is there before anything is timed."""
    call = {**experiment.arguments, "prompt": prompt, "num_inference_steps": 2}
    generation(pipe, call, 0, progress)
    for strategy in strategies:
        with put_on(pipe, strategy, Schedule(dense_first=1)):
            generation(pipe, call, 0, progress)


def _row(
    experiment: Experiment,
    pipe: Any,
    call: dict[str, Any],
    seed: int,
    strategy: Any,
    dense: Generation,
    progress: Progress,
) -> tuple[Row, Generation]:
    with put_on(pipe, strategy, experiment.schedule, experiment.strict) as handle:
        sparse = generation(pipe, call, seed, progress)
    report = handle.report()
    frames, height, width = sparse.frames.shape[:3]
    row = {
        "model": experiment.model,
        "strategy": _name(strategy),
        "label": label(strategy),
        "arguments": repr(strategy),
        "sparsity": getattr(strategy, "sparsity", 0.0),
        "density": report.density,
        "work": report.work,
        "sparse_density": report.sparse_density,
        "steps": report.steps,
        "dense_steps": report.dense_steps,
        "psnr_db": _finite(metrics.psnr_db(dense.frames, sparse.frames)),
        "psnr_db_min": _finite(metrics.psnr_db_min(dense.frames, sparse.frames)),
        "ssim": metrics.ssim(dense.frames, sparse.frames),
        "latent_cosine": metrics.latent_cosine(dense.latents, sparse.latents),
        "dense_seconds": dense.seconds,
        "seconds": sparse.seconds,
        "speedup": dense.seconds / sparse.seconds,
        "attention_seconds": report.attention_seconds,
        "attention_share": None,
        "attention_speedup": None,
        "recall": report.recall,
        "memory_bytes": report.memory_bytes,
        "modes": report.modes,
        "heads": report.heads,
        "fallbacks": report.fallbacks,
        "backends": report.backends,
        "dense_backend": dense_backend(report),
        "device": environment.device_name(pipe.transformer.device),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "prompt": call["prompt"],
        "seed": seed,
        "size": f"{width}x{height}x{frames}",
        "schedule": repr(experiment.schedule),
    }
    return row, sparse


def _name(strategy: Any) -> str:
    return f"{name_of(strategy.strategy)}{_HEADS}" if isinstance(strategy, Guided) else name_of(strategy)


def label(strategy: Any) -> str:
    """Name, sparsity and what else differs from the defaults: `adaspa 0.8 order=tile4x4x4`, `random 0.8 +means`."""
    if isinstance(strategy, Compensated):
        return f"{label(strategy.strategy)} +{strategy.by}"
    if isinstance(strategy, Guided):
        preset = strategy.preset
        return f"{label(strategy.strategy)} {_HEADS} {preset.strength:g}x{preset.scale:g}"
    parts = [name_of(strategy)]
    for name, value, default in _knobs(strategy):
        if value is None:
            continue
        if name == "sparsity":
            parts.append(f"{value:g}")
        elif value != default:
            parts.append(f"{name}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(parts)


def _knobs(strategy: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of what was chosen; for a strategy that runs on a plan, in the search that made it."""
    if isinstance(strategy, Planned):
        settings = strategy.plan.settings
        for knob in fields(SEARCHES[strategy.plan.strategy]):
            value = settings.get(knob.name, _default(knob))
            yield knob.name, tuple(value) if isinstance(value, list) else value, _default(knob)
    else:
        for knob in fields(strategy):
            yield knob.name, getattr(strategy, knob.name), _default(knob)


def _default(knob: Field[Any]) -> Any:
    return knob.default if knob.default_factory is MISSING else knob.default_factory()


def _compare_attention(row: Row, earlier: list[Row]) -> None:
    """Fill in share and speed-up of attention from the run with `Dense()`, which has timed every dense product."""
    dense = next((r for r in [*earlier, row] if r["strategy"] == "dense"), None)
    if dense and row["attention_seconds"]:
        row["attention_share"] = dense["attention_seconds"] / dense["seconds"]
        row["attention_speedup"] = dense["attention_seconds"] / row["attention_seconds"]


def dense_backend(report: diffsparse.Report) -> str:
    """The user's own, on which the dense calls of a report ran."""
    return ", ".join(dict.fromkeys(call.backend for call in report.calls if call.kind == "dense")) or "native"


def _save(experiment: Experiment, out: Path, stem: str, result: Generation) -> str:
    """Write the frames under a name that every file system takes; returns it."""
    name = re.sub(r"[^\w.=-]+", "-", stem)
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    name += ".png" if len(result.frames) == 1 else ".mp4"
    media.save(result.frames, out / name, experiment.fps)
    return name


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
