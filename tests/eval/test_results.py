"""The rows of an experiment on disk: by two processes at once, under a kill, on a full disk, after Ctrl-C."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffsparse_eval.attention as attention_module
import diffsparse_eval.commands.bench as bench_module
import diffsparse_eval.experiment as experiment_module
from diffsparse import Dense, Preset, Random
from diffsparse.errors import ConfigError, InputFileError
from diffsparse_eval import report, stack
from diffsparse_eval.compared import Guided
from diffsparse_eval.experiment import RESULTS, Experiment, Results, run
from diffsparse_eval.gpu import table
from diffsparse_eval.rows import SCHEMA, check_schema
from diffsparse_pipelines import generation
from diffsparse_pipelines.generation import Generation
from support.stops import full_disk, interrupted, status

SETTINGS = {"model": "tiny"}
EVALUATE = ["evaluate", "--model", "tiny-twin", "--steps", "2", "--strategy", "random", "--prompts", "1"]
FORK = multiprocessing.get_context("fork")  # with all that is imported: the children only add rows
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def row(seed: int = 0, strategy: Any = None, prompt: str = "a") -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, "arguments": repr(strategy or Dense()), "strategy": "dense"}


def adding(out: Path, prompt: str, rows: int) -> tuple[Any, Any]:
    """A process that adds rows, and how many it has added."""
    done = FORK.Value("i", 0)

    def add() -> None:
        results = Results(out, SETTINGS)
        for number in range(rows):
            results.add(row(number, prompt=prompt))
            done.value = number + 1

    child = FORK.Process(target=add)
    child.start()
    return child, done


def rows_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / RESULTS).read_text())["rows"]
    return found


def test_rows_are_found_by_prompt_seed_and_strategy(tmp_path: Path) -> None:
    results = Results(tmp_path, SETTINGS)
    results.add(row(0))
    for seed, strategy, prompt, there in (
        (0, Dense(), "a", 1),
        (1, Dense(), "a", 0),
        (0, Random(), "a", 0),
        (0, Dense(), "b", 0),
    ):
        assert (results.find(prompt, seed, strategy) is not None) == bool(there)


def test_a_second_seed_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one experiment, and in one that goes on with more seeds: each has rows and files of its own."""
    frames = Generation(np.zeros((1, 8, 8, 3), np.float32), None, 1.0)
    ran: list[int] = []

    def fake(experiment: Any, pipe: Any, strategy: Any, reference: Any, *_: Any) -> tuple[dict[str, Any], Any]:
        ran.append(reference.seed)
        return {**row(reference.seed, strategy[0], reference.prompt), "label": "x", "attention_seconds": None}, frames

    monkeypatch.setattr(experiment_module, "generation", lambda *_: frames)
    monkeypatch.setattr(experiment_module, "_warm_up", lambda *given: {s: s for s in given[2]})
    monkeypatch.setattr(experiment_module, "_compare", fake)

    class Silent:
        def add_task(self, *_: Any, **__: Any) -> None: ...
        def advance(self, *_: Any) -> None: ...

    for seeds, wanted in (((0, 1), [0, 0, 1]), ((0, 1, 2), [2])):
        ran.clear()
        experiment = Experiment("tiny", (Random(),), ("a",), seeds, {})
        results = Results(tmp_path, SETTINGS)
        list(run(experiment, None, results, Silent()))  # type: ignore[arg-type]
        assert ran == wanted
    files = {(r["seed"], r["file"]) for r in rows_of(tmp_path)}
    assert len({name for _, name in files}) == len(files) == 4  # dense and random on the first
    assert all((tmp_path / name).exists() for _, name in files)


def test_two_processes_lose_no_row(tmp_path: Path) -> None:
    children = [adding(tmp_path, prompt, 10)[0] for prompt in "ab"]
    for child in children:
        child.join()
        assert child.exitcode == 0
    found = sorted((r["prompt"], r["seed"]) for r in rows_of(tmp_path))
    assert found == [(prompt, seed) for prompt in "ab" for seed in range(10)]


def test_a_kill_loses_at_most_the_row_in_work(tmp_path: Path) -> None:
    for turn in range(3):
        out = tmp_path / str(turn)
        child, done = adding(out, "a", 10_000)
        while done.value < 3:
            assert child.is_alive()
            time.sleep(0.002 * turn)
        child.kill()
        child.join()
        seeds = [r["seed"] for r in rows_of(out)]
        assert seeds == list(range(len(seeds)))
        assert len(seeds) - done.value in (0, 1)  # written, and perhaps not yet counted
        again = Results(out, SETTINGS)  # the dead process holds no lock
        again.add(row(-1))
        assert len(rows_of(out)) == len(seeds) + 1


def test_rows_of_other_experiments_and_overwriting(tmp_path: Path) -> None:
    first, second = Results(tmp_path, SETTINGS), Results(tmp_path, {"model": "wan"})
    first.add(row(0))
    with pytest.raises(ConfigError, match="holds results of another experiment"):
        second.add(row(1))
    assert [r["seed"] for r in rows_of(tmp_path)] == [0]
    both = [Results(tmp_path, SETTINGS, overwrite=True) for _ in range(2)]
    assert rows_of(tmp_path) == []
    for seed, results in enumerate(both):
        results.add(row(seed))
    assert [r["seed"] for r in rows_of(tmp_path)] == [0, 1]
    assert both[1].find("a", 0, Dense()) is not None, "what the other process did is not done again"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"settings": {}, "rows": [3]}', '{"settings": 1, "rows": [{}]}', "[" * 10**5]
)
def test_results_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(InputFileError, match="choose another --out or use --overwrite"):
        Results(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("read", "remedy"),
    [
        (lambda file: Results(file.parent, SETTINGS), "choose another --out or use --overwrite"),
        (stack.read, "wanted a results.json of `diffsparse evaluate`"),
    ],
)
def test_what_is_wrong_with_results_is_said_once(read: Callable[[Path], object], remedy: str, tmp_path: Path) -> None:
    file = tmp_path / RESULTS
    file.mkdir()
    with pytest.raises(InputFileError) as told:
        read(file)
    file.rmdir()
    file.write_text("{}")
    with pytest.raises(InputFileError) as malformed:
        read(file)
    assert str(told.value) == f"can't read {file}: Is a directory; {remedy}"
    wanted = rf"can't read {re.escape(str(file))}: it has no entry '\w+'; {re.escape(remedy)}"
    assert re.fullmatch(wanted, str(malformed.value))


