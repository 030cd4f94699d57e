"""The control: as many blocks as any method, but drawn by lot."""

from __future__ import annotations

import pytest
import torch

import diffsparse
from diffsparse import GNA, AdaSpa, Compensated, Random, Schedule
from diffsparse.errors import BackendError, ConfigError
from support.tiny_transformers import build, inputs, tensors

ALWAYS = Schedule(dense_first=0)


def test_its_density_is_the_one_asked_for_and_its_seed_decides() -> None:
    model, kwargs = build("WanTransformer3DModel"), inputs("WanTransformer3DModel")
    outs = {}
    for seed in (0, 0, 1):
        with diffsparse.apply(model, Random(0.5, seed=seed, block=8), schedule=ALWAYS) as handle:
            out = tensors(model, kwargs)[0]
        assert handle.report().sparse_density == pytest.approx(5 / 9)  # half of 9 blocks, rounded up
        assert torch.equal(outs.setdefault(seed, out), out)
    assert not torch.equal(outs[0], outs[1])


def test_text_is_always_kept() -> None:
    model, kwargs = build("HunyuanVideoTransformer3DModel"), inputs("HunyuanVideoTransformer3DModel")
    lists = []

    class Watched(Random):
        def attend(self, q, k, v, site):  # type: ignore[no-untyped-def]
            out = super().attend(q, k, v, site)
            lists.append(site.memory["lists"].to_mask())
            return out

    with diffsparse.apply(model, Watched(0.8, block=8), schedule=ALWAYS):
        tensors(model, kwargs)
    assert lists
    for mask in lists:  # 72 tokens of video, 6 of text in the last block
        assert mask[..., -1].all()
        assert mask[..., -1, :].all()


def test_a_backend_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a strategy whose first question is how dense it may be."""
    monkeypatch.setenv("DIFFSPARSE_BACKEND", "fast")
    model, kwargs = build("WanTransformer3DModel"), inputs("WanTransformer3DModel")
    for strategy in (Random(0.5, block=8), Compensated(Random(0.5, block=8)), GNA(block=8), AdaSpa(0.5, block=8)):
        with diffsparse.apply(model, strategy, schedule=ALWAYS), pytest.raises(BackendError, match="called 'fast'"):
            tensors(model, kwargs)


@pytest.mark.parametrize("knobs", [{"seed": -1}, {"seed": 0.5}, {"sparsity": 1.0}, {"block": 0}])
def test_bad_knobs_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="wants"):
        Random(**knobs)  # type: ignore[arg-type]
