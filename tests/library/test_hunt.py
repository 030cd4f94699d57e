"""HeadHunter: greedy as the paper writes it, best against brute force, the same heads after a kill."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffsparse
from diffsparse import Preset
from diffsparse.errors import ConfigError, InputFileError
from diffsparse.guidance.heads import names_of, resolve
from diffsparse.guidance.hunt import HeadHunter, hunt
from diffsparse.plans.plan import fingerprints
from diffsparse.seam.hooks import run_of
from diffsparse.seam.targets import models_of
from support.tiny_transformers import build, inputs, tensors

WAN = "WanTransformer3DModel"
PAIRS = [("one", 0), ("two", 1)]


class Stage:
    """A small model, a way to run it, and an objective with a worth for each head and for each pair of them."""

    def __init__(self, worth: dict[str, float], together: dict[frozenset[str], float] | None = None) -> None:
        self.model, self.kwargs = build(WAN), inputs(WAN)
        self.worth, self.together = worth, together or {}
        self.pool = names_of(self.model)
        self.trials: list[tuple[str, ...]] = []
        self.guided: tuple[str, ...] = ()
        self.fails_at = -1

    def render(self, pairs: Sequence[tuple[str, int]]) -> list[np.ndarray]:
        run: Any = run_of(self.model)
        heads = run.guidance.preset.heads if run is not None else ()
        if len(self.trials) == self.fails_at:
            raise KeyboardInterrupt
        self.trials.append(heads)
        self.guided = heads
        return [np.full((1, 2, 2, 3), seed, dtype=np.float32) for _, seed in pairs]

    def value(self, heads: Sequence[str]) -> float:
        pairs = (frozenset(pair) for pair in itertools.combinations(heads, 2))
        return sum(self.worth[head] for head in heads) + sum(self.together.get(pair, 0.0) for pair in pairs)

    def objective(self, clips: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        assert list(prompts) == [prompt for prompt, _ in PAIRS]
        return [self.value(self.guided) + float(clip.mean()) for clip in clips]

    def hunt(self, out: Path, hunter: HeadHunter, **more: Any) -> Preset:
        options: dict[str, Any] = {"render": self.render, "objective": self.objective, "pairs": PAIRS, **more}
        return hunt(self.model, hunter, self.pool, out=out, **options)


def random_stage(seed: int, pairs: bool = False) -> Stage:
    lot = np.random.default_rng(seed)
    pool = names_of(build(WAN))
    together = {frozenset(p): float(lot.normal()) for p in itertools.combinations(pool, 2)} if pairs else {}
    return Stage({head: float(lot.normal()) for head in pool}, together)


@pytest.mark.parametrize("seed", range(5))
def test_one_round_equals_brute_force_where_effects_add_up(seed: int, tmp_path: Path) -> None:
    stage = random_stage(seed)
    preset = stage.hunt(tmp_path / "heads.json", HeadHunter(k=2, rounds=1))
    best = max(itertools.combinations(stage.pool, 2), key=stage.value)
    assert set(preset.heads) == set(best)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_each_round_is_the_best_continuation(seed: int, rounds: int, tmp_path: Path) -> None:
    """With clashes and alliances between heads: every round, by brute force over the heads left."""
    stage = random_stage(seed, pairs=True)
    preset = stage.hunt(tmp_path / "heads.json", HeadHunter(k=1, rounds=rounds))
    chosen: list[str] = []
    for _ in range(rounds):
        chosen.append(max((h for h in stage.pool if h not in chosen), key=lambda h: stage.value((*chosen, h))))
    assert list(preset.heads) == chosen


def test_trials_are_those_of_the_paper(tmp_path: Path) -> None:
    """M x N for the first round, and N - k for the second; besides, once without guidance and once with all heads."""
    stage, hunter, told = random_stage(0), HeadHunter(k=1, rounds=2), []
    stage.hunt(tmp_path / "heads.json", hunter, after_trial=told.append)
    n = len(stage.pool)
    assert hunter.trials(n) == n + n - 1
    assert len(stage.trials) == hunter.trials(n) + 2
    assert stage.trials[0] == ()
    assert stage.trials[1 : n + 1] == [(head,) for head in stage.pool]
    first = stage.trials[-1][0]
    assert stage.trials[n + 1 : -1] == [(first, head) for head in stage.pool if head != first]
    assert told[0] == 0
    assert told[-1] == hunter.trials(n)


def test_equal_scores_are_decided_by_the_pool(tmp_path: Path) -> None:
    stage = Stage(dict.fromkeys(names_of(build(WAN)), 1.0))
    assert list(stage.hunt(tmp_path / "a.json", HeadHunter(k=2, rounds=1)).heads) == stage.pool[:2]


@pytest.mark.parametrize("fails_at", range(0, 9, 2))
def test_a_hunt_that_was_killed_ends_with_the_same_heads(fails_at: int, tmp_path: Path) -> None:
    hunter = HeadHunter(k=1, rounds=2, head_strength=0.5)
    whole = random_stage(3, pairs=True)
    want = whole.hunt(tmp_path / "whole.json", hunter)
    stage = random_stage(3, pairs=True)
    stage.fails_at = fails_at
    out = tmp_path / "heads.json"
    with pytest.raises(KeyboardInterrupt):
        stage.hunt(out, hunter)
    assert not out.exists()
    assert run_of(stage.model) is None, "a broken trial leaves no guidance behind"
    stage.fails_at = -1
    assert stage.hunt(out, hunter) == want
    assert stage.trials == whole.trials, "no trial is run twice"
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".partial"] == []


def test_what_is_written(tmp_path: Path) -> None:
    stage = random_stage(1)
    hunter = HeadHunter(k=1, rounds=2, head_strength=0.5, head_scale=2.0, kind="uniform")
    preset = stage.hunt(tmp_path / "heads.json", hunter, about={"objective": "made up"})
    assert Preset.load(tmp_path / "heads.json") == preset
    assert preset.models == fingerprints(models_of(stage.model))
    assert (preset.head_strength, preset.head_scale, preset.kind) == (0.5, 2.0, "uniform")
    assert preset.about["objective"] == "made up"
    score = preset.about["score"]
    assert score["all"] - score["none"] == pytest.approx(stage.value(preset.heads))
    assert list(score["when chosen"]) == list(preset.heads)
    assert resolve(preset.heads, stage.model)


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "NaN": (lambda clips, prompts: [float("nan")] * len(clips), "finite numbers; got \\[nan"),
    "infinity": (lambda clips, prompts: [1.0, float("inf")], "finite numbers"),
    "too few": (lambda clips, prompts: [1.0], "got 1 for 2 clips"),
    "too many": (lambda clips, prompts: [1.0] * 3, "got 3 for 2 clips"),
    "a single number": (lambda clips, prompts: 1.0, "one number for each clip; got 1.0"),
    "words": (lambda clips, prompts: ["good", "bad"], "one number for each clip"),
}


@pytest.mark.parametrize("name", BAD)
def test_scores_that_make_no_sense_leave_the_hunt_as_it_was(name: str, tmp_path: Path) -> None:
    bad, message = BAD[name]
    stage, out = random_stage(0), tmp_path / "heads.json"
    calls: list[int] = []

    def objective(clips: Any, prompts: Any) -> Any:
        calls.append(1)
        return bad(clips, prompts) if len(calls) == 4 else stage.objective(clips, prompts)

    with pytest.raises(ConfigError, match=message):
        stage.hunt(out, HeadHunter(k=1, rounds=1), objective=objective)
    kept = json.loads((tmp_path / "heads.json.partial").read_text())
    assert sum(len(scores) for scores in kept["rounds"].values()) == 3
    assert stage.hunt(out, HeadHunter(k=1, rounds=1)) == random_stage(0).hunt(
        tmp_path / "b.json", HeadHunter(k=1, rounds=1)
    )


def test_a_hunt_that_an_earlier_release_has_begun_goes_on(tmp_path: Path) -> None:
    """Its file holds the settings' digest, with two of them by other names."""
    stage, hunter = random_stage(3), HeadHunter(k=1, rounds=2, head_strength=0.5)
    first = "HeadHunter(k=1, rounds=2, strength=0.5, scale=3.0, kind='identity', start=0.0, stop=1.0, rescale=0.0, "
    settings = [f"{first}branch='extra', text=False)", fingerprints(models_of(stage.model)), stage.pool, PAIRS, "x"]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    done = {"2": {"none": [0.0, 1.0]}, "0": {head: [9.0, 9.0] for head in stage.pool}}
    (tmp_path / "heads.json.partial").write_text(json.dumps({"key": key, "rounds": done}))
    told: list[int] = []
    preset = stage.hunt(tmp_path / "heads.json", hunter, name="x", after_trial=told.append)
    assert told[0] == len(stage.pool)
    assert preset.heads[0] == stage.pool[0]
    assert len(stage.trials) == len(stage.pool)  # the second round, and all heads together


