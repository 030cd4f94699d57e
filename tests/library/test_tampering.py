"""Plans and presets are data from strangers: whatever is changed in them, it is a PlanError, or changes nothing.

What a forger seals anew is another plan: a PlanError too, or one that runs to its end.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from diffsparse import PARO, Layout, Preset, SparseVDiT
from diffsparse.errors import PlanError
from diffsparse.plans import sealed
from diffsparse.plans.plan import Plan
from diffsparse.strategies.paro.strategy import pack
from diffsparse.strategies.planned import Planned
from support.sites import site

LAYOUT = Layout(2, 4, 5)
LAYER = "transformer.blocks.0.attn1"
HEADS, BLOCK = 2, 8
BLOCKS = LAYOUT.blocks(BLOCK)
MANY = settings(deadline=None, max_examples=60, derandomize=True)


def paro() -> PARO:
    masks = pack(torch.ones(2, HEADS, BLOCKS, BLOCKS, dtype=torch.bool).tril())
    tensors = {f"{LAYER}.masks": masks, f"{LAYER}.orders": torch.tensor([0, 1], dtype=torch.uint8)}
    knobs = {"sparsity": 0.5, "block": BLOCK, "groups": 2, "orders": ["HWF", "tile2x2x2"], "metric": "recall"}
    return PARO(Plan("paro", {"transformer": "Wan:0"}, LAYOUT, knobs, tensors))


def vdit() -> SparseVDiT:
    modes = torch.tensor([[0, 4], [2, 3], [1, 0]], dtype=torch.uint8)
    tensors = {f"{LAYER}.modes": modes, f"{LAYER}.columns": torch.linspace(0, 1, HEADS * BLOCKS).view(HEADS, BLOCKS)}
    knobs = {"sparsity": 0.5, "block": BLOCK, "groups": None, "modes": ["skip", "stripe"], "costs": [0.0, 0.5]}
    return SparseVDiT(Plan("sparse-vdit", {"transformer": "Wan:0"}, LAYOUT, knobs, tensors))


PLANS: dict[str, Planned] = {"paro": paro(), "sparse-vdit": vdit()}
ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**63,
    10**4000,
    0.5,
    -0.0,
    1e308,
    "",
    "8",
    "HWF",
    "\x00",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
]
VALUES = st.recursive(
    st.sampled_from(ODD)
    | st.integers(-3, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
DTYPES = [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES += [torch.complex64, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16]


Answer = list[torch.Tensor]


def answer(strategy: Planned) -> Answer:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, LAYOUT.tokens, 8, generator=generator)
    return [strategy.attend(q, k, v, site(LAYOUT, step=step)) for step in (0, 9)]


def same(found: Answer | None, name: str) -> bool:
    """Whether a plan was refused, or attends as it did before it was changed."""
    return found is None or all(map(torch.equal, found, answer(PLANS[name])))


def ends(found: Answer | None) -> bool:
    """Whether a plan was refused, or attends to something."""
    return found is None or all(bool(out.isfinite().all()) for out in found)


def loaded(name: str, path: Path, data: bytes) -> Answer | None:
    """What a file's plan attends to; None where it is refused. Any other error is a failure of the test."""
    path.write_bytes(data)
    try:
        strategy = type(PLANS[name]).load(path)
        strategy.facts()
        return answer(strategy)
    except PlanError:
        return None


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested dictionaries and lists."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any, how: str) -> Any:
    """A copy in which the value at a path is replaced or removed, or has something new beside it."""
    if not at:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if len(at) > 1 or how == "replace":
        copy[at[0]] = changed(value[at[0]], at[1:], new, how)
    elif how == "remove":
        del copy[at[0]]
    elif isinstance(copy, dict):
        copy[f"{at[0]}+"] = new
    else:
        copy.insert(at[0], new)
    return copy


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The safetensors header, that of the plan read from its JSON, and the tensors' bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    return header, data[8 + size :]


