"""Run strategies beside dense attention, of the same prompt and seed, in one process; go on where a run stopped."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from diffsparse import Dense, Report, Schedule
from diffsparse.errors import ConfigError, InputFileError
from diffsparse.files import folder, locked, read_bytes, reason, write_json
from diffsparse_eval import environment, metrics
from diffsparse_eval.compared import Compared, applied, label, magnitude_ratios, ready, sparsity_of, strategy_name
from diffsparse_eval.rows import DEFINITIONS, SCHEMA, SCHEMA_KEY, Fidelity, ResultRow, RunRow, check_schema
from diffsparse_pipelines import media
from diffsparse_pipelines.generation import Generation, generation
from diffsparse_pipelines.preflight import argument

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from rich.progress import Progress

RESULTS = "results.json"
WANTED = "wanted a results.json of `diffsparse evaluate`"
_KEY = ("prompt", "seed", "arguments")  # identifies a row
_CALIBRATION_SEED = 2**31 - 1  # no run that is compared has it
_LONGEST = 120  # letters of a file's name
R = TypeVar("R", bound=RunRow)
Settings = Mapping[str, object]


@dataclass(frozen=True)
class Experiment:
    """What is compared.

    Attributes:
        model: a name for the rows.
        strategies: with or without head guidance.
        prompts: what is generated; each strategy runs once for each pair of prompt and seed.
        seeds: of the random numbers.
        arguments: of the pipeline call, without prompt.
        schedule: of the sparse runs.
        strict: fail where a call would fall back to dense.
        fps: frames a second of the videos that are written.
    """

    model: str
    strategies: tuple[Compared, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    arguments: dict[str, object]
    schedule: Schedule = field(default_factory=Schedule)
    strict: bool = False
    fps: int = 16

    def settings(self, pipe: DiffusionPipeline) -> Settings:
        """All that decides the rows, as plain values: results of other settings are never mixed."""
        weights = pipe.transformer
        return {
            "model": self.model,
            "arguments": self.arguments,
            "schedule": repr(self.schedule),
            "strict": self.strict,
            "device": environment.device_name(weights.device),
            "dtype": environment.dtype_name(weights.dtype),
            "versions": environment.versions(),
        }

    def jobs(self) -> list[tuple[str, int, list[Compared]]]:
        """Prompt, seed and strategies in the order of running; `Dense()` on the first gives the noise floor."""
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        first = [strategy for strategy in self.strategies if strategy != Dense()]
        return [(*pair, [Dense(), *first] if i == 0 else list(self.strategies)) for i, pair in enumerate(pairs)]

    def told(self, prompt: str, seed: int) -> str:
        """Which of the prompts it is, and of several seeds which."""
        number = f"prompt {self.prompts.index(prompt) + 1} of {len(self.prompts)}"
        return number if len(self.seeds) == 1 else f"{number}, seed {seed}"


class Results(Generic[R]):
    """The rows of one experiment and their folder: `results.json` is whole after each row.

    Several processes may add rows of one experiment to a folder at the same time.

    Args:
        out: the folder, made if it is missing.
        settings: all that decides the rows; results of other settings are refused.
        overwrite: drop results that the folder holds.

    Attributes:
        path (Path): of `results.json`.
        rows: those that are there.

    Raises:
        InputFileError: the folder's `results.json` can't be read.
        ConfigError: it is another experiment's.
        OutputFileError: the folder can't be written.
    """

    def __init__(self, out: Path, settings: Settings, overwrite: bool = False) -> None:
        self.out, self.settings, self.rows = folder(out), settings, []
        self.path = self.out / RESULTS
        if overwrite and self.path.exists():
            with locked(self.path):
                self._write()
        self.rows = self._read()  # files are whole at any time

    rows: list[R]

    def kept(self) -> str:
        """One line on what a run that is stopped leaves behind."""
        rows = "1 row is" if len(self.rows) == 1 else f"{len(self.rows)} rows are"
        return f"{rows} in {self.path}; the same command goes on with the next"

    def _read(self) -> list[R]:
        if not self.path.exists():
            return []
        try:
            kept = load(self.path, "choose another --out or use --overwrite")
            settings, rows = kept["settings"], kept["rows"]
            if not all(isinstance(row, dict) and row.keys() >= set(_KEY) for row in rows):
                raise ValueError(f"rows without {', '.join(_KEY)}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputFileError(
                f"can't read {self.path}: {reason(error)}; choose another --out or use --overwrite"
            ) from error
        changed = [key for key, value in self.settings.items() if settings.get(key) != _plain(value)]
        if changed:
            raise ConfigError(
                f"{self.path} holds results of another experiment (it differs in {', '.join(changed)}); "
                "choose another --out or use --overwrite"
            )
        return cast(list[R], rows if SCHEMA_KEY in kept else [_renamed(row) for row in rows])

    def find(self, prompt: str, seed: int, strategy: Compared) -> R | None:
        """The row of a run that is done; None if it is not.

        Args:
            prompt: of the run.
            seed: of the run.
            strategy: of the run.
        """
        wanted = (prompt, seed, repr(strategy))
        return next((row for row in self.rows if _key(row) == wanted), None)

    def add(self, row: R) -> None:
        """Keep a row, on disk too, beside those that other processes have added meanwhile."""
        with locked(self.path):
            self.rows = list({_key(known): known for known in [*self._read(), *self.rows, row]}.values())
            self._write()

    def _write(self) -> None:
        kept = {SCHEMA_KEY: SCHEMA, "settings": self.settings, "definitions": DEFINITIONS, "rows": self.rows}
        write_json(kept, self.path)


def load(path: Path, remedy: str = WANTED) -> dict[str, Any]:
    """What a `results.json` holds.

    Args:
        path: of the file.
        remedy: what to do where it can't be read.

    Raises:
        InputFileError: the file can't be read.
        ValueError: it is no JSON, or of a later release.
        TypeError: it holds something else.
    """
    kept: dict[str, Any] = json.loads(read_bytes(path, remedy, most=2**30))
    check_schema(kept)
    return kept


def _renamed(row: dict[str, object]) -> dict[str, object]:
    """A row without a schema: its head guidance has the knobs' names of today, by which it is found."""
    arguments = str(row["arguments"])
    if "Preset(" not in arguments:
        return row
    return {**row, "arguments": re.sub(r"\b(strength|scale)=", r"head_\1=", arguments)}


