"""The seam on the lowest Diffusers that is supported, in a process that has it; the environment's is the highest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "0.40"
FOLDER = Path(sys.prefix) / f"diffusers-{VERSION}"
FILES = ("test_identity.py", "test_walk.py")
CODE = f"""
import sys, pytest
from importlib.metadata import version
assert version("diffusers").startswith("{VERSION}."), version("diffusers")
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"Diffusers {VERSION} is not in {FOLDER}: make test puts it there")
def test_identity_and_the_walk() -> None:
    """Classes that it lacks are left out by name."""
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", CODE, "-p", "no:cacheprovider", "-p", "no:anyio", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed)", done.stdout)}
    assert counts["passed"] > 300, done.stdout
