"""The account of a GPU, rehearsed on a CPU: whatever a kernel does, all other rows are there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffsparse.seam.accelerate import SPEEDS
from diffsparse_eval.gpu import account, compiling, facts, numerics, stage, table
from diffsparse_kernels import registry
from diffsparse_kernels.backend.triton import launch as triton
from diffsparse_kernels.case import Case
from support import fakes

Row = dict[str, Any]
REHEARSED = ["--device", "cpu", "--shrink", "600"]
WORLD = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
GPU = stage.Options("cuda", 1)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "diffsparse_eval.gpu", *arguments]
    return subprocess.run(command, env=WORLD, capture_output=True, text=True, check=False, **options)


def rows_of(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / account.ROWS).read_text().splitlines()]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row], str]:
    """The whole program with three kernels of a stranger: one hangs, one is wrong, one raises."""
    folder = tmp_path_factory.mktemp("account")
    # A long budget: time must not decide on a busy machine, and the rehearsal ends when it is through.
    done = run(*REHEARSED, "--seconds", "2000", "--kernels", fakes.KERNELS, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, rows_of(folder), done.stdout


def test_all_other_rows_are_there(rehearsal: tuple[Path, list[Row], str]) -> None:
    _, rows, _ = rehearsal
    assert {row["stage"] for row in rows} == {stage.name for stage in stage.STAGES}
    mine = [row for row in rows if not str(row["kernel"]).startswith("support.fakes")]
    assert {row["verdict"] for row in mine} <= {
        "done", "right", "ran", "timed", "nothing to compile", "nothing to tune", "left out", "profiled",
    }  # fmt: skip
    assert {row["kernel"] for row in mine if row["verdict"] == "left out"} <= {"all"}  # no sanitizer here
    numbers = {name: (right, all_) for name, (right, all_, _) in table.verdicts(mine).items()}
    assert numbers["cpu"] == numbers["reference"] == (21, 21)
    assert numbers["triton"] == (9, 9)
    timed = [row for row in mine if row["stage"] == "speed" and row["verdict"] == "timed"]
    assert {row["shape"] for row in timed} == {"wan 1.3b 480p", "wan 14b 720p", "hunyuan-video 720p", "flux 1024 px"}
    masked = {row["kind"] for row in timed if row["shape"] == "hunyuan-video 720p" and row["kernel"] == "cpu"}
    assert masked >= {"dense with LSE, masked", "random lists, masked", "block mass, masked"}
    kinds = [f"{kind}{more}" for kind in ("dense", "search", "sparse") for more in ("", ", profile")]
    assert {row["kernel"] for row in mine if row["stage"] == "step"} == {
        f"{name}, {kind}" for name in ("digest", "adaspa") for kind in kinds
    }
    skips = {row["kernel"]: row.get("executed") for row in mine if row["stage"] == "accelerate"}
    alone = {f"{speed}, cache alone" for speed in SPEEDS}
    assert skips.keys() == {"dense", *SPEEDS, *alone}
    assert all(0 < share < 1 for share in skips.values() if share is not None)
    assert [row["kind"] for row in mine if row["stage"] == "end to end"] == ["dense", "digest 0.8", "adaspa 0.8"]
    assert [row["psnr_db"] > 20 for row in mine if row.get("psnr_db")] == [True, True]


def test_what_the_strangers_did_is_told(rehearsal: tuple[Path, list[Row], str]) -> None:
    folder, rows, printed = rehearsal
    found = {
        name: [row for row in rows if row["kernel"] == f"support.fakes:{name}" and row["stage"] == "numerics"]
        for name in ("hangs", "wrong", "raises")
    }
    hung = [row for row in found["hangs"] if row["verdict"] == "hang"]
    assert hung[0]["why"] == "killed after 20 s without a sign"
    assert len({row["shape"] for row in hung}) == len(hung)  # the next child went on behind it
    assert {row["verdict"] for row in found["wrong"]} == {"wrong"}
    assert all("the output is off by" in row["why"] for row in found["wrong"])
    assert {row["verdict"] for row in found["raises"]} == {"raised"}
    assert all(row["why"].startswith("RuntimeError: out of resource") for row in found["raises"])
    timed = [row for row in rows if row["stage"] == "speed"]
    assert "support.fakes:hangs" not in {row["kernel"] for row in timed}
    lists = [row for row in timed if row["kernel"] == "support.fakes:wrong" and "lists" in row["kind"]]
    assert {row["verdict"] for row in lists} == {"wrong"}
    lines = printed[printed.index("kernels against float64") :].splitlines()
    assert len(lines) < 100
    assert sum("support.fakes:" in line and "/" in line for line in lines) == 3
    assert printed.endswith(f"{len(rows)} rows are in {folder / account.ROWS}\n")
    assert {path.name for path in folder.iterdir()} <= {account.ROWS, account.TABLE, account.TILES}


def test_a_row_says_where_it_was_made(rehearsal: tuple[Path, list[Row], str]) -> None:
    _, rows, _ = rehearsal
    wanted = {"stage", "shape", "kernel", "verdict", "ms", "tflops", "share", "error", "repeat_equal"}
    assert all(row.keys() >= wanted | {"versions", "device", "driver", "commit", "date"} for row in rows)
    assert {row["versions"]["torch"] for row in rows} == {torch.__version__}
    for row in rows:
        if row["stage"] == "speed" and row["verdict"] == "timed" and row["tflops"]:
            assert row["share"] == pytest.approx(row["density"] * row["speedup"])


def test_without_a_gpu_one_line_says_what_is_missing(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: this wants a CUDA device: torch ")
    assert "--device cpu --shrink 600" in done.stderr


def test_without_torch_it_says_so() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('diffsparse_eval.gpu', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=WORLD, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this wants torch, built for CUDA, in ")


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_says_so_too(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["make", "gpu", f"OUT={tmp_path}", "GPU_SECONDS=30", f"VENV={tmp_path}", f"PYTHON={sys.executable}"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: this wants a CUDA device" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shrink", "0"], "--shrink and --seconds want"), (["--seconds", "-1"], "--shrink and --seconds want")],
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, "--out", str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    (tmp_path / "file").touch()
    assert "can't write into" in run(*REHEARSED, "--out", str(tmp_path / "file")).stderr


def test_a_short_budget_drops_the_last_stages(tmp_path: Path) -> None:
    done = run(*REHEARSED, "--seconds", "20", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert rows[0]["stage"] == "facts"
    assert [row["verdict"] for row in rows if row["stage"] in ("end to end", "sanity", "tune")] == ["no time"] * 3


# --- what only a GPU does, as far as can be seen without one -------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a chip")
    known = {"gluon": lambda *_: None, "triton": registry.capability}
    capability = {**dict.fromkeys(registry.BACKENDS, lambda *_: "not here"), **known}
    monkeypatch.setattr(registry, "capability", lambda name, *asked: capability[name](name, *asked))
    monkeypatch.setattr(triton, "chip", lambda device: 90)
    monkeypatch.setattr(triton.trials, "verdict", lambda *_: pytest.fail("no trial is asked for"))


@pytest.mark.usefixtures("hopper")
def test_what_is_tried_on_hopper() -> None:
    assert numerics.jobs(GPU) == ["first use", "triton", "triton-tma", "gluon", "eight bits"]
    tried = numerics.cases("gluon", GPU)
    wanted = {(b, d, t, m) for b in (64, 128) for d in (64, 72, 96, 128) for t in ("bf", "f") for m in (False, True)}
    assert {(c.kv_block, c.head_dim, "bf" if c.dtype == torch.bfloat16 else "f", c.masked) for c in tried} == wanted
    work = {(case.kind, case.summary, case.masked) for case in tried}
    assert work >= {("fused", None, True), ("attend", "means", False), ("attend", "first-order", True)}
    kinds = {case.kind for case in numerics.cases("triton", GPU)}
    assert kinds == {"attend", "fused", "mass", "summaries", "errors", "statistics", "rows", "fit", "selection"}
    assert {case.kind for case in numerics.cases("triton-tma", GPU)} == {"attend", "fused", "mass"}
    everything = numerics.kernels(GPU)
    assert len(list(numerics.launches(GPU))) == sum(len(numerics.cases(name, GPU)) for name in everything)


def test_compiling_launches_nothing() -> None:
    from triton.runtime.jit import JITFunction

    launched: list[bool] = []
    kernel = SimpleNamespace(run=lambda *a, grid, warmup, **k: launched.append(warmup))
    before = JITFunction.run
    JITFunction.run = lambda self, *a, **k: kernel.run(*a, **k)
    try:
        with compiling.compile_only():
            JITFunction.run(kernel, 1, grid=(1,), warmup=False)
        JITFunction.run(kernel, 1, grid=(1,), warmup=False)
    finally:
        JITFunction.run = before
    assert launched == [True, False]


def test_kernels_that_hung_are_not_timed(tmp_path: Path) -> None:
    book = account.Account(GPU, tmp_path, (tmp_path / "rows").open("w"), 10.0)
    usual = Case("attend", torch.bfloat16, 128, 128, 128, 128)
    numeric = stage.STAGES[2]
    for kernel, case, verdict in (
        ("gluon", usual, "right"),
        ("gluon", usual._replace(masked=True), "hang"),
        ("triton-tma", usual._replace(head_dim=64), "crash"),
        ("triton", usual, "wrong"),
    ):
        book.add(numeric, {"kernel": kernel, "case": case.words(), "verdict": verdict})
    book._file.close()
    assert book._dangerous() == ["gluon+mask", "triton-tma", "triton-tma+mask"]
    assert book._jobs(stage.STAGES[3]) == ["|".join(["gluon", *usual._replace(masked=True).words()])]


def test_another_child_goes_on_behind_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []

    def note(name: str) -> Row:
        ran.append(name)
        if name == "bad":
            raise ValueError("two\nlines")
        if name == "gone":
            raise ImportError("no such package")
        return {"verdict": "right"}

    channel = stage.Channel(failed=(1,), first=2)
    for name in ("safe", "hung", "new", "bad", "gone"):
        channel.attempt(name, "shape", lambda name=name: note(name), again=True)
    assert ran == ["safe", "new", "bad", "gone"]
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(x["row"]["kernel"], x["row"]["verdict"]) for x in said if "row" in x]
    assert found == [("new", "right"), ("bad", "raised"), ("gone", "left out")]  # the safe one has its row
    assert next(x["row"]["why"] for x in said if x.get("row", {}).get("kernel") == "bad") == "ValueError: two lines"


def test_the_best_tiles_are_kept() -> None:
    place = {"stage": "tune", "device": "a chip", "head_dim": 64, "q_block": 128, "kv_block": 128}
    rows = [
        {**place, "ms": ms, "tile": {"keys": keys}} for ms, keys in ((3.0, 1), (1.0, 2), (None, 3), (2.0, 4), (4.0, 5))
    ]
    (best,) = account._best_tiles(rows)
    assert [tile["keys"] for tile in best["tiles"]] == [2, 4, 1]
    assert (best["device"], best["head_dim"], best["q_block"], best["kv_block"]) == ("a chip", 64, 128, 128)


def test_what_is_missing_is_known_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert facts._obstacle(GPU) == ""
    monkeypatch.setitem(sys.modules, "triton", None)
    assert facts._obstacle(GPU).startswith("Triton")


# --- tables of committed rows -------------------------------------------------------------------------------------


def test_the_tables_in_the_docs_are_those_of_the_committed_rows() -> None:
    for path, text in table.pages(table.read()).items():
        assert path.read_text() == text, f"{path.name} is stale: run make gpu-tables"


def test_the_overview_reads_rows(rehearsal: tuple[Path, list[Row], str]) -> None:
    _, rows, _ = rehearsal
    assert "not measured" in table.overview({})
    (timed, *_) = [
        row for row in rows if row["stage"] == "speed" and row["verdict"] == "timed" and row["kernel"] == "cpu"
    ]
    mine = [
        {
            **timed,
            "kind": "ragged lists, masked",
            "density": 0.2,
            "speedup": speedup,
            "share": speedup / 5,
            "ms": 1 / speedup,
            "kernel": name,
        }
        for name, speedup in (("gluon", 4.6), ("triton", 4.0))
    ]
    line = table.overview({"card": mine}).splitlines()[-1]
    assert "4.60x (0.92, gluon)" in line
    assert line.startswith("| card | 0 of 0 |")
