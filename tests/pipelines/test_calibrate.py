"""`diffsparse calibrate` on the embedded twin, and what the other commands make of its plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffsparse import PARO, SparseVDiT
from diffsparse.cli import main
from diffsparse.strategies.planned import Planned

SMALL = ["--model", "tiny-twin", "--steps", "3"]
SEARCH = ["calibrate", *SMALL, "--block", "16", "--prompts", "1"]
KNOBS: dict[str, list[str]] = {"paro": [], "sparse-vdit": ["--epsilon", "99"]}
PLANS: dict[str, type[Planned]] = {"paro": PARO, "sparse-vdit": SparseVDiT}


def call(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


@pytest.mark.parametrize("name", PLANS)
def test_from_search_to_report(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.safetensors"
    call([*SEARCH, "--strategy", name, "--groups", "2", *KNOBS[name], "--out", str(plan)])
    printed = capsys.readouterr().out
    assert f"strategy   {name}" in printed
    assert "layout     9x8x8 = 576 tokens" in printed
    assert ("multi-diagonal " if name == "sparse-vdit" else "orders     ") in printed
    strategy = PLANS[name].load(plan)
    assert strategy.plan.settings["groups"] == 2
    assert strategy.sparsity == 0.8
    call([*SEARCH, "--strategy", name, "--out", str(plan)], code=2)
    assert "use --overwrite" in capsys.readouterr().err
    out = tmp_path / "results"
    call(["evaluate", *SMALL, "--strategy", f"{name}:{plan}", "--prompts", "1", "--out", str(out)])
    row = json.loads((out / "results.json").read_text())["rows"][1]
    assert row["strategy"] == name
    assert row["label"].startswith(f"{name} 0.8 ")
    assert bool(row["modes"]) == bool(row["heads"]) == (name == "sparse-vdit")
    assert ("## Modes of sparse-vdit 0.8" in (out / "report.md").read_text()) == (name == "sparse-vdit")


def test_modes_of_each_head_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.safetensors"
    call([*SEARCH, "--strategy", "sparse-vdit", "--modes", "stripe", "--epsilon", "99", "--out", str(plan)])
    assert "stripe 100.0%" in capsys.readouterr().out
    call(["generate", *SMALL, "--strategy", f"sparse-vdit:{plan}", "--out", str(tmp_path / "a.gif")])
    printed = capsys.readouterr().out
    assert "head modes         stripe 100.0%" in printed
    assert "blocks.5.attn1     stripe stripe" in printed


def test_a_plan_at_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = [*SMALL[:2], "--steps", "2", "--frames", "5", "--height", "48", "--out", str(tmp_path / "a.gif")]
    for name in PLANS:
        plan = tmp_path / f"{name}.safetensors"
        call([*SEARCH, "--strategy", name, *KNOBS[name], "--out", str(plan)])
        call(["generate", *other, "--strategy", f"{name}:{plan}"], code=2 if name == "paro" else 0)
    printed = capsys.readouterr()
    assert "error: the plan's blocks are those of 9x8x8 = 576 tokens; got 5x12x8 = 480 tokens" in printed.err
    assert "notes              a plan of 9x8x8 = 576 tokens serves 5x12x8 = 480 tokens" in printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "adaspa"], "no search is called 'adaspa'; known: paro, sparse-vdit"),
        (["--strategy", "sparse-vdit", "--modes", "full"], "modes wants"),
        (["--strategy", "sparse-vdit", "--cost", "money"], "cost wants"),
        (["--out", "plan.txt"], "wants a .safetensors file"),
    ],
)
def test_bad_input_ends_with_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call([*SEARCH, "--out", str(tmp_path / "plan.safetensors"), *options], code=2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
