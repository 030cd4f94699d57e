"""The cost model against the paper's own figures and against the operations that really run."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffsparse
from diffsparse import (
    GNA,
    PARO,
    AdaSpa,
    Compensated,
    Dense,
    Digest,
    Handle,
    Layout,
    Random,
    Schedule,
    SparseVDiT,
    Tangent,
)
from diffsparse.insight.cost import Estimate, Flops, end_to_end, flops
from diffsparse.plans.plan import Plan, fingerprints
from diffsparse.strategies import parse
from diffsparse.strategies.base import as_strategy
from diffsparse.strategies.paro.strategy import pack
from diffsparse.strategies.work import Outline
from support import tiny_transformers
from support.tiny_pipelines import BUILDERS

COUNTED = (
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "CosmosTransformer3DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "Kandinsky5Transformer3DModel",
    "LTXVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
)


def test_the_papers_run_costs_19_of_50_passes() -> None:
    """t_w + 1/2 + (T - t_w) d + r/2 with ten dense steps of 50, one later search, 80 % sparsity."""
    steps = AdaSpa().steps(Outline.of(Schedule(), 50))
    assert sum(step.work or 0 for step in steps) == pytest.approx(19)
    assert end_to_end(0.83, 50 / 19) == pytest.approx(2.07, abs=0.01)
    share = Flops((0.83,), 0.17)
    found = Estimate.before(share, AdaSpa(), Schedule(), 50)
    assert found is not None
    assert found.attention_speedup == pytest.approx(2.63, abs=0.005)
    assert found.speedup == pytest.approx(2.07, abs=0.01)


def test_kinds_follow_the_schedule() -> None:
    dense, search, sparse, refresh, tail = "dense", "search", "sparse", "refresh", "tail"
    assert AdaSpa(searches=(3,)).kinds(Schedule(2, 1), 6) == [
        dense,
        search,
        sparse,
        refresh,
        sparse,
        dense,
    ]
    assert AdaSpa(searches=()).kinds(Schedule(0), 3) == [search, sparse, sparse]
    assert Random().kinds(Schedule(1), 3) == [dense, sparse, sparse]
    assert Dense().kinds(Schedule(), 3) == [dense] * 3
    assert Random(0.0).kinds(Schedule(), 3) == [dense] * 3
    assert AdaSpa().kinds(Schedule(1.0), 3) == [dense, dense, search]
    assert AdaSpa().kinds(Schedule(9), 3) == AdaSpa().kinds(Schedule(0, 1.0), 3) == [dense] * 3
    tailed = Compensated(AdaSpa(searches=(4,)), "tail")
    assert tailed.kinds(Schedule(2), 6) == [dense, search, tail, sparse, refresh, sparse]
    assert Compensated(Random(), "tail").kinds(Schedule(1), 4) == [dense, tail, sparse, sparse]


@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 20), st.floats(0.01, 0.99))
def test_no_run_beats_its_density(steps: int, first: int, last: int, sparsity: float) -> None:
    for strategy in (AdaSpa(sparsity), Digest(sparsity)):
        found = Estimate.before(Flops((1.0,), 1.0), strategy, Schedule(first, last), steps)
        assert found is not None
        assert found.attention_speedup <= 1 / (1 - sparsity) + 1e-9
        assert found.speedup <= 2


class Stranger:
    """Says nothing of itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        return site.dense(q, k, v)


class Windows(Stranger):
    sparsity = None


