"""The examples in docstrings run as they are printed, on a toy."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.modular_pipelines import WanBlocks

import diffsparse
from diffsparse.guidance.hunt import HeadHunter, hunt
from diffsparse.insight.calibration import calibrate
from diffsparse.insight.inspection import Inspector
from diffsparse.strategies.paro import PAROSearch
from diffsparse.strategies.sparse_vdit import SparseVDiTSearch
from support.tiny_pipelines import BUILDERS

ENTRIES: list[Any] = [calibrate, hunt, HeadHunter, Inspector, PAROSearch, SparseVDiTSearch]
ENTRIES += [diffsparse.HeadGuidance, diffsparse.Preset, diffsparse.guide]


class Small(WanPipeline):  # type: ignore[misc]
    def __call__(self, prompt: str, **options: Any) -> Any:
        size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "max_sequence_length": 16}
        return super().__call__(prompt, **size, **options)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_examples(entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = BUILDERS["wan"]()
    pipe.__class__ = Small
    monkeypatch.setattr(diffsparse, entry.__name__, entry, raising=False)
    monkeypatch.setattr(diffsparse, "calibrate", calibrate, raising=False)
    monkeypatch.setattr(diffsparse, "HeadHunter", HeadHunter, raising=False)
    monkeypatch.setattr(diffsparse, "PAROSearch", PAROSearch, raising=False)
    found = doctest.DocTestFinder(recurse=False).find(entry, entry.__name__, globs={})
    (test,) = (test for test in found if test.examples)
    modular = WanBlocks().init_pipeline()
    test.globs = {"pipe": pipe, "modular": modular, "folder": tmp_path, "torch": torch}
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
