"""Every script of the pipelines folder runs as it stands, on a small pipeline of its family saved to disk."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest

from support.tiny_pipelines import BUILDERS

SCRIPTS = sorted((Path(__file__).parents[2] / "pipelines").glob("*.py"))


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_script_for_each_family() -> None:
    assert {path.stem for path in SCRIPTS} == {name for name in BUILDERS if name != "wan22"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text().splitlines()) < 40
    pipe, call = BUILDERS[path.stem]()
    if path.stem == "cogvideox":  # as long as the pipeline's default prompt is padded
        pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config, max_text_seq_length=226)
    pipe.save_pretrained(tmp_path / "model")
    main = load(path).main
    takes = inspect.signature(main).parameters
    names = {"num_frames": "frames", "num_inference_steps": "steps"}
    given = {names.get(key, key): value for key, value in call.items() if key != "prompt"}
    size = {key: value for key, value in given.items() if key in takes}
    out = tmp_path / takes["out"].default
    main(model=str(tmp_path / "model"), out=str(out), **size)
    assert out.stat().st_size > 0
    assert "sparse" in capsys.readouterr().out
