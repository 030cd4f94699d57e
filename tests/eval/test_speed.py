"""Speed without weights: which steps are run, how a few blocks stand for all, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse import GNA, AdaSpa, Compensated, Dense, Random, Report, Schedule
from diffsparse.cli import main
from diffsparse.errors import ConfigError
from diffsparse.insight.cost import Flops
from diffsparse_eval import speed, timing
from diffsparse_eval.rows import SpeedRow
from diffsparse_eval.speed import Pass, SpeedTest
from diffsparse_eval.timing import Stopwatch
from diffsparse_pipelines import architectures, machine
from diffsparse_pipelines.architectures import architecture
from support import tiny_transformers

TWIN = SpeedTest("tiny-twin", architecture("tiny-twin"), (9, 32, 32), 50, 2)


def test_one_step_of_each_kind_is_sampled() -> None:
    assert speed.timed_steps(TWIN, AdaSpa()) == {"search": 9, "sparse": 10, "refresh": 29}
    assert speed.timed_steps(TWIN, Dense()) == {"dense": 0}
    assert speed.timed_steps(replace(TWIN, schedule=Schedule(0)), Random()) == {"sparse": 0}
    tailed = speed.timed_steps(TWIN, Compensated(AdaSpa(), "tail"))
    assert tailed == {"search": 9, "tail": 10, "sparse": 11, "refresh": 29}
    assert speed.count_passes(TWIN, [AdaSpa(), Random()]) == 4 * (1 + 3 + 1)


def test_a_run_is_extrapolated_by_its_schedule() -> None:
    """40 % of a pass outside of attention; dense attention 6 s, search 9 s, refresh 4 s, sparse 1 s."""
    seconds = {"dense": 6.0, "search": 9.0, "refresh": 4.0, "sparse": 1.0}
    typical: Any = {kind: Pass(x, 4.0, 0.2 if kind in ("sparse", "refresh") else 1.0) for kind, x in seconds.items()}
    empty = Report.of(AdaSpa(), 0, [])
    row = speed._row(TWIN, AdaSpa(), typical, empty, Flops((6.0,), 4.0))
    attention = 9 * 6 + 9 + 4 + 39 * 1
    assert row["attention_seconds"] == 2 * attention
    assert row["seconds"] == 2 * (attention + 50 * 4)
    assert row["dense_seconds"] == 2 * 50 * 10
    assert row["speedup"] == pytest.approx(500 / (attention + 200))
    assert row["attention_speedup"] == pytest.approx(300 / attention)
    assert row["attention_share"] == 0.6
    assert row["density"] == pytest.approx((10 + 40 * 0.2) / 50)
    assert row["sparse_step_seconds"] == 2 * 5
    assert row["expected_speedup"] == pytest.approx(1 / (0.4 + 0.6 * 19 / 50))
    unknown = speed._row(TWIN, GNA((2, 2, 2)), typical, empty, Flops((6.0,), 4.0))
    assert unknown["expected_speedup"] is None
    assert speed._cell(unknown, "expected_speedup") == "unknown"
    assert set(speed.COLUMNS) - set(speed._columns([row, unknown])) == {"tail_step_seconds"}


def test_a_few_blocks_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which only blocks take time: 2 s for each double block, 3 s for each single one, 1 s for the rest."""
    now = [0.0]
    monkeypatch.setattr(timing, "mark", lambda _: now[0])
    config = {**tiny_transformers.FLUX, "guidance_embeds": True, "pooled_projection_dim": 8}
    known = replace(architecture("tiny"), transformer="FluxTransformer2DModel")
    known = replace(known, config={**config, "num_layers": 4, "num_single_layers": 6})
    model = known.build(2)
    for blocks, seconds in ((model.transformer_blocks, 2.0), (model.single_transformer_blocks, 3.0)):
        for block in blocks:
            block.register_forward_hook(lambda *_, seconds=seconds: now.__setitem__(0, now[0] + seconds))
    watch = Stopwatch(model, known.build(device="meta"))
    arguments = architectures.inputs(model, (1, 8, 8), 6)

    def forward() -> None:
        now[0] += 1
        with torch.no_grad():
            model(**arguments)

    assert watch.factors == {"transformer_blocks": 2.0, "single_transformer_blocks": 3.0}
    assert watch.time(forward) == 1 + 4 * 2 + 6 * 3


COMMAND = ["evaluate", "--model", "tiny-twin", "--random-weights", "--layers", "2", "--block", "16", "--searches", "6"]
COMMAND += ["--strategy", "adaspa,random", "--steps", "10"]


def call(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


def test_the_command_writes_rows_without_fidelity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call([*COMMAND, "--out", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "tiny-twin with random weights: speed only" in printed
    assert "2 blocks of each kind timed and scaled to all" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["strategy"] for row in rows] == ["dense", "adaspa", "random"]
    for row in rows:
        assert row.keys() == SpeedRow.__required_keys__ | SpeedRow.__optional_keys__
        assert (row["weights"], row["psnr_db"], row["ssim"], row["recall"]) == ("random", None, None, None)
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert 0 < row["attention_share"] < 1
        assert row["expected_speedup"] > 0
        assert (row["steps"], row["size"], row["layers"]) == (10, "32x32x9", 2)
    dense, adaspa, random = rows
    assert dense["speedup"] == 1
    assert adaspa["refresh_step_seconds"] > 0
    assert random["refresh_step_seconds"] is None
    assert adaspa["density"] == pytest.approx((2 + 8 * adaspa["sparse_density"]) / 10, abs=1e-6)
    assert adaspa["work"] == pytest.approx(adaspa["density"] + 2 * 0.5 / 10), "two mass passes"
    assert (dense["work"], random["work"]) == (1, random["density"])
    files = {path.name for path in tmp_path.iterdir()} - {".results.json.lock"}
    assert files == {"results.json", "results.csv", "report.md"}
    monkeypatch.setattr(speed, "run", None)  # all rows are there: nothing is timed again
    call([*COMMAND, "--out", str(tmp_path)])
    call([*COMMAND, "--steps", "12", "--out", str(tmp_path)], code=2)
    assert "it differs in arguments" in capsys.readouterr().err


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "memory", lambda _: 2**30)
    big = replace(TWIN, name="wan2.1-14b", architecture=architecture("wan2.1-14b"), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"take 27 GiB as bfloat16, cpu has 1 GiB; time a part .* --layers 2"):
        next(speed.run(big, [AdaSpa()], lambda: None))


def test_options_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    call(["evaluate", "--layers", "2", *out], code=2)
    assert "--layers goes together with --random-weights" in capsys.readouterr().err
    call(["evaluate", "--random-weights", "--model", "somebody/model", *out], code=2)
    assert "no known model is called 'somebody/model'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
