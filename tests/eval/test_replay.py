"""The inspect command on attention that it has recorded itself: from the twin to the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse import Layout, Random, Recording
from diffsparse.cli import main
from diffsparse.errors import ConfigError
from diffsparse.insight.recording import RecordedCall
from diffsparse.site.place import Place
from diffsparse.strategies import STRATEGIES, as_strategy
from diffsparse_eval import replay
from diffsparse_pipelines.progress import bar, terminal

RECORD = ["inspect", "--model", "tiny-twin", "--steps", "3", "--looks", "1"]


def call(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "a.safetensors"
    call([*RECORD, "--layers", "1,4", "--heads", "1", "--record", str(path)])
    return path


def test_a_recording_of_the_twin(file: Path) -> None:
    recording = Recording.load(file)
    assert [(one.number, one.place.step) for one in recording.calls] == [(1, 1), (4, 1), (1, 2), (4, 2)]
    assert {one.heads for one in recording.calls} == {(1,)}
    assert recording.about["model"] == "tiny-twin"
    assert {"device", "dtype", "versions", "commit"} <= recording.about.keys()


def test_the_size_is_told_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.safetensors"
    call([*RECORD, "--record", str(file), "--most-gib", "0.001"], code=2)
    assert "the recording would take 0.0 GiB, and 0.001 GiB are allowed" in capsys.readouterr().err
    assert not file.exists()
    call([*RECORD, "--layers", "0", "--record", str(file)])
    printed = capsys.readouterr().out
    assert "the recording will take 0.8 MiB at most" in printed
    assert "2 calls, 0.8 MiB" in printed.replace("\n", " ")


def test_what_each_method_makes_of_it(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(["inspect", "--replay", str(file), "--block", "16", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    free = ["adaspa", "digest", "dit-fast", "gna", "pisa", "random", "sol", "svg-ear", "tangent", "adaspa+means"]
    for name in free:
        assert f"\n{name} " in printed
    assert "tiny-twin, 9x8x8 = 576 tokens" in printed
    found = json.loads((tmp_path / "replay.json").read_text())
    assert found["steps"] == [2, 3]
    assert found["heads"] == [1]
    rows = found["rows"]
    assert [(row["strategy"], row["sparsity"]) for row in rows][: len(free)] == [(name, 0.9) for name in free]
    assert len(rows) == 3 * len(free)
    for row in rows:
        assert row["calls"] == 2
        assert row["error_db"] > 0
        assert 0 < row["work"] < 0.5
        shares = list(row["residual_mean"].values())
        assert shares == sorted(shares)
        assert all(worst <= mean <= 1 for worst, mean in zip(row["residual_worst"].values(), shares, strict=True))
    random = [row["error_db"] for row in rows if row["strategy"] == "random"]
    assert random == sorted(random), "less is dropped, more is right"


def test_dense_attention_is_exact_and_has_no_residual(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(["inspect", "--replay", str(file), "--strategy", "dense", "--out", str(tmp_path)])
    assert "dense   exact  1.000" in capsys.readouterr().out
    row, *_ = json.loads((tmp_path / "replay.json").read_text())["rows"]
    assert (row["error_db"], row["work"], row["residual_mean"]) == (None, 1.0, {})


def test_all_that_want_no_plan_are_tried() -> None:
    assert replay.methods().split(",") == [
        *(name for name in STRATEGIES if name not in ("dense", "paro", "sparse-vdit")),
        "adaspa+means",
    ]


def recording(tokens: int, steps: tuple[int, ...] = (0, 1)) -> Recording:
    layout = Layout(1, 1, tokens)
    places = [Place("transformer", "blocks.0", 0, step, 9, "", layout) for step in steps]
    return Recording(
        tuple(RecordedCall(place, 0, (0,), 1, None, *torch.randn(3, 1, 1, tokens, 8).bfloat16()) for place in places)
    )


def replayed(made: Recording, *strategies: Any) -> list[Any]:
    with bar(terminal()) as progress:
        return replay.replay(
            made, [(0.8, strategy) for strategy in strategies], progress, device="cpu", dtype=torch.float32
        )


class Refuses:
    """A strategy that can't do this."""

    def attend(self, q: Any, k: Any, v: Any, site: Any) -> Any:
        raise ConfigError("not here")


