"""The walk: every transformer class of the installed Diffusers is sparse, or an exception with a reason.

Sparse is what attends sparsely and, under `Dense()`, changes no bit. A class that is neither fails here as new:
`python -m support.walk` lists them all, `make walk DIFFUSERS=...` does so for another release.
"""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch

import diffsparse
from diffsparse import Dense, Random
from diffsparse.errors import UnsupportedModelError
from diffsparse.seam.targets import attentions
from diffsparse.site.report import Report
from support import walk
from support.oracle import ALWAYS, LEFT_ALONE, same, unchanged
from support.tiny_newer import MODES
from support.tiny_transformers import CASES, OTHER, Inputs, Shape, build, case_of, inputs, made, tensors

CLASSES = walk.classes()
ENOUGH = 60  # of the 75 transformers and 4 such controlnets of Diffusers 0.42
# Whose dense calls are not of the latents: text that sees what is before it, conditions among themselves.
BESIDE: dict[str, set[str]] = {}
NOISE = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile",  # some have masks for it alone
    "ignore:.*none of its attention was recognised",
)


def todo(names: list[str]) -> list[Any]:
    """The names as parameters; what is pending must fail, or its row in `walk.PENDING` goes."""
    pending = {
        name: pytest.mark.xfail(strict=True, reason=walk.PENDING[name]) for name in names if name in walk.PENDING
    }
    return [pytest.param(name, marks=[pending[name]] if name in pending else []) for name in names]


def sparse_run(model: torch.nn.Module, kwargs: Inputs) -> Report:
    with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS) as handle:
        tensors(model, kwargs)
        return handle.report()


def hold_sparse(name: str, model: torch.nn.Module, kwargs: Inputs) -> None:
    """It attends sparsely, all its attention is accounted for, and nothing is dense that needn't be."""
    report = sparse_run(model, kwargs)
    seen = {call.layer for call in report.calls}
    assert report.sparse_calls > 0, report.fallbacks
    assert set(report.fallbacks) <= BESIDE.get(name, set())
    assert not [path for path, _ in attentions(model) if path not in seen and not LEFT_ALONE.search(path)]


def of_mode(mode: str, shape: Shape = Shape()) -> Inputs:  # noqa: B008
    torch.manual_seed(0)
    return MODES[mode].inputs(shape)


def in_mode(mode: str) -> torch.nn.Module:
    model = made(MODES[mode].name, {**case_of(MODES[mode].name).config, **MODES[mode].config})
    MODES[mode].prepare(model)
    return model


def test_no_class_is_new() -> None:
    new = [f"{name} ({CLASSES[name].__module__})" for name in CLASSES if walk.state(name) == "new"]
    assert not new, (
        f"Diffusers has classes that nothing is known of: {', '.join(new)}. Wanted for each: a case in "
        "tests/support/tiny_newer.py (and, if this test then finds it dense, a row of SPECS in "
        "diffsparse/seam/models.py), or its reason in EXCEPTIONS of tests/support/walk.py and a case in tiny_outside.py"
    )


def test_no_class_has_two_states() -> None:
    assert not walk.EXCEPTIONS.keys() & walk.PENDING.keys()
    assert walk.PENDING.keys() <= CASES.keys() | MODES.keys()


@pytest.mark.xfail(bool(walk.PENDING.keys() & CASES.keys()), strict=True, reason="some are pending")
def test_enough() -> None:
    assert sum(walk.state(name) == "sparse" for name in CASES) >= ENOUGH


@NOISE
@pytest.mark.parametrize("name", CASES)
def test_dense_changes_no_bit(name: str) -> None:
    model = build(name)
    unchanged(model, lambda: tensors(model, inputs(name)), lambda: tensors(model, inputs(name, OTHER)))


@NOISE
@pytest.mark.parametrize("name", todo([name for name in CASES if name not in walk.EXCEPTIONS]))
def test_sparse(name: str) -> None:
    hold_sparse(name, build(name), inputs(name))


@NOISE
@pytest.mark.parametrize("mode", MODES)
def test_dense_changes_no_bit_in_any_mode(mode: str) -> None:
    model = in_mode(mode)
    unchanged(model, lambda: tensors(model, of_mode(mode)), lambda: tensors(model, of_mode(mode, OTHER)))


@NOISE
@pytest.mark.parametrize("mode", todo([*MODES]))
def test_sparse_in_any_mode(mode: str) -> None:
    hold_sparse(mode, in_mode(mode), of_mode(mode))


@NOISE
@pytest.mark.parametrize("name", walk.EXCEPTIONS)
def test_exceptions(name: str) -> None:
    """Refused; or dense, with a reason in the report or in a warning, and the same bits."""
    model = build(name)
    try:
        handle = diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS)
    except UnsupportedModelError:
        return
    handle.remove()
    want = tensors(model, inputs(name))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        report = sparse_run(model, inputs(name))
    told = report.fallbacks or [x for x in heard if "none of its attention was recognised" in str(x.message)]
    assert told, "dense, and nobody says so"
    assert report.sparse_calls == 0, "an exception no more: move its case to tiny_newer.py"
    with diffsparse.apply(model, Dense(), schedule=ALWAYS):
        assert same(tensors(model, inputs(name)), want)


def test_a_new_class_is_found() -> None:
    assert walk.state("SomethingNewTransformer3DModel") == "new"
    assert len(CLASSES) >= 60
    assert not [name for name in CLASSES if "Multi" in name and "ControlNet" in name]


def test_calls_are_read_off_the_pipelines() -> None:
    found = walk.guidance_styles(CLASSES)
    assert found["CogVideoXTransformer3DModel"] == ["a batch in `cond_uncond`"]
    assert found["HiDreamImageTransformer2DModel"] == ["a batch"]
    assert found["Lumina2Transformer2DModel"] == ["two calls"]
    assert found["OvisImageTransformer2DModel"] == ["two calls in `cond`, `uncond`"]
    assert "a guider's batches" in found["WanTransformer3DModel"]
    assert found["TransformerTemporalModel"] == []


def test_the_pages_are_of_this_walk() -> None:
    text = walk.PAGE.read_text()
    if f"from Diffusers {diffusers.__version__}" not in text:
        pytest.skip("docs/models.md is of another Diffusers")
    assert text == walk.page(), "run `python -m support.walk`"
    assert walk.short() in walk.README.read_text(), "run `python -m support.walk`"
