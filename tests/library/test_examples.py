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
from support.tiny_pipelines import BUILDERS

ENTRIES = ["HeadGuidance", "HeadHunter", "Inspector", "PAROSearch", "Preset", "Recorder", "SparseVDiTSearch"]
ENTRIES += ["calibrate", "guide", "hunt"]


class Small(WanPipeline):  # type: ignore[misc]
    def __call__(self, prompt: str, **options: Any) -> Any:
        size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "max_sequence_length": 16}
        return super().__call__(prompt, **size, **options)


@pytest.mark.parametrize("name", ENTRIES)
def test_examples(name: str, tmp_path: Path) -> None:
    pipe, _ = BUILDERS["wan"]()
    pipe.__class__ = Small
    found = doctest.DocTestFinder(recurse=False).find(getattr(diffsparse, name), name, globs={})
    (test,) = (test for test in found if test.examples)
    modular = WanBlocks().init_pipeline()
    test.globs = {"pipe": pipe, "modular": modular, "folder": tmp_path, "torch": torch}
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
