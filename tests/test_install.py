"""What `pip install .` alone can do, with the packages of the extras hidden; and what commands say without them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

import diffsparse
import diffsparse_kernels
from diffsparse import errors
from diffsparse.cli import COMMANDS

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
IMPORTED_AS = {"scikit-image": "skimage"}
DIFFUSERS_BRINGS = {"pillow"}

HIDE = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""

APPLY = """
import torch
from diffusers import WanTransformer3DModel

import diffsparse
import diffsparse_kernels

diffsparse_kernels.break_even = lambda *_: 9.0  # so small, all of it would be faster dense
torch.manual_seed(0)
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=2, rope_max_seq_len=32,
).eval()
inputs = {
    "hidden_states": torch.randn(1, 4, 4, 16, 16), "timestep": torch.tensor([1]),
    "encoder_hidden_states": torch.randn(1, 4, 16),
}

@torch.no_grad()
def run():
    return model(**inputs).sample

dense = run()
schedule = diffsparse.Schedule(dense_first=0)
handle = diffsparse.apply(model, diffsparse.Random(sparsity=0.5, block=32), schedule=schedule)
sparse = run()
assert sparse.isfinite().all()
assert not torch.equal(sparse, dense)
assert handle.report().sparse_calls == 2, handle.report()
diffsparse.remove(model)
assert torch.equal(run(), dense)
"""


def modules(*extras: str) -> set[str]:
    """The top-level modules that extras bring."""
    named = {re.split(r"[\[<>=;]", requirement)[0] for extra in extras for requirement in EXTRAS[extra]}
    return {IMPORTED_AS.get(name, name).replace("-", "_") for name in named - DIFFUSERS_BRINGS - {"diffsparse"}}


def without(hidden: Iterable[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which some packages are not to be found."""
    program = HIDE.format(hidden=set(hidden)) + code
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # this checkout, whatever is installed
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )


def command(*arguments: str) -> str:
    """What the console script runs."""
    return f"from diffsparse.cli import main\nsys.argv = {['diffsparse', *arguments]}\nsys.exit(main())"


def test_the_extras_hold_what_they_name() -> None:
    assert "matplotlib" in modules("eval")
    assert {"typer", "transformers", "imageio_ffmpeg"} <= modules("cli")
    gone = without({"typer", "skimage"}, "import typer")
    assert "ModuleNotFoundError: No module named 'typer'" in gone.stderr


def test_the_library_works_without_the_extras() -> None:
    done = without(modules("cli", "eval", "lora"), APPLY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["diffsparse", "diffsparse_kernels"])
def test_every_public_name_comes_without_the_extras(package: str) -> None:
    code = f"import {package} as it\nfor name in it.__all__: getattr(it, name)"
    done = without(modules("cli", "eval", "lora"), code)
    assert done.returncode == 0, done.stderr


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert not done.stdout.strip()
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_without_any_extra_names_one_in_one_line(name: str) -> None:
    line = refused(without(modules("cli", "eval", "lora"), command(name)))
    assert re.search(r"diffsparse\[(cli|eval)\]", line), line


@pytest.mark.parametrize("name", ["evaluate", "inspect"])
def test_evaluation_without_its_extra_names_it_in_one_line(name: str, tmp_path: Path) -> None:
    line = refused(without(modules("eval"), command(name, "--model", "tiny-twin", "--out", str(tmp_path / "out"))))
    assert "diffsparse[eval]" in line
    assert not (tmp_path / "out").exists()  # said before anything is computed


@pytest.mark.parametrize("name", ["generate", "simulate", "bench", "doctor"])
def test_other_commands_work_without_the_extra_of_evaluation(name: str) -> None:
    done = without(modules("eval"), f"from diffsparse.cli import main\nmain([{name!r}, '--help'])")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", [diffsparse, diffsparse_kernels], ids=lambda package: package.__name__)
def test_only_public_names_show(package: object) -> None:
    shown = dir(package)
    assert shown == sorted(package.__all__)  # type: ignore[attr-defined]
    assert not [name for name in shown if name.startswith("_") or not hasattr(package, name)]


def test_the_names_that_others_rely_on_are_there() -> None:
    promised = {
        *("apply", "remove", "guide", "calibrate", "hunt", "Inspector", "HeadGuidance", "HeadHunter", "Strategy"),
        *("Dense", "AdaSpa", "Random", "PARO", "PAROSearch", "SparseVDiT", "SparseVDiTSearch", "GNA", "Digest"),
        *("Compensated", "Layout", "Schedule", "Site", "Handle", "GuideHandle", "Preset", "Report"),
        *("Recorder", "Recording"),
    }
    raised = {name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, Exception)}
    assert promised | raised <= set(dir(diffsparse))
    assert {"block_sparse_attention", "BlockLists"} <= set(dir(diffsparse_kernels))
