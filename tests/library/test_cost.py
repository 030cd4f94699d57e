"""The cost model against the paper's own figures and against the operations that really run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffsparse
from diffsparse import AdaSpa, Dense, Random, Schedule
from diffsparse.cost import Estimate, Flops, end_to_end, flops, kinds, passes
from support import tiny_transformers

COUNTED = (
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
)


def units(strategy: object, schedule: Schedule, steps: int, density: float) -> float:
    return sum(passes(kind, density) for kind in kinds(strategy, schedule, steps))


def test_the_papers_run_costs_19_of_50_passes() -> None:
    """t_w + 1/2 + (T - t_w) d + r/2 with ten dense steps of 50, one later search, 80 % sparsity."""
    assert units(AdaSpa(), Schedule(), 50, 0.2) == pytest.approx(19)
    assert end_to_end(0.83, 50 / 19) == pytest.approx(2.07, abs=0.01)
    share = Flops((0.83,), 0.17)
    found = Estimate.before(share, AdaSpa(), Schedule(), 50)
    assert found is not None
    assert found.attention_speedup == pytest.approx(2.63, abs=0.005)
    assert found.speedup == pytest.approx(2.07, abs=0.01)


def test_kinds_follow_the_schedule() -> None:
    dense, search, sparse, refresh = "dense", "search", "sparse", "refresh"
    assert kinds(AdaSpa(searches=(3,)), Schedule(2, 1), 6) == [dense, search, sparse, refresh, sparse, dense]
    assert kinds(AdaSpa(searches=()), Schedule(0), 3) == [search, sparse, sparse]
    assert kinds(Random(), Schedule(1), 3) == [dense, sparse, sparse]
    assert kinds(Dense(), Schedule(), 3) == [dense] * 3
    assert kinds(AdaSpa(0.0), Schedule(), 3) == [dense] * 3
    assert kinds(AdaSpa(), Schedule(1.0), 3) == [dense] * 3


@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 20), st.floats(0.01, 0.99))
def test_no_run_beats_its_density(steps: int, first: int, last: int, sparsity: float) -> None:
    found = Estimate.before(Flops((1.0,), 1.0), AdaSpa(sparsity), Schedule(first, last), steps)
    assert found is not None
    assert found.attention_speedup <= 1 / (1 - sparsity) + 1e-9
    assert found.speedup <= 2


def test_a_sparsity_that_only_the_run_will_show() -> None:
    class Windows:
        sparsity = None

    assert kinds(Windows(), Schedule(1), 3) == ["dense", "sparse", "sparse"]
    assert Estimate.before(Flops((1.0,), 1.0), Windows(), Schedule(1), 3) is None


def test_dense_layers_count_as_dense() -> None:
    count = Flops((1.0, 0.0, 3.0, 0.0), 4.0)
    found = Estimate.before(count, Random(0.5), Schedule(0, dense_layers=(0,)), 10)
    assert found is not None
    assert found.attention_speedup == pytest.approx(4 / (1 + 3 * 0.5))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("shape", [tiny_transformers.Shape(), tiny_transformers.OTHER], ids=["", "other"])
def test_flops_are_those_that_run(name: str, shape: tiny_transformers.Shape) -> None:
    """Within 2 %: what runs once for each sample, and rotary embeddings, are all that the count may miss."""
    model, case = tiny_transformers.build(name), tiny_transformers.CASES[name]
    assert case.layout is not None
    frames, height, width, before, after = case.layout(shape)
    counted = flops(model, frames * height * width, before + after or shape.text)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**tiny_transformers.inputs(name, shape))
    assert counted.total == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name, case in tiny_transformers.CASES.items() if case.layout])
def test_every_class_can_be_counted_without_weights(name: str) -> None:
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, name)(**tiny_transformers.CASES[name].config)
    found = flops(model, 1000, 100)
    assert 0 < found.share < 1
    assert len(found.attention) == len(diffsparse.apply(model, Dense())._runs[0].layers)


def test_a_finished_run_is_measured_by_its_own_dense_calls() -> None:
    model = tiny_transformers.build("WanTransformer3DModel")
    call = tiny_transformers.inputs("WanTransformer3DModel")
    with torch.no_grad(), diffsparse.apply(model, Random(0.5, block=8), schedule=Schedule(2)) as handle:
        for _ in range(6):
            model(**call)
    for i, record in enumerate(handle.report().calls):  # two layers; dense calls of 3 s, sparse ones of 1 s
        record._marks = [0.0, 3.0 if i < 4 else 1.0]
    found = Estimate.after(handle.report(), 30.0)
    assert found is not None
    assert found == Estimate(36 / 46, 36 / 20, 46 / 30)
    assert Estimate.after(diffsparse.apply(model, Random()).report(), 1.0) is None
