"""The examples in docstrings run as they are printed, on a toy."""

from __future__ import annotations

import doctest
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.modular_pipelines import WanBlocks

import diffsparse
import diffsparse_kernels
from diffsparse.seam import caching
from diffsparse_pipelines import tiny
from support.tiny_pipelines import BUILDERS

ENTRIES = ["HeadGuidance", "HeadHunter", "Inspector", "PAROSearch", "Preset", "Recorder", "SparseVDiTSearch"]
ENTRIES += ["Digest", "Handle.report", "Schedule", "accelerate", "apply", "calibrate", "guide", "hunt", "remove"]
KERNELS = ["BlockLists.from_mask", "block_sparse_attention", "record"]


class Small(WanPipeline):  # type: ignore[misc]
    def __call__(self, prompt: str, **options: Any) -> Any:
        size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "max_sequence_length": 16}
        return super().__call__(prompt, **size, **options)


def run(owner: object, name: str, **given: object) -> None:
    """The examples of one docstring, with these names at hand."""
    found = doctest.DocTestFinder(recurse=False).find(attrgetter(name)(owner), name, globs={})
    (test,) = (test for test in found if test.examples)
    test.globs = {"torch": torch, **given}
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


@pytest.mark.parametrize("name", ENTRIES)
def test_examples(name: str, tmp_path: Path) -> None:
    pipe, _ = BUILDERS["wan"]()
    pipe.__class__ = Small
    run(diffsparse, name, pipe=pipe, modular=WanBlocks().init_pipeline(), folder=tmp_path)


@pytest.mark.parametrize("name", KERNELS)
def test_examples_of_kernels(name: str) -> None:
    names = {each: getattr(diffsparse_kernels, each) for each in ("BlockLists", "block_sparse_attention")}
    run(diffsparse_kernels, name, **names)


def test_other_examples() -> None:
    run(tiny, "load")
    run(caching, "Caching", Caching=caching.Caching)
