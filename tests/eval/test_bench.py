"""The kernel benchmark times what it says, and never a wrong kernel; the doctor says what is there."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import diffsparse_kernels.cpu
from diffsparse.cli import main
from diffsparse_eval import bench, doctor, environment

CASE = bench.Case(tokens=200, heads=2, head_dim=16, dtype="float32", block=32, sparsities=(0.6,))


def test_rows_compare_with_dense_of_the_same_case() -> None:
    rows = bench.measure(CASE, "cpu", ["cpu"], rounds=2)
    assert [(r["backend"], r["kind"]) for r in rows] == [("sdpa", "dense"), ("cpu", "mass"), ("cpu", "sparse")]
    dense, _, sparse = rows
    assert dense["speedup"] == 1
    assert sparse["speedup"] == pytest.approx(dense["ms"] / sparse["ms"])
    assert sparse["density"] == pytest.approx(3 / 7)  # 0.4 of 7 blocks, rounded
    flops = 4 * 2 * 200 * 200 * 16 * sparse["density"]
    assert sparse["tflops"] == pytest.approx(flops / sparse["ms"] * 1e3 / 1e12)
    assert sparse["max_error"] is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_wrong_kernel_is_not_timed(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.Case(200, 2, 16, dtype, 32, (0.6,))
    bench.measure(case, "cpu", ["cpu"], rounds=1)
    right = diffsparse_kernels.cpu.block_sparse_attention

    def wrong(q: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(q, *rest)  # type: ignore[arg-type]
        return out * 1.05, lse

    monkeypatch.setattr(diffsparse_kernels.cpu, "block_sparse_attention", wrong)
    with pytest.raises(bench.WrongResultError, match="is off by"):
        bench.measure(case, "cpu", ["cpu"], rounds=1)


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_the_command_writes_rows(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"bench.{suffix}"
    sizes = ["--tokens", "100", "--head-dim", "16", "--block", "32", "--sparsity", "0.5", "--dtype", "float32"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", *sizes, "--heads", "1", "--rounds", "1", "--out", str(out)])
    assert not ended.value.code
    text = out.read_text()
    rows = json.loads(text)["rows"] if suffix == "json" else list(csv.DictReader(text.splitlines()))
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
    assert len(rows) == 3
    assert all(row.keys() >= wanted for row in rows)
    assert "100 x 1 x 16" in capsys.readouterr().out


def test_doctor_names_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.examine()
    assert found["versions"]["torch"] == environment.versions()["torch"]
    assert found["backends"]["cpu"] == "available"
    assert found["models"]["embedded"] == "default, twin"
    for arguments in (["doctor"], ["doctor", "--json"]):
        with pytest.raises(SystemExit):
            main(arguments)
    printed = capsys.readouterr().out
    assert "transformers" in printed
    assert json.loads(printed[printed.index("{") :])["backends"] == found["backends"]


def test_the_commit_is_that_of_the_checkout() -> None:
    assert environment.commit() is None or len(environment.commit().rstrip("+")) == 12  # type: ignore[union-attr]
    assert environment.device_name("cpu").endswith("threads")
