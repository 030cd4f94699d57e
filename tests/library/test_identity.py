"""`Dense()` changes no bit: on classes, on pipelines, at every call, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import Dense, DiffsparseError, Schedule
from support import tiny_transformers
from support.tiny_pipelines import BUILDERS, run
from support.tiny_transformers import CASES, OTHER, Shape, build, inputs, tensors

# Their queries and keys differ in number, their tokens have no known order, or text shares every layer's call.
UNTOUCHED = {
    "Ideogram4Transformer2DModel",
    "LuminaNextDiT2DModel",
    "NucleusMoEImageTransformer2DModel",
    "PRXTransformer2DModel",
}
FIXED_SIZE = {"HunyuanDiT2DModel", "LatteTransformer3DModel", "LuminaNextDiT2DModel"}
ALWAYS = Schedule(dense_first=0)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def processors(model: torch.nn.Module) -> list[tuple[object, type]]:
    found = [getattr(module, "processor", None) for module in model.modules()]
    return [(p, type(p)) for p in found if p is not None]


def test_enough_classes_are_proven() -> None:
    assert len(CASES.keys() - UNTOUCHED) >= 40


@pytest.mark.filterwarnings("ignore:.*none of its attention was recognised")
@pytest.mark.parametrize("name", CASES)
def test_transformers(name: str) -> None:
    model, twin = build(name), build(name)
    small, large = inputs(name), inputs(name, OTHER)
    want, want_large, before = tensors(model, small), tensors(model, large), processors(model)
    assert all(x.isfinite().all() for x in want)
    handle = diffsparse.apply(model, Dense(), schedule=ALWAYS)
    assert same(tensors(model, small), want)
    assert bool(handle.report().dense_calls) != (name in UNTOUCHED)
    assert same(tensors(model, small), want), "second call"
    assert same(tensors(model, large), want_large), "another shape"
    assert same(tensors(twin, small), want), "a second model of the class"
    assert [cls for _, cls in processors(twin)] == [cls for _, cls in before]
    handle.remove()
    assert same(tensors(model, small), want), "after removal"
    after = processors(model)
    assert all(a is b and x is y for (a, x), (b, y) in zip(after, before, strict=True))
    assert not [m for m in model.modules() if "_diffsparse" in {**vars(m), **m._modules} or "forward" in vars(m)]


class Spy:
    """Runs dense and remembers where the tokens were, and the keys of the first call of each layer."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Any, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        self.calls.setdefault(site.layer, (site.layout, k.clone()))
        return site.dense(q, k, v, reason="watched")


def watch(name: str, kwargs: dict[str, Any]) -> dict[str, tuple[Any, Tensor]]:
    model, spy = build(name), Spy()
    with diffsparse.apply(model, spy, schedule=ALWAYS):
        tensors(model, kwargs)
    return spy.calls


@pytest.mark.parametrize("shape", [Shape(), OTHER], ids=["small", "large"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.layout])
def test_layouts(name: str, shape: Shape) -> None:
    """Joint layers are read as the table of this test has it; other layers see the same grid without text."""
    shape = Shape() if name in FIXED_SIZE else shape
    want = CASES[name].layout(shape)  # type: ignore[misc]
    found = {
        (x.frames, x.height, x.width, x.text_before, x.text_after) for x, _ in watch(name, inputs(name, shape)).values()
    }
    assert want in found
    assert found <= {want, (*want[:3], 0, 0)}


# Mochi pools its text into the modulation of all tokens: there the words are everywhere.
JOINT = [
    name
    for name, case in CASES.items()
    if case.layout and sum(case.layout(Shape())[3:]) and name != "MochiTransformer3DModel"
]


@pytest.mark.parametrize("name", JOINT)
def test_text_is_where_the_layout_says(name: str) -> None:
    """Other words change the keys of the first joint layer in its text rows, and in no other."""
    first, other = inputs(name), inputs(name)
    for part in ("encoder_hidden_states", "text_bth"):
        if part in other:
            torch.manual_seed(1)
            other[part] = torch.randn_like(other[part])
    a, b = watch(name, first), watch(name, other)
    layer = next(layer for layer, (layout, _) in a.items() if layout.text_before + layout.text_after)
    layout, keys = a[layer]
    changed = (keys != b[layer][1]).flatten(3).any(-1).any(1)[0].nonzero().flatten()
    text = [*range(layout.text_before), *range(layout.tokens - layout.text_after, layout.tokens)]
    assert len(changed)
    assert set(changed.tolist()) <= set(text)


@pytest.mark.parametrize("name", BUILDERS)
def test_pipelines(name: str) -> None:
    pipe, call = BUILDERS[name]()
    want = run(pipe, call)
    again = run(pipe, call)
    assert same(again, want), "the untouched pipeline repeats itself"
    handle = diffsparse.apply(pipe, Dense(), schedule=ALWAYS)
    assert same(run(pipe, call), want)
    assert handle.report().dense_calls > 0
    assert same(run(pipe, call), want), "second call"
    handle.remove()
    assert same(run(pipe, call), want), "after removal"


def test_nothing_to_adopt_is_an_error_that_lists_what_is_supported() -> None:
    with pytest.raises(DiffsparseError, match=r"Wanted: a pipeline .*Wan, HunyuanVideo"):
        diffsparse.apply(torch.nn.Linear(2, 2), Dense())
    with pytest.raises(DiffsparseError, match="holds no transformer"):
        diffsparse.apply(object(), Dense())


def test_attention_that_is_not_recognised_is_told() -> None:
    """Silence would look like a speed-up of one."""
    model, kwargs = build("PRXTransformer2DModel"), inputs("PRXTransformer2DModel")
    with diffsparse.apply(model, Dense()):
        tensors(model, kwargs)
        with pytest.warns(UserWarning, match="none of its attention was recognised"):
            tensors(model, kwargs)
    with diffsparse.apply(model, Dense(), strict=True):
        tensors(model, kwargs)
        with pytest.raises(DiffsparseError, match="strict=False"):
            tensors(model, kwargs)


def test_inputs_are_reproducible() -> None:
    """The oracle of this file compares calls: their inputs must be the same."""
    for name in ("WanTransformer3DModel", "FluxTransformer2DModel"):
        a, b = tiny_transformers.inputs(name), tiny_transformers.inputs(name)
        assert all(torch.equal(x, b[key]) for key, x in a.items() if torch.is_tensor(x))
