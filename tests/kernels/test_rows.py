"""Rows moved, put back and fitted: what is told, and how the kernels compile; the interpreter shows them right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import diffsparse_kernels as dk
from diffsparse_kernels import KernelInputError, ops
from diffsparse_kernels.backend.triton import fit, rows
from support import aot

CHIPS = (80, 89, 90, 100, 120)
TYPES = {
    "*i64": ("orders_ptr", "inverses_ptr", "picked_ptr", "probes_ptr"),
    "*i8": ("codes_ptr",),
    "*bf16": ("scale_ptr",),
    "*u8": ("rows_ptr",),
    "*fp32": ("constant_ptr", "by_code_ptr", "basis_ptr", "inverse_ptr", "duals_ptr", "errors_ptr"),
}
WIDE = (
    "q_ptr",
    "k_ptr",
    "v_ptr",
    "x_ptr",
    "exact_ptr",
    "by_output_ptr",
    *(f"{x}out_ptr" for x in ("", "q_", "k_", "v_")),
)


def test_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_rows.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\.\.\.", done.stdout)


def assert_fits(kernel: Any, chip: int, constants: dict[str, Any], tile: Any, dtype: str) -> aot.Compiled:
    """It spills nothing to speak of."""
    types = {name: kind for kind, names in TYPES.items() for name in names} | dict.fromkeys(WIDE, f"*{dtype}")
    made = aot.compiled(kernel, chip, constants, tile.warps, tile.stages, **types)
    assert made.stack <= 32
    assert made.shared <= aot.CHIPS[chip][1]
    return made


@aot.compiles
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("chip", CHIPS)
def test_rows_compile(chip: int, dtype: str) -> None:
    itemsize = 2 if dtype == "bf16" else 4
    tile = rows.move_tile_of(itemsize)
    made = assert_fits(rows.move, chip, rows.move_constants(128, tile) | {"COUNT": 3}, tile, dtype)
    assert re.search(r"ld\.global\S*\.v4\.b32", made.ptx), "16 bytes at a time"
    tile = rows.restore_tile(itemsize)
    for flags in ({"AFFINE": True, "SOME": True}, {"AFFINE": False, "SOME": False}):
        constants = rows.restore_constants(128, 4, tile) | {"MOVED": True, "UPCAST": False, **flags}
        assert_fits(rows.restore, chip, constants, tile, dtype)


@aot.compiles
@pytest.mark.parametrize(("count", "rank", "dim"), [(128, 4, 128), (64, 0, 64), (32, 3, 72)])
@pytest.mark.parametrize("chip", CHIPS)
def test_the_fit_compiles(chip: int, count: int, rank: int, dim: int) -> None:
    assert_fits(fit.judge, chip, fit.fit_constants(dim, count, rank, fit.JUDGE), fit.JUDGE, "bf16")
    constants = fit.fit_constants(dim, count, rank, fit.COMBINE) | {"ERRORS": 16}
    assert_fits(fit.combine, chip, constants, fit.COMBINE, "bf16")


def test_what_does_not_fit_is_told() -> None:
    x, order, picked = torch.zeros(2, 3, 10, 8), torch.arange(10)[None], torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(KernelInputError, match=r"wanted rows \[B, H, N, D\], orders \[orders, M\] and picked"):
        dk.move_rows(x, orders=order[0], picked=picked)
    with pytest.raises(KernelInputError, match=r"wanted picked .2 or 1, 3 or 1.; got .3, 2."):
        dk.move_rows(x, orders=order, picked=picked.mT)
    with pytest.raises(KernelInputError, match=r"as int64 .* got torch.float32 on cpu, torch.int64 .*, torch.int32"):
        dk.restore_rows(x, order, picked.int())
    with pytest.raises(KernelInputError, match=r"wanted constant \(2, 3, 1, 8\) on cpu .* got \(2, 3, 8\) on cpu"):
        dk.restore_rows(x, correction=dk.Correction(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8)))
    with pytest.raises(KernelInputError, match="wanted by_output with constant"):
        dk.restore_rows(x, correction=dk.Correction(torch.zeros(2, 3, 8, 8)))
    with pytest.raises(KernelInputError, match=r"wanted exact \(2, 3, 4, 8\) .* got torch.float32 \(2, 3, 10, 8\)"):
        dk.fit_rows(x, x, torch.arange(4))
    kept = {"codes": torch.zeros(2, 3, 10, 2, dtype=torch.int8), "scale": x, "basis": torch.zeros(2, 3, 2, 8)}
    with pytest.raises(KernelInputError, match=r"wanted scale \(2, 3, 10, 1\)"):
        dk.fit_rows(x[:, :, :4], x, torch.arange(4), **kept)


@pytest.mark.parametrize(
    "kernel", [rows.move, rows.restore, fit.judge, fit.combine], ids=lambda kernel: kernel.__name__
)
def test_no_prompt_waits_for_a_compiler(kernel: Any) -> None:
    """Its length may or may not be a multiple of 16."""
    general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    assert general >= {"length", "tokens", "n"} & set(kernel.arg_names)


def test_nothing_to_do_costs_nothing() -> None:
    x = torch.randn(2, 3, 10, 8)
    assert dk.restore_rows(x) is x
    assert dk.restore_rows(x, correction=dk.Correction()) is x


def test_ops_are_opaque_to_a_compiler() -> None:
    """Their fakes have the shapes, dtypes and strides of what they give."""
    x, order, picked = torch.randn(2, 3, 40, 8).bfloat16(), torch.randperm(40)[None], torch.zeros(1, 1).long()
    codes, scale = torch.ones(2, 3, 40, 2, dtype=torch.int8), torch.ones(2, 3, 40, 1).bfloat16()
    kept = codes, scale, torch.randn(2, 3, 2, 8)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    check = partial(torch.library.opcheck, test_utils=tests)
    check(ops.move_rows, ([x, x], order, picked))
    for correction in ([], list(dk.Correction(x[:, :, :8], x[:, :, :1], *kept))):
        check(ops.restore_rows, (x, order, picked, correction))
    check(ops.restore_rows, (x, None, None, list(dk.Correction(None, None, *kept))))
    for given in ((None,) * 3, kept):
        check(ops.fit_rows, (x[:, :, :32], x, torch.arange(32), *given))