def _key(row: RunRow) -> tuple[str, int, str]:
    return row["prompt"], row["seed"], row["arguments"]


def run(
    experiment: Experiment,
    pipe: DiffusionPipeline,
    results: Results[ResultRow],
    progress: Progress,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[ResultRow]:
    """Run what is missing in `results`: dense on each prompt and seed, and each strategy beside it.

    Args:
        experiment: what is compared.
        pipe: the model, loaded.
        results: rows that are there are not run again; new ones are added.
        progress: a running display, which gets a task for the runs.
        say: takes a line for each dense run.

    Yields:
        Each new row when its run is done.

    Raises:
        ConfigError: the pipeline refused the call.
        DenseFallbackError: a call fell back under `strict`.
        OutputFileError: a file can't be written.
    """
    jobs = experiment.jobs()
    total = sum(1 + len(strategies) for _, _, strategies in jobs)
    task = progress.add_task("runs", total=total, sure=1 + len(jobs[0][2]))
    prepared: dict[Compared, Compared] = {}
    for number, (prompt, seed, strategies) in enumerate(jobs):
        missing = [strategy for strategy in strategies if results.find(prompt, seed, strategy) is None]
        progress.advance(task, len(strategies) - len(missing))
        if not missing:
            progress.advance(task)
            continue
        if fresh := [strategy for strategy in missing if strategy not in prepared]:
            prepared |= _warm_up(experiment, pipe, fresh, results.rows, progress)
        dense = generation(pipe, {**experiment.arguments, "prompt": prompt}, seed, progress)
        progress.advance(task)
        say(f"dense, {experiment.told(prompt, seed)}: {dense.seconds:.1f} s ({prompt[:60]})")
        run_name = _run_name(number // len(experiment.seeds), prompt, seed)
        dense_file = _save(experiment, results.out, f"dense {run_name}", dense)
        for strategy in missing:
            row, sparse = _compare(
                experiment, pipe, (strategy, prepared[strategy]), _Reference(prompt, seed, dense), progress
            )
            again = strategy == Dense()
            row["file"] = dense_file if again else _save(experiment, results.out, f"{row['label']} {run_name}", sparse)
            _compare_attention(row, results.rows)
            results.add(row)
            progress.advance(task)
            yield row


def _run_name(number: int, prompt: str, seed: int) -> str:
    """Number, prompt and seed in the names of files; other prompts may share the folder."""
    return f"p{number:02}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}-s{seed}"


def _warm_up(
    experiment: Experiment,
    pipe: DiffusionPipeline,
    strategies: Sequence[Compared],
    rows: Iterable[ResultRow],
    progress: Progress,
) -> dict[Compared, Compared]:
    """Two steps each, one dense and one sparse: kernels are built and memory is there before anything is timed.

    Gives the strategies as they can run: some step caches are calibrated, on the first prompt of the folder.
    """
    first = next((row["prompt"] for row in rows), experiment.prompts[0])
    whole = {**experiment.arguments, "prompt": first}
    call = {**whole, "num_inference_steps": 2}
    steps = argument(pipe, whole, "num_inference_steps") or 0
    ratios = cache(lambda: magnitude_ratios(pipe, steps, lambda: generation(pipe, whole, _CALIBRATION_SEED, progress)))
    task = progress.add_task("warming up", total=1 + len(strategies))
    generation(pipe, call, 0, progress)
    progress.advance(task)
    made = {strategy: ready(strategy, steps, ratios) for strategy in strategies}
    for strategy in made.values():
        with applied(pipe, strategy, Schedule(dense_first=1)):
            generation(pipe, call, 0, progress)
        progress.advance(task)
    progress.remove_task(task)
    return made


@dataclass(frozen=True)
class _Reference:
    """The dense run of a prompt and seed, with which strategies are compared."""

    prompt: str
    seed: int
    result: Generation


def _compare(
    experiment: Experiment,
    pipe: DiffusionPipeline,
    strategy: tuple[Compared, Compared],
    reference: _Reference,
    progress: Progress,
) -> tuple[ResultRow, Generation]:
    """Run one strategy, as asked for and as it can run, with the prompt and seed of the reference; compare them."""
    asked, run_as = strategy
    call = {**experiment.arguments, "prompt": reference.prompt}
    with applied(pipe, run_as, experiment.schedule, experiment.strict) as handle:
        sparse = generation(pipe, call, reference.seed, progress)
        report = handle.report()
    return _row(experiment, pipe.transformer, asked, report, reference, sparse), sparse


def _row(
    experiment: Experiment,
    model: ModelMixin,
    strategy: Compared,
    report: Report,
    reference: _Reference,
    sparse: Generation,
) -> ResultRow:
    dense, executed = reference.result, report.executed
    frames, height, width = sparse.frames.shape[:3]
    return {
        "model": experiment.model,
        "strategy": strategy_name(strategy),
        "label": label(strategy),
        "arguments": repr(strategy),
        "sparsity": sparsity_of(strategy),
        "density": report.density * executed,
        "work": report.work * executed,
        "executed": executed,
        "sparse_density": report.sparse_density,
        "steps": report.steps,
        "dense_steps": report.dense_steps,
        **_fidelity(dense, sparse),
        "dense_seconds": dense.seconds,
        "seconds": sparse.seconds,
        "speedup": dense.seconds / sparse.seconds,
        "cpu_speedup": _finite(dense.cpu_seconds / sparse.cpu_seconds),
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
        **environment.origin(model.device, model.dtype),
        "prompt": reference.prompt,
        "seed": reference.seed,
        "size": f"{width}x{height}x{frames}",
        "schedule": repr(experiment.schedule),
        "file": "",  # when it is written
    }


def _fidelity(dense: Generation, sparse: Generation) -> Fidelity:
    return {
        "psnr_db": _finite(metrics.psnr_db(dense.frames, sparse.frames)),
        "psnr_db_min": _finite(metrics.psnr_db_min(dense.frames, sparse.frames)),
        "ssim": metrics.ssim(dense.frames, sparse.frames),
        "latent_cosine": metrics.latent_cosine(dense.latents, sparse.latents),
    }


def _compare_attention(row: ResultRow, earlier: list[ResultRow]) -> None:
    """Fill in share and speed-up of attention from the run with `Dense()`, which has timed every dense product."""
    dense = next((r for r in [*earlier, row] if r["strategy"] == "dense"), None)
    if dense and row["attention_seconds"]:
        row["attention_share"] = dense["attention_seconds"] / dense["seconds"]
        row["attention_speedup"] = dense["attention_seconds"] / row["attention_seconds"]


def dense_backend(report: Report) -> str:
    """The backends on which the dense calls of a report ran, which are the user's own."""
    return ", ".join(dict.fromkeys(call.backend for call in report.calls if call.kind == "dense")) or "native"


def _save(experiment: Experiment, out: Path, stem: str, result: Generation) -> str:
    """Write the frames under a name that every file system takes, and return it."""
    name = re.sub(r"[^\w.=-]+", "-", stem)
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    name += ".png" if len(result.frames) == 1 else ".mp4"
    media.save(result.frames, out / name, experiment.fps)
    return name


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: object) -> object:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))
