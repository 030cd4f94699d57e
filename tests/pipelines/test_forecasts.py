"""Whole runs by the model of time, against the committed rows of a GPU; and the command that shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffsparse import AdaSpa, Compensated, Dense, Schedule
from diffsparse.cli import main
from diffsparse.errors import ConfigError
from diffsparse.insight.device import H100_UNFUSED
from diffsparse_pipelines.commands.forecasts import Foretold, foretell, on_device
from diffsparse_pipelines.tables import significant

ROWS = Path(__file__).parents[2] / "eval" / "results" / "gpu"
SIZES = {"wan2.1-1.3b": (480, 832, 81), "hunyuan-video": (720, 1280, 129)}


def measured(model: str, strategy: str) -> dict[str, float]:
    """The last committed row of a whole run."""
    lines = [line for file in sorted(ROWS.glob("h100-*.jsonl")) for line in file.read_text().splitlines()]
    found = [row for row in map(json.loads, lines) if row["stage"] == "end to end" and row["verdict"] == "timed"]
    return [row for row in found if (row["shape"], row["kernel"]) == (model, strategy)][-1]


def foretold(model: str, strategy: Dense | AdaSpa | Compensated) -> Foretold:
    height, width, frames = SIZES[model]
    size = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": 50}
    [found] = foretell(model, size, H100_UNFUSED, [strategy], [Schedule()])  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("model", "off"), [("wan2.1-1.3b", 0.10), ("hunyuan-video", 0.05)])
@pytest.mark.parametrize("strategy", [Dense(), AdaSpa(0.8, block=128)], ids=["dense", "adaspa"])
def test_runs_take_what_was_measured(model: str, off: float, strategy: Dense | AdaSpa) -> None:
    """The rest of HunyuanVideo runs at 327 TFLOP/s and is the model's; that of Wan 1.3B runs at 290."""
    row, found = measured(model, type(strategy).__name__.lower()), foretold(model, strategy).run
    assert found.seconds == pytest.approx(row["seconds"], rel=off)
    assert found.dense_seconds == pytest.approx(row["dense_seconds"], rel=off)
    assert found.attention_speedup == pytest.approx(row["attention_speedup"], rel=off)


def test_an_unknown_time_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adaspa\+tail can't be told beforehand"):
        foretold("wan2.1-1.3b", Compensated(AdaSpa(), "tail"))


def test_strategies_get_the_blocks_of_the_device() -> None:
    digest, adaspa, means = on_device(("digest", "adaspa", "adaspa+means"), H100_UNFUSED, sparsity=0.5)
    assert digest.block == (128, 64)
    assert adaspa.block == means.block == 128
    assert digest.sparsity == adaspa.sparsity == 0.5
    assert [one.block for one in on_device(("digest", "random"), H100_UNFUSED, block=64)] == [64, 64]


def test_the_command_names_each_rate(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["simulate", "--model", "wan2.1-14b", "--device", "h100"]
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--json"])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert [(row["strategy"], row["dense_first"]) for row in found["rows"]] == [
        (name, first) for name in ("digest", "tangent", "adaspa") for first in (0.2, 0.1)
    ]
    assert all(bool(rate["measured"]) != bool(rate["assumed"]) for rate in found["rates"])
    sparse = [piece for piece in found["pieces"] if (piece["strategy"], piece["step"]) == ("tangent", "sparse")]
    assert {"blocks", "mean keys", "routing", "tokens moved"} <= {piece["name"] for piece in sparse}
    assert found["run"] == {
        "width": 1280,
        "height": 720,
        "frames": 81,
        "windows": 1,
        "window": 81,
        "tokens": 75_600,
        "steps": 50,
        "passes": 2,
    }
    with pytest.raises(SystemExit):
        main([*asked, "--strategy", "random", "--dense-first", "0.2", "--pieces"])
    printed = capsys.readouterr().out
    assert "assumed: in the loop of the blocks" in printed
    assert "measured: h100-2026-11-27: speed" in printed


def test_whole_runs_come_first_and_show_the_share_of_attention(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["simulate", "--model", "wan2.1-14b", "--device", "h100", "--pieces"])
    printed = capsys.readouterr().out
    whole, pieces, rates = printed.split("\n\n")
    assert whole.startswith("wan2.1-14b on h100, by a model of time\n1280x720 pixels, 81 frames; ")
    assert pieces.startswith("a layer, one sample\n")
    assert rates.startswith("rates that it rests on\n")
    assert "\nnot shown at this width: beside blocks\n" in whole  # of the share of attention it is not said
    assert "in the dense steps of these runs" in " ".join(whole.split())
    assert "--pieces" not in printed
    assert max(map(len, whole.splitlines())) <= 80


@pytest.mark.parametrize(
    ("model", "made"),
    [
        (
            "framepack",
            "1280x720 pixels, 129 frames in 4 windows of 33; 32,400 tokens and 50 steps a window, one pass a step",
        ),
        ("sd3.5", "1024x1024 pixels; 4,096 tokens and 28 steps, two passes a step (guidance)"),
        ("z-image-turbo", "1024x1024 pixels; 4,096 tokens and 8 steps, one pass a step"),
    ],
)
def test_a_run_says_what_it_makes_and_little_more(model: str, made: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--model", model, "--device", "h100", "--dense-first", "0.2"])
    lines = capsys.readouterr().out.splitlines()
    assert made in " ".join(lines)
    assert lines[-1] == "what each step does, and the rates that it rests on: --pieces"
    assert len(lines) < 18


def test_seconds_have_three_digits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--model", "z-image-turbo", "--device", "h100", "--strategy", "digest", "--dense-first", "2"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("digest")]
    dense, run = line.split()[2:4]
    assert (len(dense), len(run)) == (4, 4)
    assert f"{float(dense) / float(run):.2f}x" in line.split()
    assert [significant(value) for value in (0.0123, 1.4321, 24.96, 99.96, 1567.8)] == [
        *("0.0123", "1.43", "25.0", "100", "1,568")
    ]


def test_a_run_of_few_steps_is_foretold_as_it_would_be_generated(capsys: pytest.CaptureFixture[str]) -> None:
    """With the mild sparsity of models that were distilled to few steps, unless one is given."""

    def told(*options: str) -> str:
        with pytest.raises(SystemExit):
            main(["simulate", "--model", "wan2.2-lightning", "--device", "h100", "--strategy", "tangent", *options])
        return capsys.readouterr().out

    assert told() == told("--sparsity", "0.6") != told("--sparsity", "0.8")
