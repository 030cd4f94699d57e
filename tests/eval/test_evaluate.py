"""An experiment end to end on the embedded twin: rows, files, resuming, reports."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffsparse_eval.experiment as experiment_module
from diffsparse import GNA, AdaSpa, Dense, Digest, Random, Tangent
from diffsparse.cli import main
from diffsparse.strategies.paro import PAROSearch
from diffsparse.strategies.sparse_vdit import SparseVDiTSearch
from diffsparse_eval import pictures, report, rows, style
from diffsparse_eval.commands.evaluate import ComparedOptions
from diffsparse_eval.compared import label
from diffsparse_eval.rows import DEFINITIONS, SPEED_DEFINITIONS, ResultRow, SpeedRow
from diffsparse_kernels import best_block
from diffsparse_pipelines.prompts import read_prompts, read_seeds

RESULTS = Path(__file__).parents[2] / "eval/results"
COMMAND = ["evaluate", "--model", "tiny-twin", "--steps", "4", "--block", "16", "--prompts", "2"]
COMMAND += ["--strategy", "adaspa,random", "--sparsity", "0.5,0.8", "--searches", "2"]
KEYS = {
    *(
        "model",
        "strategy",
        "arguments",
        "sparsity",
        "density",
        "work",
        "sparse_density",
        "dense_steps",
        "psnr_db",
        "ssim",
    ),
    *("latent_cosine", "psnr_db_min", "dense_seconds", "seconds", "speedup", "attention_speedup", "dense_backend"),
    *("device", "dtype", "versions", "commit", "seed", "size", "prompt", "attention_share"),
}


def call(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    call([*COMMAND, "--out", str(out)])
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["rows"]
    return rows


def test_rows_of_an_earlier_version_stand_beside_new_ones() -> None:
    old, new = (
        {"label": "a", "density": 0.5, "modes": {}},
        {"label": "b", "density": 0.5, "work": 0.6, "modes": {"full": 1}},
    )
    assert rows.flat([old, new]) == [
        {"label": "a", "density": 0.5, "work": None},
        {"label": "b", "density": 0.5, "work": 0.6},
    ]


def test_a_line_of_the_plot_goes_through_the_sparsities_of_a_strategy(results: Path) -> None:
    rows = rows_of(results)
    lines = pictures._lines(rows)
    assert set(lines) == {"adaspa searches=2 block=16", "random block=16"}  # without dense
    for points in lines.values():
        assert len(points) == 2
    for point, share in zip(lines["adaspa searches=2 block=16"], (0.5, 0.8), strict=True):
        work = [row["work"] for row in rows if row["label"].startswith(f"adaspa {share}")]
        assert point["work"] == pytest.approx(sum(work) / 2)
        assert point["work"] > max(row["density"] for row in rows if row["label"].startswith(f"adaspa {share}"))
    at = [row["psnr_db"] for row in rows if row["label"].startswith("random 0.8")]
    assert lines["random block=16"][1]["psnr_db"] == pytest.approx(sum(at) / len(at))


def test_rows_are_complete_and_consistent(results: Path) -> None:
    rows = rows_of(results)
    assert len(rows) == 1 + 2 * 4  # the noise floor, and prompts x strategies x sparsities
    for row in rows:
        assert row.keys() >= KEYS
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["size"] == "32x32x9"
        assert row["dense_backend"] == "native"
        assert 0 < row["attention_share"] < 1
    floor = rows[0]
    assert (floor["strategy"], floor["psnr_db"], floor["density"]) == ("dense", None, 1.0)
    assert floor["attention_speedup"] == 1.0
    for row in rows[1:]:
        assert row["dense_steps"] == 1
        assert row["sparse_density"] == pytest.approx(1 - row["sparsity"], abs=0.05)
        assert row["density"] == pytest.approx((1 + 3 * row["sparse_density"]) / 4, abs=1e-6)
        assert row["psnr_db"] > row["psnr_db_min"] - 1e-9


def test_files(results: Path) -> None:
    names = {path.name for path in results.iterdir()}
    assert {"results.json", "results.csv", "report.md", "sheet.png", "tradeoff.png"} <= names
    first, second = (hashlib.sha256(prompt.encode()).hexdigest()[:6] for prompt in read_prompts("2", "tiny"))
    assert {f"dense-p00-{first}-s0.mp4", f"dense-p01-{second}-s0.mp4"} <= names
    assert f"random-0.5-block=16-p00-{first}-s0.mp4" in names
    assert all((results / row["file"]).exists() for row in rows_of(results))
    assert len({row["file"] for row in rows_of(results)}) == 1 + 2 * 4
    with (results / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["strategy"] for row in table] == [row["strategy"] for row in rows_of(results)]
    text = (results / "report.md").read_text()
    assert "| adaspa 0.8 searches=2 block=16 | 2 |" in text
    assert "noise floor (dense again) identical" in text
    assert all(f"`{name}`" in text for name in DEFINITIONS)
    with Image.open(results / "tradeoff.png") as plot:
        assert np.asarray(plot.convert("L")).std() > 1, "something is drawn"
    with Image.open(results / "sheet.png") as picture:
        pixels = np.asarray(picture)
    paper = (pixels == pixels[10, 10]).all(-1)
    assert 0.2 < paper.mean() < 0.8, "paper of its own, and frames"
    assert "Median over prompts and seeds, 2 in all" in text
    assert "±" not in text


def test_every_column_is_defined(results: Path) -> None:
    with (results / "results.csv").open() as file:
        assert set(csv.DictReader(file).fieldnames or ()) <= set(DEFINITIONS)
    assert set(DEFINITIONS) == ResultRow.__required_keys__ | ResultRow.__optional_keys__
    of_speed = SpeedRow.__required_keys__ | SpeedRow.__optional_keys__
    assert of_speed <= {*DEFINITIONS, *SPEED_DEFINITIONS}
    assert set(SPEED_DEFINITIONS) <= of_speed


def test_a_report_explains_the_columns_of_its_table_in_their_order(results: Path) -> None:
    text = (results / "report.md").read_text()
    headings = re.search(r"^\| (strategy .*) \|$", text, re.MULTILINE)
    section = re.search(r"^## Columns of the table\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert headings is not None
    assert section is not None
    explained = [re.split(r" \(`|:", line.removeprefix("- "))[0] for line in section[1].splitlines()]
    assert explained == headings[1].split(" | ")
    assert {"work", "recall"} <= set(explained), "all that is computed, and adaspa's mass"
    assert text.count("- `") == len(set(DEFINITIONS)) - (len(explained) - 1)  # all but `runs` are columns of rows


def test_a_table_has_no_empty_column() -> None:
    row: Any = dict.fromkeys(report._COLUMNS, 1.0) | {"strategy": "digest", "label": "digest 0.8", "recall": None}
    assert " recall |" not in report.markdown([row])
    assert "`recall`" not in report.columns([row])
    assert " recall |" in report.markdown([row, {**row, "label": "adaspa 0.8", "recall": 0.5}])


def test_the_plot_names_all_lines_under_both_panels_and_covers_no_data(results: Path) -> None:
    demo = json.loads((RESULTS / "demo.json").read_text())["rows"]
    stacks = json.loads((RESULTS / "stack-guidance-1.json").read_text())["rows"]
    for shown in (demo, stacks, rows_of(results)):
        with style.drawn(style.LIGHT):
            figure = pictures.tradeoff(shown)
            figure.draw_without_rendering()
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert len(set(names)) == len(names) == len(pictures._lines(shown))
        for panel in figure.axes:
            looks = [(line.get_color(), line.get_marker()) for line in (bars.lines[0] for bars in panel.containers)]
            assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(names)
            assert not panel.get_tightbbox().overlaps(legend.get_window_extent())
            assert panel.get_title()
            assert panel.get_xlabel()
        box = legend.get_window_extent()
        assert figure.bbox.count_contains(box.corners()) == 4, "nothing is cut"


def test_the_demos_lines_say_what_they_are() -> None:
    demo = json.loads((RESULTS / "demo.json").read_text())["rows"]
    names = [text.get_text() for text in pictures.tradeoff(demo).legends[0].get_texts()]
    assert names == ["step cache alone: taylor-seer", "sparse alone: digest", "both: taylor-seer and digest"]


def test_an_interrupted_run_goes_on(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "again"
    shutil.copytree(results, out)
    kept = json.loads((out / "results.json").read_text())
    assert kept.pop("schema") == rows.SCHEMA  # goes on from a file of an earlier release, too
    lost = [row for row in kept["rows"] if row["prompt"] != kept["rows"][0]["prompt"] and row["strategy"] == "random"]
    kept["rows"] = [row for row in kept["rows"] if row not in lost]
    (out / "results.json").write_text(json.dumps(kept))
    calls: list[int] = []
    real = experiment_module.generation
    monkeypatch.setattr(experiment_module, "generation", lambda *a, **k: calls.append(1) or real(*a, **k))
    call([*COMMAND, "--out", str(out)])
    found = rows_of(out)
    assert len(calls) == (1 + 2) + 1 + 2  # warm-ups, one dense, two random
    fresh = {(r["prompt"], r["arguments"]): r["psnr_db"] for r in found}
    assert fresh == {(r["prompt"], r["arguments"]): r["psnr_db"] for r in rows_of(results)}
    calls.clear()
    call([*COMMAND, "--out", str(out)])
    assert not calls


def test_other_settings_are_not_mixed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call([*COMMAND, "--dense-first", "2", "--out", str(results)], code=2)
    assert "holds results of another experiment (it differs in schedule)" in capsys.readouterr().err


def test_broken_results_are_told_and_overwritten_on_demand(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text("{broken")
    short = [*COMMAND[:-2], "--prompts", "1", "--sparsity", "0.5", "--strategy", "random", "--out", str(tmp_path)]
    call(short, code=2)
    assert "use --overwrite" in capsys.readouterr().err
    call([*short, "--overwrite"])
    assert [row["strategy"] for row in rows_of(tmp_path)] == ["dense", "random"]


def test_strategies_are_listed_once() -> None:
    made = ComparedOptions("adaspa,dense,random", block="16").strategies([0.5, 0.8])
    assert tuple(made) == (
        *(AdaSpa(0.5, block=16), Dense(), Random(0.5, block=16)),
        *(AdaSpa(0.8, block=16), Random(0.8, block=16)),
    )
    windowed = ComparedOptions("gna,random", window="4x8x8").strategies([0.5, 0.8])
    assert tuple(windowed) == (GNA((4, 8, 8)), Random(0.5), Random(0.8))  # windows decide its sparsity
    assert [label(s) for s in windowed] == ["gna window=4+8+8", "random 0.5", "random 0.8"]
    assert label(GNA(sparsity=0.7)) == "gna 0.7"


def test_prompts_and_seeds(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("# a comment\n one \n\ntwo\n", encoding="utf-8")
    assert read_prompts(str(file), "wan2.1-1.3b") == ("one", "two")
    assert len(read_prompts("16", "wan2.1-1.3b")) == 16
    assert len(read_prompts("20", "tiny")) == 20
    assert read_seeds("3, 1,3") == (3, 1)


@pytest.mark.parametrize(
    ("values", "shown", "caption"),
    [
        ((20.0, 22.0, 24.0), "22.00 (20.00 to 24.00)", "Median over prompts and seeds, 3 in all; in brackets"),
        ((20.0, 21.0, 22.0, 23.0, 24.0), "22.00 ± 1.96", "Mean ± half-width of the 95 % confidence interval"),
    ],
)
def test_summaries_show_mean_and_interval_or_median_and_range(
    values: tuple[float, ...], shown: str, caption: str
) -> None:
    row = dict.fromkeys(report._COLUMNS, 1.0)
    rows = [{**row, "strategy": "adaspa", "label": "adaspa 0.8", "psnr_db": value} for value in values]
    rows.append({**row, "strategy": "dense", "label": "dense", "psnr_db": None})
    dense, sparse = report.summary(rows)
    assert dense["label"] == "dense"
    assert dense["psnr_db"] == "identical"
    assert sparse["psnr_db"] == shown
    assert sparse["ssim"] == "1.0000"
    assert report.caption(rows).startswith(caption)


def test_a_busy_machine_is_told() -> None:
    row: Any = {"strategy": "dense", "speedup": 3.66}
    assert "Dense ran again at 3.66x its own speed" in report.doubts([row])
    assert not report.doubts([{**row, "speedup": 0.95}])


@pytest.mark.parametrize(("speedup", "told"), [(3.66, True), (1.0, False)])
def test_a_busy_machine_is_told_on_the_sheet(
    speedup: float, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dict.fromkeys(report._COLUMNS, 1.0) | dict.fromkeys(("model", "size", "device", "file"), "x")
    row: Any = {**base, "strategy": "dense", "label": "dense", "prompt": "a", "seed": 0, "steps": 3}
    facts: list[str] = []
    monkeypatch.setattr(pictures.media, "read", lambda path: None)
    monkeypatch.setattr(pictures, "draw", lambda title, text, *_: facts.append(text))
    pictures.write_sheet([{**row, "speedup": speedup, "dense_seconds": 1.0}], "a", 0, tmp_path)
    assert facts[0].startswith("x, x, 3 steps. Dense takes 1.0 s on x.")
    assert facts[0].endswith("the machine is busy, and its speed-ups say little.") == told


def test_a_file_tells_warm_up_from_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("diffsparse_pipelines.bars.PACE", 0.0)
    call([*COMMAND[:-6], "--prompts", "1", "--strategy", "random", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "runs 0 of 3, warming up 1 of 3, steps 1 of 2: " in printed
    assert not [line for line in printed.splitlines() if "left" in line and "runs 3" not in line]


def test_a_second_run_says_how_to_measure_anew(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call([*COMMAND, "--out", str(results)])
    assert f"rows of {results / 'results.json'}; --overwrite measures anew" in capsys.readouterr().out


def test_modes_of_heads_are_told_by_spans_of_steps() -> None:
    row = {
        "modes": {"full": 0.75, "skip": 0.25},
        "heads": {"a": {"1": "full full", "2": "skip full", "3": "full full"}},
    }
    text = report._heads("x 0.8", row)
    assert "## Modes of x 0.8, by head\nfull 75.0%, skip 25.0%\n" in text
    assert "| a | 0 | full 2, skip 3, full 4 |\n| a | 1 | full 2-4 |\n" in text


@pytest.mark.parametrize(("gpu", "block"), [(True, 128), (False, 64)])
def test_blocks_suit_the_machine(gpu: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert {strategy().block for strategy in (AdaSpa, GNA, Random, PAROSearch, SparseVDiTSearch)} == {block}
    assert {best_block(), Digest().block, Tangent().block} == {(128, 64) if gpu else 64}
    assert AdaSpa(block=32).block == 32
    assert label(Digest(0.8)) == "digest 0.8"
    assert label(Digest(0.8, block=192 - block)) == f"digest 0.8 block={192 - block}"
    assert label(Digest(0.8, block=(32, 16))) == "digest 0.8 block=32x16"