def joined(header: Any, tail: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tail


@pytest.mark.parametrize("name", PLANS)
@MANY
@given(data=st.data())
def test_bytes(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = bytearray(PLANS[name].plan.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(whole) - 1))
        how = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "remove"]))
        if how == "flip":
            whole[place] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "set":
            whole[place] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del whole[max(place, 1) :]
        elif how == "insert":
            whole[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del whole[place : place + data.draw(st.integers(0, len(whole) - 1))]
    found = loaded(name, tmp_path_factory.getbasetemp() / f"bytes-{name}", bytes(whole))
    assert same(found, name)


@pytest.mark.parametrize("sealed_anew", [False, True])
@pytest.mark.parametrize("name", PLANS)
@MANY
@given(data=st.data())
def test_values_of_the_header(
    sealed_anew: bool, name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    strategy = PLANS[name]
    header, tail = parts_of(strategy.plan.to_bytes())
    values = json.loads(header["__metadata__"]["diffsparse"])
    if sealed_anew:
        del values["format"], values["digest"]
    at = data.draw(st.sampled_from([place for place in places(values) if place or not sealed_anew]))
    values = changed(values, at, data.draw(VALUES), data.draw(st.sampled_from(["replace", "remove", "add"])))
    if sealed_anew:
        values = sealed.seal(values, strategy.plan.tensors)
    header["__metadata__"]["diffsparse"] = json.dumps(values)
    found = loaded(name, tmp_path_factory.getbasetemp() / f"header-{name}", joined(header, tail))
    assert ends(found) if sealed_anew else same(found, name)


@pytest.mark.parametrize("name", PLANS)
@MANY
@given(data=st.data())
def test_what_safetensors_says_of_the_tensors(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header, tail = parts_of(PLANS[name].plan.to_bytes())
    at = data.draw(st.sampled_from([place for place in places(header) if place]))
    header = changed(header, at, data.draw(VALUES), data.draw(st.sampled_from(["replace", "remove", "add"])))
    found = loaded(name, tmp_path_factory.getbasetemp() / f"shapes-{name}", joined(header, tail))
    assert same(found, name)


@pytest.mark.parametrize("name", PLANS)
@MANY
@given(data=st.data())
def test_tensors_that_are_sealed_anew(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    plan = PLANS[name].plan
    tensors = {key: tensor.clone() for key, tensor in plan.tensors.items()}
    key = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["values", "dtype", "shape", "name", "gone", "all gone"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    if how == "values":
        bits = torch.randint(0, 256, (tensors[key].nbytes,), dtype=torch.uint8, generator=generator)
        tensors[key] = bits.view(tensors[key].dtype).view(tensors[key].shape)
    elif how == "dtype":
        tensors[key] = tensors[key].to(data.draw(st.sampled_from(DTYPES)))
    elif how == "shape":
        shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
        tensors[key] = torch.zeros(shape, dtype=tensors[key].dtype)
    elif how == "name":
        tensors[data.draw(st.text(max_size=4)) + key] = tensors.pop(key)
    elif how == "gone":
        del tensors[key]
    else:
        tensors.clear()
    values = sealed.seal(plan._header(), tensors)
    file = save(tensors, metadata={"diffsparse": json.dumps(values)})
    found = loaded(name, tmp_path_factory.getbasetemp() / f"tensors-{name}", file)
    assert ends(found)


PRESET = Preset(("0.0", "1.1"), 0.5, 2.0, "uniform", models={"transformer": "Wan:0"}, about={"score": {"all": 1.5}})


@MANY
@given(data=st.data())
def test_presets(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "preset.json"
    PRESET.save(file)
    if data.draw(st.booleans()):
        values = json.loads(file.read_text())
        at = data.draw(st.sampled_from(list(places(values))))
        values = changed(values, at, data.draw(VALUES), data.draw(st.sampled_from(["replace", "remove", "add"])))
        file.write_text(json.dumps(values))
    else:
        whole = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(whole)
    with contextlib.suppress(PlanError):
        assert Preset.load(file) == PRESET