def test_who_cannot_run_says_so_and_others_do() -> None:
    refused, ran = replayed(recording(99), as_strategy(Refuses()), Random(0.8, block=8))
    assert (refused["refused"], refused["work"], refused["error_db"]) == ("not here", None, None)
    assert list(replay.notes([refused, ran])) == ["refuses: not here"]
    assert ran["refused"] == ""
    assert ran["error_db"] is not None


def test_fall_backs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 0.01)
    (row,) = replayed(recording(99), Random(0.8, block=8))
    assert row["work"] == 1
    assert list(replay.notes([row])) == [
        "random 0.8 block=8: 1 of 1 calls ran dense: density above the break-even of 0.01"
    ]


def test_errors_are_averaged_by_their_squares() -> None:
    made = recording(99, (0, 1, 2))
    (row,) = replayed(made, Random(0.8, block=8))
    parts = [replayed(Recording(made.calls[i : i + 2]), Random(0.8, block=8))[0] for i in (0, 1)]
    mean = sum(10 ** (-part["error_db"] / 10) for part in parts) / 2
    assert 10 ** (-row["error_db"] / 10) == pytest.approx(mean, rel=1e-5)


# --- what is refused ------------------------------------------------------------------------------------------------


BAD = {
    "nothing to do": ([], "inspect wants --out FOLDER for its pictures, or --record FILE, or --replay FILE"),
    "no file": (["--replay", "none.safetensors"], "can't read the recording none.safetensors: No such file"),
    "not such a file": (["--replay", "text.txt"], "can't read the recording text.txt"),
    "a model to replay": (["--replay", "a", "--model", "wan2.1-14b"], "--replay takes no --model; leave that out"),
    "steps to replay": (["--replay", "a", "--steps", "3"], "--replay takes no sizes, steps and guidance"),
    "sparsity to replay": (["--replay", "a", "--sparsity", "0.5"], "--replay takes no --sparsity"),
    "looks to replay": (
        ["--replay", "a", "--looks", "3", "--seed", "1"],
        "--replay takes no --seed, --layers, --looks, --orders;",
    ),
    "both": (["--replay", "a", "--record", "b"], "--replay takes no --record"),
    "a knob that none has": (["--replay", "a", "--strategy", "random", "--searches", "2"], "takes no --searches"),
    "strategy to record": (["--record", "a", "--strategy", "digest"], "--record takes no --strategy"),
    "pictures of a recording": (
        ["--record", "a", "--out", "b", "--sparsity", "0.5"],
        "--record takes no --out, knobs of a strategy",
    ),
    "prompts to record": (["--record", "a", "--prompts", "2"], "--record wants one prompt; got 2"),
    "heads": (["--record", "a", "--heads", "-1"], "--heads wants whole numbers from 0"),
    "heads to draw": (["--out", "a", "--heads", "1"], "--out takes no options of --record"),
    "no such head": ([*RECORD[1:], "--record", "a", "--heads", "7"], "heads want to be some of 0 to"),
    "no such layer": ([*RECORD[1:], "--record", "a", "--layers", "9"], "layers want to be some of 0 to 5; got 9"),
    "one step": (["--model", "tiny-twin", "--steps", "1", "--record", "a"], "a run of at least 2; got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("hello")
    arguments, message = BAD[name]
    call(["inspect", *arguments], code=2)
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["text.txt"]


@pytest.mark.parametrize(("made", "message"), [((99, (0, 2)), "two consecutive steps"), ((99, (0, 1)), "too few")])
def test_recordings_that_serve_nothing(
    made: tuple[int, tuple[int, ...]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording(*made).save(tmp_path / "a.safetensors")
    call(["inspect", "--replay", str(tmp_path / "a.safetensors"), "--block", "64"], code=2)
    assert message in capsys.readouterr().err
