"""From an offline search to a run, for every strategy that has one: families, sizes, kills, refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffsparse
from diffsparse import PARO, Schedule, SparseVDiT
from diffsparse.errors import ConfigError, PlanError
from diffsparse.insight.calibration import calibrate
from diffsparse.plans import sealed
from diffsparse.plans.plan import fingerprints
from diffsparse.seam.targets import models_of
from diffsparse.strategies.paro import PAROSearch
from diffsparse.strategies.sparse_vdit import SparseVDiTSearch
from support.tiny_pipelines import BUILDERS, ODD, run

SEARCHES: dict[str, Any] = {
    "paro": (PAROSearch(0.5, block=8, groups=2, looks=2), PARO),
    "sparse-vdit": (SparseVDiTSearch(0.5, epsilon=0.8, block=8, looks=2), SparseVDiT),
}


@pytest.fixture(params=SEARCHES)
def searched(request: pytest.FixtureRequest) -> Any:
    return SEARCHES[request.param]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "odd"), [*((name, False) for name in BUILDERS), *((name, True) for name in ODD)])
def test_every_family_from_search_to_removal(name: str, odd: bool, searched: Any, tmp_path: Path) -> None:
    search, cls = searched
    pipe, kwargs = BUILDERS[name]()
    kwargs = {**kwargs, "num_inference_steps": 3, **(ODD[name] if odd else {})}
    before = run(pipe, kwargs)
    plan = calibrate(pipe, search, [lambda: run(pipe, kwargs)], ["one"], str(tmp_path / "plan.safetensors"))
    strategy = cls.load(tmp_path / "plan.safetensors")
    assert strategy == cls(plan)
    assert hash(strategy) == hash(cls(plan))
    with diffsparse.apply(pipe, strategy, schedule=Schedule(dense_first=1)) as handle:
        sparse = run(pipe, kwargs)
    report = handle.report()
    assert sparse.isfinite().all()
    assert report.sparse_calls > 0
    assert not report.fallbacks
    assert report.sparse_density == 1 or not torch.equal(sparse, before)  # Mochi has but one block here
    assert torch.equal(run(pipe, kwargs), before)


def test_eight_bits_on_a_model_with_padded_text(tmp_path: Path) -> None:
    pipe, kwargs = BUILDERS["hunyuan_video"]()
    search = PAROSearch(0.5, block=8, groups=2, looks=1, bits=8)
    plan = calibrate(pipe, search, [lambda: run(pipe, kwargs)], ["one"], tmp_path / "plan.safetensors")
    with diffsparse.apply(pipe, PARO(plan), schedule=Schedule(dense_first=1)) as handle:
        assert run(pipe, kwargs).isfinite().all()
    assert handle.report().backends["int8-int8 emulated"] == handle.report().sparse_calls > 0


class KilledError(BaseException):
    pass


def killed_after(forwards: int) -> Any:
    left = [forwards]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KilledError

    return hook


def test_a_search_that_was_killed_ends_with_the_same_plan(searched: Any, tmp_path: Path) -> None:
    search, _ = searched
    pipe, kwargs = BUILDERS["wan"]()
    names = ["a", "b"]
    prompts = [lambda: run(pipe, kwargs), lambda: run(pipe, kwargs, prompt="another thing")]  # 8 forward passes each
    whole = calibrate(pipe, search, prompts, names, tmp_path / "whole.safetensors")
    out, seen, starts = tmp_path / "parts.safetensors", [], []
    for forwards in (3, *torch.randint(1, 18, (6,)).tolist()):
        handle = pipe.transformer.blocks[0].register_forward_pre_hook(killed_after(forwards))
        starts.append(len(seen))
        with pytest.raises(KilledError):
            calibrate(pipe, search, prompts, names, out, seen.append)
        handle.remove()
        assert not out.exists()
        if seen[-1] >= 2:  # no kill can last through all that is left
            break
    starts.append(len(seen))
    plan = calibrate(pipe, search, prompts, names, out, seen.append)
    assert plan == whole
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert list(tmp_path.glob("*.partial")) == []
    assert seen[0] == 0
    assert 0 < seen[starts[-1]] < seen[-1] == 4  # it did go on
    with pytest.raises(ConfigError, match="one or more calls"):
        calibrate(pipe, search, [], [], out)


def test_a_search_that_an_earlier_release_has_begun_goes_on(tmp_path: Path) -> None:
    pipe, kwargs = BUILDERS["wan"]()
    search, out, seen = PAROSearch(0.5, block=8, groups=2, looks=2), tmp_path / "plan.safetensors", list[int]()
    calls = [lambda: run(pipe, kwargs), lambda: run(pipe, kwargs)]
    want = calibrate(pipe, search, calls, ["a", "b"], tmp_path / "whole.safetensors")
    handle = pipe.transformer.blocks[0].register_forward_pre_hook(killed_after(9))
    with pytest.raises(KilledError):
        calibrate(pipe, search, calls, ["a", "b"], out)
    handle.remove()
    partial = tmp_path / "plan.safetensors.partial"
    values, tensors = sealed.read(partial, "search", "")
    settings = [repr(search), fingerprints(models_of(pipe)), ["a", "b"]]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    assert values == {"key": key, "done": 1, "layout": vars(want.layout) | {"spans": [], "asked": []}}
    sealed.write(partial, values, tensors)
    assert calibrate(pipe, search, calls, ["a", "b"], out, seen.append) == want
    assert seen[0] == 1


def test_a_search_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    pipe, kwargs = BUILDERS["wan"]()
    out = tmp_path / "plan.safetensors"

    def fail() -> None:
        raise KeyboardInterrupt

    for search in (SparseVDiTSearch(block=8), SparseVDiTSearch(block=16), PAROSearch(block=8)):
        calls = [lambda: run(pipe, kwargs), fail]
        with pytest.raises(KeyboardInterrupt if search == SparseVDiTSearch(block=8) else ConfigError):
            calibrate(pipe, search, calls, ["a", "b"], out)


def test_runs_of_different_size_are_refused(searched: Any, tmp_path: Path) -> None:
    pipe, kwargs = BUILDERS["wan"]()
    calls = [lambda: run(pipe, kwargs), lambda: run(pipe, kwargs, num_frames=5)]
    with pytest.raises(PlanError, match="want one size"):
        calibrate(pipe, searched[0], calls, ["a", "b"], tmp_path / "plan.safetensors")


def test_runs_of_different_length_are_refused_where_steps_count(tmp_path: Path) -> None:
    pipe, kwargs = BUILDERS["wan"]()
    calls = [lambda: run(pipe, kwargs), lambda: run(pipe, kwargs, num_inference_steps=3)]
    with pytest.raises(PlanError, match="one number of steps; got 4 and 3"):
        calibrate(pipe, SparseVDiTSearch(block=8), calls, ["a", "b"], tmp_path / "plan.safetensors")
    calibrate(pipe, SparseVDiTSearch(block=8, groups=2), calls, ["a", "b"], tmp_path / "grouped.safetensors")