class Searching(Stranger):
    sparsity = 0.5

    def observe(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        return site.dense(q, k, v)


class Telling(Stranger):
    sparsity = 0.5


def before(strategy: object, schedule: Schedule, steps: int = 3) -> Estimate | None:
    return Estimate.before(Flops((1.0,), 1.0), strategy, schedule, steps)


def test_what_is_not_known_is_not_estimated() -> None:
    for strategy in (Stranger(), Windows(), GNA((2, 2, 2)), Compensated(Stranger()), Compensated(GNA(), "tail")):
        wanted = "tail" if isinstance(strategy, Compensated) and strategy.by == "tail" else "sparse"
        assert as_strategy(strategy).kinds(Schedule(1), 3) == ["dense", wanted, "sparse"]
        assert before(strategy, Schedule(1)) is None
    assert as_strategy(Searching()).kinds(Schedule(2), 3) == ["dense", "search", "sparse"]
    assert before(Searching(), Schedule(2)) is None
    told = before(Telling(), Schedule(0))
    assert told is not None
    assert told.attention_speedup == 2


def test_compensation_costs_what_it_computes() -> None:
    plain, means, tail = (
        before(x, Schedule(3), 15) for x in (AdaSpa(), Compensated(AdaSpa()), Compensated(AdaSpa(), "tail"))
    )
    assert plain is not None
    assert means is not None
    assert tail is not None
    # 3 + 1/2 dense, 12 sparse steps of 0.2, and half a pass for the search in step 9
    assert plain.attention_speedup == pytest.approx(15 / 6.4)
    assert means.attention_speedup == pytest.approx(15 / (6.4 + 12 * 0.8 / AdaSpa().block))
    assert tail.attention_speedup == pytest.approx(15 / (6.4 + 2)), "a dense call beside the sparse one, twice"


def test_a_plan_is_taken_at_its_masks_and_modes() -> None:
    grid = Layout(4, 8, 8)
    modes = torch.zeros(15, 4, dtype=torch.uint8)
    vdit = partial(Plan, "sparse-vdit", {}, grid, {"sparsity": 0.75, "block": 64})
    full = before(SparseVDiT(vdit({"t.l.modes": modes, "t.l.columns": torch.ones(4, 4) / 4})), Schedule(0), 15)
    assert full is not None
    assert full.attention_speedup == 1
    modes[5:] = torch.tensor([0, 1, 2, 4], dtype=torch.uint8)  # full, skip, diagonal, stripe
    mixed = before(SparseVDiT(vdit({"t.l.modes": modes, "t.l.columns": torch.ones(4, 4) / 4})), Schedule(0), 15)
    assert mixed is not None
    assert mixed.attention_speedup == pytest.approx(15 / (5 + 10 * (1 + 0 + 0.25 + 0.25) / 4))
    masks = pack(torch.eye(4, dtype=torch.bool).expand(1, 2, 4, 4) | (torch.arange(2) == 1)[None, :, None, None])
    settings = {"sparsity": 0.1, "block": 64, "orders": ["FHW"], "groups": 1}
    plan = Plan("paro", {}, grid, settings, {"t.l.masks": masks, "t.l.orders": torch.zeros(2, dtype=torch.uint8)})
    paro = before(PARO(plan), Schedule(0))
    assert paro is not None
    assert paro.attention_speedup == pytest.approx(1 / ((1 / 4 + 1) / 2)), "one head keeps a quarter, one all"


@pytest.mark.parametrize(
    ("sparsity", "works"),
    [
        (0.5, {"tangent": 0.60, "digest": 0.63, "adaspa": 0.67, "random": 0.60}),
        (0.8, {"tangent": 0.36, "digest": 0.37, "adaspa": 0.43, "random": 0.36}),
    ],
)
def test_the_readme_tells_the_work_of_its_table(sparsity: float, works: dict[str, float]) -> None:
    """15 steps of the embedded model; the share of attention is one budget, what is only compared comes on top."""
    run = Outline.of(Schedule(), 15, Layout(17, 16, 16), 64)
    for name, work in works.items():
        [strategy] = parse(name, sparsity=sparsity, block=64)
        steps = as_strategy(strategy).steps(run)
        assert sum(step.work or 0 for step in steps) / 15 == pytest.approx(work, abs=0.005)
        beside = {"random": 0, "tangent": 0, "adaspa": 2 * 0.5, "digest": 1 - sparsity}[name] / 15
        budget = (3 + 12 * (1 - sparsity)) / 15
        assert sum(step.work or 0 for step in steps) / 15 - beside == pytest.approx(budget, abs=0.006)


STEPS, BLOCK = 8, 8
SCHEDULE = Schedule(2, 1)


def planned(pipe: Any, layout: Layout) -> tuple[PARO, SparseVDiT]:
    """Plans for all layers of a pipeline: random masks and modes in three parts of the run."""
    models = diffsparse.seam.targets.models_of(pipe)
    [(name, model)] = models.items()
    layers = [f"{name}.{layer}" for layer, _ in diffsparse.seam.targets.attentions(model)]
    heads, blocks = (
        next(module.heads for _, module in diffsparse.seam.targets.attentions(model)),
        layout.grid.blocks(BLOCK),
    )
    settings: dict[str, Any] = {"sparsity": 0.7, "block": BLOCK, "groups": 3}
    masks = torch.rand(3, heads, blocks, blocks) < 0.4
    masks[..., 0] = True
    modes = torch.tensor([[0, 2, 3, 4], [1, 2, 2, 0], [4, 4, 3, 3]], dtype=torch.uint8)[:, :heads]
    parts = {
        "masks": pack(masks),
        "orders": torch.zeros(heads, dtype=torch.uint8),
        "modes": modes,
        "columns": torch.rand(heads, blocks),
    }
    made = []
    for strategy, names, more in (
        ("paro", ("masks", "orders"), {"orders": ["FHW"]}),
        ("sparse-vdit", ("modes", "columns"), {}),
    ):
        tensors = {f"{layer}.{what}": parts[what].clone() for layer in layers for what in names}
        made.append(Plan(strategy, fingerprints(models), layout.grid, {**settings, **more}, tensors))
    return PARO(made[0]), SparseVDiT(made[1])


def compared(pipe: Any, layout: Layout) -> dict[str, tuple[Any, float]]:
    """Every strategy, and what rounding and choice by mass leave open of its density."""
    paro, vdit = planned(pipe, layout)
    bare: dict[str, tuple[Any, float]] = {
        "dense": (Dense(), 0),
        "random": (Random(0.7, block=BLOCK), 0),
        "adaspa": (AdaSpa(0.7, (4,), BLOCK, head_adaptive=False), 0),
        "adaspa by head": (AdaSpa(0.7, block=BLOCK, recall_threshold=0), 0.5 / layout.blocks(BLOCK)),
        "adaspa, tall": (AdaSpa(0.7, (4,), (2 * BLOCK, BLOCK), head_adaptive=False), 0),
        "random, wide": (Random(0.7, block=(BLOCK, 2 * BLOCK)), 0),
        "paro": (paro, 0.02 if layout.has_text else 0),
        "sparse-vdit": (vdit, 0.02 if layout.has_text else 0),
        "gna": (GNA(block=BLOCK), 0),
    }
    digests: dict[str, tuple[Any, float]] = {
        "tangent": (Tangent(0.5, block=(16, 8)), 0.06),
        "digest": (Digest(0.5, block=16), 0.06),
    }
    wrapped: dict[str, tuple[Any, float]] = {
        f"{name}+{by}": (Compensated(strategy, by), open_)
        for name, (strategy, open_) in bare.items()
        for by in ("means", "first-order", "tail")
        if name not in ("dense", "adaspa by head")
    }
    del wrapped["sparse-vdit+first-order"]  # counted as if no head ran dense
    return bare | digests | wrapped


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_what_is_expected_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step: density, and work with mass passes, comparisons and tails; without text, and (less) with it."""
    monkeypatch.setattr("diffsparse_kernels.break_even", lambda *_: 9.0)
    pipe, call = BUILDERS[name]()
    call |= {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 1.0}
    pipe.set_progress_bar_config(disable=True)
    seen = Seen()
    with diffsparse.apply(pipe, seen, schedule=Schedule(0)):
        pipe(**call)
    for label, (strategy, open_) in compared(pipe, seen.layout).items():
        if seen.layout.has_text and label.endswith("+tail"):
            continue
        steps = as_strategy(strategy).steps(Outline.of(SCHEDULE, STEPS, seen.layout, seen.head_dim))
        with diffsparse.apply(pipe, strategy, schedule=SCHEDULE) as handle:
            pipe(**call)
        report = handle.report()
        density, work = report.table("step"), report.table("step", "work")
        for number, step in enumerate(steps):
            where = f"{label}, step {number} of {[s.kind for s in steps]}"
            slack = open_ * (2 if step.beside else 1) + 1e-6
            assert density[str(number)] == pytest.approx(step.density, abs=slack), where
            assert work[str(number)] == pytest.approx(step.work, abs=slack), where
        assert report.work == pytest.approx(sum(step.work or 0 for step in steps) / STEPS, abs=open_ + 1e-6), label


class Seen(Stranger):
    layout: Layout
    head_dim: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        self.layout, self.head_dim = site.layout, q.shape[3]
        return super().attend(q, k, v, site)


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


def test_flops_of_image_to_video_are_those_that_run() -> None:
    """Wan embeds an input image beside the prompt: its rows are the image's, not the video's."""
    import diffusers

    config = tiny_transformers.CASES["WanTransformer3DModel"].config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    model = diffusers.WanTransformer3DModel(**config, image_dim=64, added_kv_proj_dim=width)
    shape = tiny_transformers.OTHER
    inputs = tiny_transformers.inputs("WanTransformer3DModel", shape)
    inputs["encoder_hidden_states_image"] = torch.randn(len(inputs["hidden_states"]), shape.text, 64)
    counted = flops(model, shape.frames * (shape.height // 2) * (shape.width // 2), shape.text)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
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


def finished(dense: int) -> Handle:
    """A run of seven steps in two layers; a dense call takes 3 s, a sparse one 1 s."""
    model = tiny_transformers.build("WanTransformer3DModel")
    call = tiny_transformers.inputs("WanTransformer3DModel")
    with torch.no_grad(), diffsparse.apply(model, Random(0.5, block=8), schedule=Schedule(dense)) as handle:
        for _ in range(7):
            model(**call)
    for record in handle.report().calls:
        record._marks = [0.0, 3.0 if record.step < dense else 1.0]
    return handle


def test_a_finished_run_is_measured_by_its_own_dense_steps() -> None:
    handle = finished(dense=3)
    want = Estimate(42 / 56, 42 / 26, 56 / 40, dense_steps=3)
    assert Estimate.after(handle.report(), 40.0) == want
    for record in handle.report().calls:  # the first step of either kind warms up, and another dense one is slow
        late = {0: 5.0, 3: 7.0}.get(record.step, 0.0)
        record._marks = [0.0, record.seconds + late]
    assert Estimate.after(handle.report(), 40.0 + 2 * 12.0) == want


def test_a_run_of_fewer_than_three_dense_steps_has_no_measure() -> None:
    model = tiny_transformers.build("WanTransformer3DModel")
    assert Estimate.after(finished(dense=2).report(), 40.0) is None
    assert Estimate.after(finished(dense=7).report(), 40.0) is None
    assert Estimate.after(diffsparse.apply(model, Random()).report(), 1.0) is None
