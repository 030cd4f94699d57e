"""The kernels of a selection without a GPU: right in the interpreter, and compiled ahead of time for every chip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from diffsparse_kernels import select
from diffsparse_kernels.backend.triton import selection
from support import aot


def test_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_selection.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@aot.compiles
@pytest.mark.parametrize("columns", [100, 2000])
@pytest.mark.parametrize(
    "name", ["count_first", "count_second", "count_third", "write_lists", "unpack_bits", "order_lists"]
)
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_ahead_of_time(chip: int, name: str, columns: int) -> None:
    """Integers: no tensor cores, no spills in loops, little shared memory, so that many programs run side by side."""
    kernel = getattr(selection, name)
    constants = {"OCTAVES": select.OCTAVES, "RUNS": 1024, "ROWS": selection.ORDERED_ROWS}
    constants |= selection.constants(columns, always=True)
    types = dict.fromkeys(("best_ptr", "equal_ptr", "work_ptr"), "*i32") | {"error_ptr": "*fp32", "counts_ptr": "*i64"}
    types |= dict.fromkeys(("always_ptr", "bits_ptr"), "*u8")
    own = {key: value for key, value in constants.items() if key in kernel.arg_names}
    found = aot.compiled(kernel, chip, own, selection.WARPS, 3, **types)
    assert found.stack <= 32
    assert not found.spilling
    assert found.shared <= 8 * 2**10
