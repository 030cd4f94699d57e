"""The kernel benchmark times what it says, and never a wrong kernel; the doctor says what is there."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import diffsparse_kernels as dk
import diffsparse_kernels.backend.cpu
from diffsparse.cli import main
from diffsparse.seam.models import SPECS
from diffsparse_eval import bench, doctor, environment, suites, tune
from diffsparse_eval.commands.bench import SizeOptions
from diffsparse_eval.rows import SCHEMA
from diffsparse_eval.timing import seconds_of
from diffsparse_kernels import machine
from diffsparse_pipelines import tables

CASE = suites.Case(tokens=200, heads=2, head_dim=16, dtype="float32", block=32, sparsities=(0.6,))
RIGHT = diffsparse_kernels.backend.cpu.block_sparse_attention


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_rows_compare_with_dense_of_the_same_case() -> None:
    rows = bench.measure(CASE, "cpu", ["cpu"], 2, bench.Troubles())
    ours = ["mass", "dense-mass", "sparse", "means", "first-order"]
    assert [(r["backend"], r["kind"]) for r in rows] == [("sdpa", "dense"), *(("cpu", kind) for kind in ours)]
    dense, _, _, sparse, *_ = rows
    assert dense["speedup"] == 1
    assert sparse["speedup"] == pytest.approx(dense["ms"] / sparse["ms"])
    assert sparse["density"] == pytest.approx(3 / 7)  # 0.4 of 7 blocks, rounded
    flops = 4 * 2 * 200 * 200 * 16 * sparse["density"]
    assert sparse["tflops"] == pytest.approx(flops / sparse["ms"] * 1e3 / 1e12)
    assert sparse["max_error"] is not None


def wrong(q: torch.Tensor, *rest: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = RIGHT(q, *rest, **options)  # type: ignore[arg-type]
    return out * 1.05, lse


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_wrong_kernel_is_not_timed(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = suites.Case(200, 2, 16, dtype, 32, (0.6,))
    troubles = bench.Troubles()
    bench.measure(case, "cpu", ["cpu"], 1, troubles)
    assert troubles == bench.Troubles()
    monkeypatch.setattr(diffsparse_kernels.backend.cpu, "block_sparse_attention", wrong)
    rows = bench.measure(case, "cpu", ["cpu"], 1, troubles)
    assert [row["kind"] for row in rows] == ["dense", "mass", "dense-mass"]
    ((entry, reason),) = troubles.failed.items()
    assert entry == f"cpu, 200 x 2 x 16 in blocks of 32, {dtype}"
    assert "is off by" in reason


SMALL = [
    "--head-dim",
    "16",
    "--block",
    "32",
    "--sparsity",
    "0.5",
    "--dtype",
    "float32",
    "--heads",
    "1",
    "--rounds",
    "1",
]


@pytest.mark.parametrize(("kernel", "said"), [(wrong, "is off by"), (broken, "out of luck")])
def test_a_wrong_or_broken_backend_costs_its_own_rows_only(
    kernel: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first case of two; the other backend and the other case are measured, and the end is an error."""
    out, calls = tmp_path / "rows.csv", iter([kernel])

    def now_and_then(*x: object, **options: object) -> object:
        return next(calls, RIGHT)(*x, **options)  # type: ignore[operator]

    monkeypatch.setattr(diffsparse_kernels.backend.cpu, "block_sparse_attention", now_and_then)
    chosen = ["--backend", "cpu,reference", "--tokens", "100,130", "--out", str(out)]
    assert run("bench", *SMALL, *chosen) == 2
    sparse = [row for row in csv.DictReader(out.read_text().splitlines()) if row["kind"] == "sparse"]
    assert [(row["backend"], row["tokens"]) for row in sparse] == [
        ("reference", "100"),
        ("cpu", "130"),
        ("reference", "130"),
    ]
    printed = capsys.readouterr()
    assert f"{len(out.read_text().splitlines()) - 1} rows are in" in printed.out
    assert "wrong or broken: cpu, 100 x 1 x 16 in blocks of 32, float32: " in printed.out
    assert said in printed.out
    assert printed.err.startswith("error: wrong or broken, and not in the rows: cpu, 100 x 1 x 16")