def test_hunts_are_not_mixed(tmp_path: Path) -> None:
    stage, out = random_stage(0), tmp_path / "heads.json"
    stage.fails_at = 3
    with pytest.raises(KeyboardInterrupt):
        stage.hunt(out, HeadHunter(k=1, rounds=1))
    for other in ({"hunter": HeadHunter(k=1, rounds=2)}, {"name": "other"}):
        with pytest.raises(ConfigError, match="is of a hunt with other settings; delete it"):
            stage.hunt(out, **{"hunter": HeadHunter(k=1, rounds=1), **other})
    (tmp_path / "heads.json.partial").write_text("{broken")
    with pytest.raises(InputFileError, match="delete it to start again"):
        stage.hunt(out, HeadHunter(k=1, rounds=1))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"k": 0}, "k wants a whole number of at least 1"),
        ({"rounds": 1.5}, "rounds wants a whole number"),
        ({"head_strength": 2.0}, "strength wants"),
    ],
)
def test_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HeadHunter(**knobs)


def test_a_pool_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 rounds for 3 heads each want a pool of at least 6; got 4"):
        random_stage(0).hunt(tmp_path / "a.json", HeadHunter(k=3, rounds=2))
    with pytest.raises(ConfigError, match="one or more pairs"):
        random_stage(0).hunt(tmp_path / "a.json", HeadHunter(k=1, rounds=1), pairs=[])


def test_real_guidance_is_what_is_scored(tmp_path: Path) -> None:
    """End to end on a model: the head that a hunt finds is the one that a loop over all of them finds."""
    model, kwargs = build(WAN), inputs(WAN)
    pool = names_of(model)

    def render(pairs: Sequence[tuple[str, int]]) -> list[np.ndarray]:
        with torch.no_grad():
            return [tensors(model, kwargs)[0][0].permute(1, 2, 3, 0).numpy() for _ in pairs]

    def spread(clips: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        return [float(clip.std()) for clip in clips]

    preset = hunt(model, HeadHunter(k=1, rounds=1), pool, PAIRS, render, spread, tmp_path / "heads.json")
    found = {}
    for head in pool:
        with diffsparse.guide(model, head):
            found[head] = spread(render(PAIRS), [])[0]
    assert preset.heads == (max(found, key=found.__getitem__),)
    assert preset.about["score"]["all"] == found[preset.heads[0]]
