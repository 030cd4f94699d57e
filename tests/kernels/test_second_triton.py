"""The kernels compile with the Triton of torch 2.11, too: what is compiled ahead of time, in a process that has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "3.6"
FOLDER = Path(sys.prefix) / f"triton-{VERSION}"
FILES = ("test_triton.py", "test_gluon.py", "test_eight_bits.py", "test_selection.py", "test_rows.py")
CODE = f"""
import sys, pytest, triton
assert triton.__version__.startswith("{VERSION}."), triton.__version__
assert triton.__file__.startswith(sys.argv[1]), triton.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"Triton {VERSION} is not in {FOLDER}: make test puts it there")
def test_ahead_of_time() -> None:
    """All but the second choices of the table of tiles: compiling takes a second for each kernel."""
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}
    options = ["-p", "no:cacheprovider", "-m", "aot", "-k", "not of_the_table"]
    command = [sys.executable, "-c", CODE, str(FOLDER), *options, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert counts["passed"] > 60, done.stdout
    assert "skipped" not in counts, done.stdout