@pytest.mark.parametrize(
    ("name", "left"), [("attention", []), ("block_mass", ["dense-mass"]), ("attention_with_mass", ["mass"])]
)
def test_a_backend_without_its_mass_is_told(name: str, left: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffsparse_kernels.backend.cpu, name, broken)
    troubles = bench.Troubles()
    rows = bench.measure(CASE, "cpu", ["cpu"], 1, troubles)
    assert [row["kind"] for row in rows] == ["dense", *left, "sparse", "means", "first-order"]
    assert list(troubles.failed.values()) == ["out of luck"]


# Everything that a machine for kernels alone may lack.
BARE = """
import sys
for name in ("rich", "diffusers", "transformers", "accelerate", "ftfy", "imageio", "imageio_ffmpeg", "matplotlib",
             "skimage", "scipy", "sentencepiece", "safetensors", "tokenizers", "PIL", "numpy"):
    sys.modules[name] = None
import warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
from diffsparse.cli import main
"""


def bare(*arguments: str, first: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{BARE}{first}\nmain(sys.argv[1:])", *arguments]
    whole = {**os.environ, **environment}
    return subprocess.run(command, env=whole, capture_output=True, text=True, check=False)


def test_bench_without_rich_and_diffusers(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    done = bare("bench", *SMALL, "--tokens", "256", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    kinds = [row["kind"] for row in csv.DictReader(out.read_text().splitlines())]
    assert kinds == ["dense", "mass", "dense-mass", "sparse", "means", "first-order", "raster", "ordered"]
    device, _, case, headings, _, *lines = done.stdout.splitlines()
    assert device.startswith(machine.processor())
    assert case == "float32, 256 x 1 x 16 (tokens x heads x D), blocks of 32"
    assert " ".join(headings.split()) == "backend kind density ms TFLOP/s speed-up of"
    assert [line.split()[1] for line in lines[1 : 1 + len(kinds)]] == kinds
    assert lines[-1] == f"{len(kinds)} rows are in {out}"


def test_doctor_without_rich_and_diffusers(tmp_path: Path) -> None:
    measured = "from diffsparse_eval import tune; tune.measure_break_even('cpu', seconds=0.1)"
    done = bare("doctor", first=measured, DIFFSPARSE_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["versions", "python", environment.versions()["python"]]
    assert any(line.split() == ["models", "embedded", "Diffusers", "is", "not", "installed"] for line in lines)
    assert any("break-even at a density of" in line for line in lines)


def test_help_and_usage_errors_without_rich() -> None:
    assert "--sparsity" in bare("bench", "--help").stdout
    done = bare("bench", "--nothing")
    assert done.returncode == 2
    assert "No such option: --nothing" in done.stderr
    assert "Traceback" not in done.stderr
    done = bare("bench", "--tune", "--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --tune wants a device with the triton backend")


def test_plain_tables_line_up() -> None:
    found = tables.laid_out([["long", "1", ""], ["", "1000", "x"]], "lrl", ["a", "b", "c"], 80)
    assert found.head == ["a        b  c", "-------------"]
    assert found.body == ["long     1", "      1000  x"]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_the_command_writes_rows(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"bench.{suffix}"
    assert run("bench", *SMALL, "--tokens", "100", "--out", str(out)) == 0
    text = out.read_text()
    rows = json.loads(text)["rows"] if suffix == "json" else list(csv.DictReader(text.splitlines()))
    assert suffix != "json" or json.loads(text)["schema"] == SCHEMA
    wanted = {
        "device",
        "backend",
        "tokens",
        "heads",
        "head_dim",
        "dtype",
        "block",
        "density",
        "ms",
        "tflops",
        "speedup",
    }
    assert len(rows) == 6
    assert all(row.keys() >= wanted for row in rows)
    assert "100 x 1 x 16" in capsys.readouterr().out


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of one's own."""
    monkeypatch.setenv("DIFFSPARSE_CACHE", str(tmp_path))
    dk.forget_measurements()
    yield tmp_path
    dk.forget_measurements()


def test_the_gpu_suite_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    assert run("bench", "--suite", "gpu", "--shrink", "600", "--rounds", "1", "--out", str(out)) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {row["case"] for row in rows} == {case.name for case in suites.gpu_suite()}
    assert {row["pattern"] for row in rows} == {"random", "ragged"}
    assert all(float(row["efficiency"]) > 0 for row in rows)
    assert "of limit: the time of that dense kernel times the density" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("--suite", "tpu"), ("--shrink", "0")])
def test_bad_options_end_with_code_2(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", *(["--suite", "gpu"] if option != "--suite" else []), option, value) == 2
    assert f"error: {option} wants" in capsys.readouterr().err


def test_shapes_of_real_models() -> None:
    sizes = {(case.tokens, case.heads) for case in suites.gpu_suite()}
    assert {(32_760, 12), (75_600, 40), (119_056, 24)} < sizes
    assert all(case.head_dim == case.block == 128 for case in suites.gpu_suite())


def test_ragged_lists_are_ragged_and_of_the_density_asked_for() -> None:
    case = suites.Case(4096, 4, 64, "float32", 32, (), "ragged")
    lists = case.lists(0.8, "cpu")
    assert 0.2 <= float(lists.density()) < 0.25
    assert len(lists.cnt.unique()) > 10
    assert (lists.cnt > 0).all()


@pytest.mark.parametrize("pattern", ["random", "ragged"])
def test_queries_and_keys_of_a_block_may_differ(pattern: suites.Pattern) -> None:
    case = suites.Case(500, 2, 16, "float32", (32, 16), (0.5,), pattern)
    lists = case.lists(0.5, "cpu")
    assert (lists.q_block, lists.kv_block, *lists.cnt.shape) == (32, 16, 1, 2, 16)
    assert 0.45 <= float(lists.density()) < 0.55
    troubles = bench.Troubles()
    rows = bench.measure(case, "cpu", ["cpu"], 1, troubles)
    assert troubles == bench.Troubles()
    assert {row["kind"]: row["block"] for row in rows} == dict.fromkeys(
        ("dense", "mass", "dense-mass", "sparse", "means", "first-order"), "32x16"
    )
    assert case.label.endswith("in blocks of 32x16, float32" if pattern == "random" else "float32")
    assert SizeOptions(block="64, 32x16,8x8").cases()[-3:] == [
        replace(SizeOptions(block=block).cases()[-1], block=made)
        for block, made in (("64", 64), ("32x16", (32, 16)), ("8", 8))
    ]


def test_a_foreign_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    troubles = bench.Troubles()
    rows = bench.measure(CASE, "cpu", ["cpu", "flex"], 1, troubles)
    assert troubles == bench.Troubles({"flex: out of luck"})
    assert {row["backend"] for row in rows} == {"sdpa", "cpu"}


def test_one_thread_is_timed_by_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert seconds_of(lambda: time.sleep(0.1), "cpu") < 0.05
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert seconds_of(lambda: time.sleep(0.1), "cpu") > 0.05


def test_flex_on_the_cpu_is_what_torch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the eager one of the backend, which is slow beyond comparison."""
    compiled, compile_ = [], torch.compile

    def kept_eager(function: Callable[..., object], **options: object) -> object:
        if function is not flex_attention:
            return compile_(function, **options)  # FlexAttention's own way to run eager
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", kept_eager)
    monkeypatch.setattr("torch.nn.attention.flex_attention._WARNINGS_SHOWN", set(), raising=False)  # once a process
    troubles = bench.Troubles()
    with pytest.warns(UserWarning, match="flex_attention called without torch.compile"):
        rows = bench.measure(CASE, "cpu", ["flex"], 1, troubles)
    assert troubles == bench.Troubles()
    assert [(row["backend"], row["kind"]) for row in rows] == [("sdpa", "dense"), ("flex", "sparse")]
    assert compiled == [{"dynamic": False}]
    assert rows[1]["max_error"] < 1e-5


def test_measuring_the_break_even(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "break_even.json").write_text(json.dumps([{"device": "another", "backend": "gluon", "break_even": 0.9}]))
    rows, path = tune.measure_break_even("cpu", seconds=0.1)
    assert path == cache / "break_even.json"
    kept = json.loads(path.read_text())
    assert kept[0]["device"] == "another"
    assert kept[1:] == rows
    row = rows[0]
    limit = dk.break_even(
        torch.device("cpu"), getattr(torch, row["dtype"]), row["head_dim"], row["block"], row["tokens"]
    )
    assert limit == row["break_even"]
    assert run("doctor") == 0
    assert "break-even at a density of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("low", "high", "dense", "wanted"), [(1, 3, 2, 0.5), (1, 3, 9, 1), (1, 3, 0.1, 0.05), (2, 1, 3, 1), (2, 1, 1, 0.05)]
)
def test_where_the_lines_cross(low: float, high: float, dense: float, wanted: float) -> None:
    assert tune.crossing(low, high, dense) == pytest.approx(wanted)


def test_tuning_and_the_suite_in_the_interpreter(tmp_path: Path) -> None:
    """The commands of a GPU on Triton's interpreter, in a process of their own."""
    pytest.importorskip("triton")
    code = """
import json, sys
from diffsparse.cli import main
from diffsparse_eval import suites, tune
from diffsparse_kernels.measured import Tile, tiles_for
suites.SUITES["gpu"] = lambda: [suites.Case(60, 9, 32, "bfloat16", 32, (0.5,), "ragged", "small")]
tune.HEAD_DIMS = (64,)
tune.candidates = lambda device, head_dim, q_block, kv_block: [Tile(64, 4, 2, "tma"), Tile(32, 4, 2)]
path = tune.tune_tiles("cpu", rounds=1, tokens=70, heads=1)
assert len(json.loads(path.read_text())[0]["tiles"]) == 2, path.read_text()
main(["bench", "--suite", "gpu", "--shrink", "600", "--backend", "triton", "--rounds", "1", "--out", sys.argv[1]])
"""
    out = tmp_path / "rows.csv"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DIFFSPARSE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(row["backend"], row["kind"]) for row in rows] == [
        ("sdpa", "dense"),
        ("triton", "mass"),
        ("triton", "dense-mass"),
        ("triton", "sparse"),
        ("triton", "means"),
        ("triton", "first-order"),
        *(("triton", precision) for precision in diffsparse_kernels.PRECISIONS),
    ]
    assert [bool(row["max_error"]) for row in rows] == [False, False, False, True, True, True, *(False,) * 4]


def test_tuning_wants_the_triton_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "--tune", "--device", "cpu") == 2
    assert "--tune wants a device with the triton backend" in capsys.readouterr().err


def test_doctor_names_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.examine()
    assert found["versions"]["torch"] == environment.versions()["torch"]
    assert found["backends"]["cpu"] == "available"
    assert found["models"]["embedded"] == "tiny, tiny-twin"
    assert found["models"]["layouts"].startswith(f"a row each for {len(SPECS)} classes, sparse or not")
    for arguments in (["doctor"], ["doctor", "--json"]):
        with pytest.raises(SystemExit):
            main(arguments)
    printed = capsys.readouterr().out
    assert "transformers" in printed
    assert json.loads(printed[printed.index("{") :])["backends"] == found["backends"]


def test_the_commit_is_that_of_the_checkout() -> None:
    assert environment.commit() is None or len(environment.commit().rstrip("+")) == 12  # type: ignore[union-attr]
    assert environment.device_name("cpu").endswith("threads")


def test_orders_are_timed_where_the_tokens_make_a_grid() -> None:
    case = suites.Case(tokens=512, heads=3, head_dim=16, dtype="float32", block=64, sparsities=(0.5,))
    rows = bench.measure(case, "cpu", ["cpu"], 1, bench.Troubles())
    assert [row["kind"] for row in rows] == [
        "dense",
        "mass",
        "dense-mass",
        "sparse",
        "means",
        "first-order",
        "raster",
        "ordered",
    ]
    assert len({row["density"] for row in rows[3:]}) == 1


def test_the_doctor_tells_how_trials_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a faked GPU: those that most models need are made, and all are listed."""
    asked: list[str] = []
    monkeypatch.setattr(doctor, "main_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("diffsparse_kernels.registry.choose", lambda case, device: asked.append(case.kind))
    row = {"kernel": "gluon", "case": "attend, bfloat16", "verdict": "hang in its trial"}
    monkeypatch.setattr("diffsparse_kernels.trials.found", lambda device: [row])
    assert doctor._trials() == {"gluon: attend, bfloat16": "hang in its trial"}
    beside = {"summaries", "errors", "statistics", "selection", "rows", "fit"}
    assert set(asked) == {"attend", "fused", "mass"} | beside