def test_files_without_a_schema_go_on_and_those_of_later_releases_are_refused(tmp_path: Path) -> None:
    file = tmp_path / RESULTS
    old = {"settings": SETTINGS, "definitions": {}, "rows": [row(0)]}
    file.write_text(json.dumps(old))
    results = Results(tmp_path, SETTINGS)
    assert results.find("a", 0, Dense()) == row(0)
    results.add(row(1))
    kept = json.loads(file.read_text())
    assert (kept["schema"], kept["rows"]) == (SCHEMA, [row(0), row(1)])
    assert Results(tmp_path, SETTINGS).rows == kept["rows"]
    for schema in (SCHEMA + 1, 0, "1"):
        file.write_text(json.dumps({**old, "schema": schema}))
        with pytest.raises(InputFileError, match=f"this release reads up to {SCHEMA}"):
            Results(tmp_path, SETTINGS)


def test_guided_rows_without_a_schema_are_found_by_todays_names(tmp_path: Path) -> None:
    compared = Guided(Dense(), Preset(("0.0",), head_strength=0.5, head_scale=2.0, rescale=0.1))
    old = row(0, compared)
    old["arguments"] = old["arguments"].replace("head_s", "s")
    assert " strength=0.5, scale=2.0" in old["arguments"]
    (tmp_path / RESULTS).write_text(json.dumps({"settings": SETTINGS, "definitions": {}, "rows": [old]}))
    assert Results(tmp_path, SETTINGS).find("a", 0, compared) == row(0, compared)


def test_committed_rows_of_earlier_releases_are_read() -> None:
    folder = Path(__file__).parents[2] / "eval/results"
    kept = json.loads((folder / "tiny-sparse-vdit.json").read_text())
    check_schema(kept)
    lines = report.markdown(kept["rows"]).splitlines()
    assert len(lines) == 2 + len({row["label"] for row in kept["rows"]})
    assert all(row.keys() >= {"stage", "kernel", "verdict"} for rows in table.read().values() for row in rows)


def test_long_labels_are_names_of_files_too(tmp_path: Path) -> None:
    experiment = Experiment("tiny", (), (), (), {})
    frames = Generation(np.zeros((1, 8, 8, 3), np.float32), None, 1.0)
    stems = [f"paro orders={'tile4x8x8+' * 40}{end} p00-s0" for end in "ab"]
    found = [experiment_module._save(experiment, tmp_path, stem, frames) for stem in stems]
    assert len(set(found)) == 2
    assert sorted(found) == sorted(p.name for p in tmp_path.iterdir())


def test_a_stopped_evaluation_on_a_full_disk_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = experiment_module.generation
    monkeypatch.setattr(experiment_module, "generation", interrupted(real, 5))  # warm-ups, dense, its row, and no more
    assert status([*EVALUATE, "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert said == f"stopped: 1 row is in {tmp_path / RESULTS}; the same command goes on with the next\n"
    monkeypatch.setattr(experiment_module, "generation", real)
    before = (tmp_path / RESULTS).read_bytes()
    with full_disk(1000):
        assert status([*EVALUATE, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: can't write ")
    assert said.count("\n") == 1
    assert (tmp_path / RESULTS).read_bytes() == before
    assert status([*EVALUATE, "--out", str(tmp_path)]) == 0
    assert [r["strategy"] for r in rows_of(tmp_path)] == ["dense", "random"]


@pytest.mark.parametrize(
    ("command", "name"),
    [("evaluate", "results.csv"), ("evaluate", "sheet.png"), ("inspect", "recall.png"), ("bench", "rows.csv")],
)
def test_a_folder_in_a_files_place_is_seen_before_any_work(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    out = tmp_path / name if command == "bench" else tmp_path
    assert status([command, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"{name}: a folder has that name" in said
    assert said.count("\n") == 1


def test_a_stopped_inspection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "generation", interrupted(generation.generation, 0))
    command = ["inspect", "--model", "tiny-twin", "--steps", "3", "--block", "16", "--out", str(tmp_path)]
    assert status(command) == 130
    assert capsys.readouterr().err == "stopped: nothing was written\n"
    monkeypatch.undo()
    monkeypatch.setattr(attention_module, "write", interrupted(lambda: None, 0))
    assert status(command) == 130
    assert capsys.readouterr().err == f"stopped: what is drawn so far is in {tmp_path}\n"


def test_a_stopped_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    command = [
        "bench",
        "--tokens",
        "64,128",
        "--dtype",
        "float32",
        "--block",
        "64",
        "--head-dim",
        "16",
        "--rounds",
        "1",
    ]
    real = bench_module.measure
    for calls, kept in ((0, "no row is kept"), (1, f"rows are in {out}")):
        monkeypatch.setattr(bench_module, "measure", interrupted(real, calls))
        assert status([*command, "--device", "cpu", "--out", str(out)]) == 130
        assert kept in capsys.readouterr().err
    assert "tokens" in out.read_text()
