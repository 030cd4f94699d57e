"""Fidelity and speed of strategies beside dense attention, with videos, tables and a report."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from diffsparse.files import if_stopped, writable
from diffsparse_eval import pictures, report
from diffsparse_eval.experiment import Experiment, Results, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline
    from rich.progress import Progress

    from diffsparse_eval.rows import ResultRow

TABLES = ("results.json", "results.csv", "report.md")
FILES = (*TABLES, "sheet.png", "tradeoff.png")  # and a video for each row


def evaluate(
    pipe: DiffusionPipeline,
    experiment: Experiment,
    out: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[ResultRow]:
    """Compare strategies with dense attention, and write the results into a folder.

    Each prompt and seed runs dense and with each strategy in this process; the first runs dense twice, which gives the
    noise floor. An evaluation that was interrupted goes on where it stopped.

    Args:
        pipe: the model, loaded.
        experiment: strategies, prompts, seeds, and how to call the pipeline.
        out: folder for `FILES` and the videos.
        progress: a running display, which gets a task for the runs.
        overwrite: drop results that the folder holds.
        say: takes a line when the evaluation goes on with earlier rows, and one for each run.

    Returns:
        All rows of the experiment, in the order of running.

    Raises:
        ConfigError: the folder holds results of another experiment, or the pipeline refused the call.
        InputFileError: the folder's `results.json` can't be read.
        OutputFileError: a file can't be written.
        DenseFallbackError: a call fell back to dense under `strict`.

    Examples:
        >>> experiment = Experiment("tiny", (AdaSpa(0.8), Digest(0.8)), ("a cat",), (0,), call)  # doctest: +SKIP
        >>> rows = evaluate(pipe, experiment, Path("out"), progress)  # doctest: +SKIP
    """
    check_packages()
    check_files(out, FILES)
    results: Results[ResultRow] = Results(out, experiment.settings(pipe), overwrite)
    if results.rows:
        say(f"going on with {len(results.rows)} rows of {results.path}; --overwrite measures anew")
    with if_stopped(results.kept):
        for row in run(experiment, pipe, results, progress, say):
            say(_line(row, experiment.told(row["prompt"], row["seed"])))
    wanted = [results.find(prompt, seed, s) for prompt, seed, listed in experiment.jobs() for s in listed]
    rows = [row for row in wanted if row is not None]
    report.write(rows, out)
    pictures.write_sheet(rows, experiment.prompts[0], experiment.seeds[0], out)
    pictures.write_tradeoff(rows, out)
    return rows


def check_packages() -> None:
    """Raise ModuleNotFoundError, before any work, if what computes and draws the results is not installed."""
    for name in ("matplotlib", "scipy", "skimage"):
        import_module(name)


def check_files(out: Path, names: tuple[str, ...]) -> None:
    """Raise OutputFileError if one of the files can't be written, before any work."""
    for name in names:
        writable(out / name)


def _line(row: ResultRow, which: str) -> str:
    name = "dense again" if row["strategy"] == "dense" else row["label"]
    psnr = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
    return f"{name}, {which}: {psnr}, {row['seconds']:.1f} s, {row['speedup']:.2f}x"
