"""Recorded attention is, to the bit, what strategies were given; a file gives it back, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import Dense, Layout, Random, Recorder, Recording, Schedule
from diffsparse.errors import ConfigError, InputFileError
from diffsparse.insight.recording import paired_steps
from diffsparse.plans import sealed
from support.sites import site
from support.tiny_pipelines import BUILDERS, run

GIVEN = dict[tuple[str, str, int], tuple[Tensor, Tensor, Tensor, Tensor | None]]


class Given:
    """Dense attention that keeps what it is given first at each place, as it is."""

    needs_grid = True

    def __init__(self) -> None:
        self.calls: GIVEN = {}
        self.most = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        self.most = max(self.most, len(q))
        kept = q.clone(), k.clone(), v.clone(), site.key_mask
        self.calls.setdefault((site.model, site.layer, site.step), kept)
        return site.dense(q, k, v)


def run_with(name: str, strategy: Any) -> Tensor:
    pipe, call = BUILDERS[name]()
    with diffsparse.apply(pipe, strategy, schedule=Schedule(0)):
        return run(pipe, call)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "flux"])
def test_what_is_recorded_is_what_strategies_get(name: str, tmp_path: Path) -> None:
    given = Given()
    recorder = Recorder(given, {1, 2}, layers=(0, 1), heads=(1,))
    plain, watched = run_with(name, Dense()), run_with(name, recorder)
    assert torch.equal(plain, watched)
    recorder.recording({"model": name}).save(tmp_path / "a.safetensors")
    recording = Recording.load(tmp_path / "a.safetensors")
    assert recording.about == {"model": name}
    assert len(recording.calls) == 4
    for call in recording.calls:
        *qkv, mask = given.calls[call.place.model, call.place.layer, call.place.step]
        for x, was in zip((call.q, call.k, call.v), qkv, strict=True):
            assert torch.equal(x, was[-1:, 1:2].bfloat16())
        assert (call.key_mask is None) == (mask is None)
        assert mask is None or torch.equal(call.key_mask, mask[-1:])  # type: ignore[arg-type]
        assert call.place.steps == 4
        assert (call.heads, call.all_heads) == ((1,), qkv[0].shape[1])
    if name == "cogvideox":
        assert given.most == 2, "both halves of the guidance are in one batch"


def watch(recorder: Recorder, layers: int = 6, modules: int = 12, steps: int = 5, first: int = 0) -> None:
    """Runs of a model of which every second attention module is self-attention."""
    layout = Layout(1, 3, 3)
    for step in range(first, steps):
        for index in range(0, 2 * layers, 2):
            place = site(layout, step, steps, layer=f"blocks.{index}")
            for name, value in (("index", index), ("layers", modules)):
                object.__setattr__(place, name, value)
            recorder.attend(*torch.randn(3, 1, 5, 9, 4), place)


def recorded(recorder: Recorder) -> set[tuple[int, int]]:
    return {(call.number, call.place.step) for call in recorder.recording().calls}


@pytest.mark.parametrize(("count", "numbers"), [(1, {3}), (2, {2, 5}), (3, {1, 3, 5}), (5, {1, 2, 3, 4, 5})])
def test_layers_are_spread_over_those_that_run(count: int, numbers: set[int]) -> None:
    recorder = Recorder(Dense(), {0, 3}, layers=count)
    watch(recorder)
    assert recorded(recorder) == {(number, step) for number in numbers for step in (0, 3)}


def test_layers_and_heads_are_chosen_by_number() -> None:
    recorder = Recorder(Dense(), {2}, layers={0, 4}, heads=(0, 3))
    watch(recorder)
    assert recorded(recorder) == {(0, 2), (4, 2)}
    assert {call.heads for call in recorder.calls} == {(0, 3)}
    spread = Recorder(Dense(), {2}, heads=2)
    watch(spread)
    assert {call.heads for call in spread.calls} == {(1, 3)}


@pytest.mark.parametrize("steps", [2, 3, 4, 15, 50])
def test_steps_come_in_pairs(steps: int) -> None:
    for pairs in (1, 2, 3):
        found = paired_steps(steps, pairs)
        assert found <= set(range(steps))
        assert all(step + 1 in found or step - 1 in found for step in found)
        assert len(found) == 2 * pairs or steps < 4 * pairs


def test_a_run_of_one_step_has_no_pair() -> None:
    with pytest.raises(ConfigError, match="a run of at least 2; got 1"):
        paired_steps(1, 2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": {3, 5}}, "steps want to be some of 0 to 4; got 3, 5"),
    "heads": ({"heads": (5,)}, "heads want to be some of 0 to 4; got 5"),
    "layers": ({"layers": (1, 6)}, "layers want to be some of 0 to 5; got 1, 6"),
    "size": ({"most": 1e-7}, r"would take 0\.0 GiB, and 1e-07 GiB are allowed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused_before_the_second_step_ends(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        watch(Recorder(Dense(), **{"steps": {0}, **arguments}))


def test_a_run_that_reaches_no_recorded_step() -> None:
    recorder = Recorder(Dense(), {0})
    watch(recorder, first=1)
    with pytest.raises(ConfigError, match="nothing was recorded at steps 0"):
        recorder.recording()


def test_the_size_is_told_beforehand(tmp_path: Path) -> None:
    told: list[int] = []
    recorder = Recorder(Dense(), {0, 1}, layers=3, announce=told.append)
    watch(recorder)
    held = sum(x.nbytes for call in recorder.calls for x in call.tensors.values())
    assert told == [held]
    recorder.recording().save(tmp_path / "a.safetensors")
    assert 0 <= (tmp_path / "a.safetensors").stat().st_size - held < 6000


def test_another_strategy_may_run_meanwhile() -> None:
    strategy = Random(0.5, block=8, order="WHF")
    assert torch.equal(run_with("wan", strategy), run_with("wan", Recorder(strategy, {1})))


# --- files that are none --------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    recorder = Recorder(Dense(), {0, 1}, layers=1)
    watch(recorder)
    recorder.recording().save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def refused(file: Path) -> str:
    with pytest.raises(InputFileError) as error:
        Recording.load(file)
    assert "diffsparse inspect --record" in str(error.value)
    return str(error.value)


def test_no_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.safetensors")


@pytest.mark.parametrize("place", [0.01, 0.5, 0.99])
def test_a_damaged_file(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 8
    file.write_bytes(data)
    refused(file)
    file.write_bytes(data[: len(data) // 2])
    refused(file)


def test_a_file_of_something_else(file: Path) -> None:
    sealed.write(file, {"strategy": "paro"}, {"a": torch.zeros(2)})
    assert "is no recording" in refused(file)
    file.write_text("hello")
    refused(file)


def test_a_file_of_a_later_release(file: Path) -> None:
    values, tensors = sealed.read(file, "recording", "")
    sealed.write(file, {**values, "recording": 2}, tensors)
    assert "of a later release (format 2, here it is 1)" in refused(file)


def lacking(values: Any, tensors: Any) -> None:
    del tensors["0.k"]


def strange_tensor(values: Any, tensors: Any) -> None:
    tensors["0.w"] = tensors["0.q"].clone()


def of_no_call(values: Any, tensors: Any) -> None:
    tensors["9.q"] = tensors["0.q"].clone()


def another_layout(values: Any, tensors: Any) -> None:
    values["calls"][0]["layout"]["width"] = 4


def another_dtype(values: Any, tensors: Any) -> None:
    tensors["0.v"] = tensors["0.v"].float()


def numbered_mask(values: Any, tensors: Any) -> None:
    tensors["0.key_mask"] = torch.ones(1, 9, dtype=torch.int32)


def without_heads(values: Any, tensors: Any) -> None:
    del values["calls"][0]["heads"]


def without_calls(values: Any, tensors: Any) -> None:
    del values["calls"]


def no_list(values: Any, tensors: Any) -> None:
    values["calls"] = 3


FORGED = (lacking, strange_tensor, of_no_call, another_layout, another_dtype, numbered_mask, without_heads)


@pytest.mark.parametrize("change", [*FORGED, without_calls, no_list])
def test_a_file_that_makes_no_sense(file: Path, change: Any) -> None:
    values, tensors = sealed.read(file, "recording", "")
    change(values, tensors)
    sealed.write(file, values, tensors)
    refused(file)
