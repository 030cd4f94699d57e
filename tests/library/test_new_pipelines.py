"""Pipelines whose sequences hold more than text and one grid: no bit changes, and each step and branch is named."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch

import diffsparse
from diffsparse import Dense, Random, Report, Schedule, Site, UnsupportedModelError
from support.new_pipelines import BUILDERS, STEPS, run
from support.spy import Spy

ALWAYS = Schedule(dense_first=0)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*none of its attention was recognised"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, in what these pipelines call
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


class Expected(NamedTuple):
    """What a report must say of the last run of a call.

    layers: the self-attention over the tokens that the pipeline makes, which is to be sparse in every step.
    branches: of every step.
    steps: how many.
    first: a pass of the first step alone.
    """

    layers: tuple[str, ...]
    branches: tuple[str, ...] = ("#0",)
    steps: int = STEPS
    first: str | None = None


BLOCKS = ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
FLUX3 = ("mode_blocks.image.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn")
KLEIN = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
KANDINSKY = tuple(f"visual_transformer_blocks.{i}.video_dec_block.self_attention" for i in range(2))
FIRST = ("blocks.0.attn1", "blocks.1.attn1")
LTX = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
COSMOS3 = ("layers.0.self_attn", "layers.1.self_attn")
BOTH = ("cond", "uncond")
EXPECTED: dict[str, Expected] = {
    "h3": Expected(BLOCKS),
    "h3_keyframes": Expected(BLOCKS),
    "h3_references": Expected(BLOCKS),
    "flux3": Expected(FLUX3, BOTH),
    "flux3_references": Expected(FLUX3, BOTH),
    "flux2_klein_kv": Expected(KLEIN),
    "flux2_klein_kv_text": Expected(KLEIN),
    "wan_animate2": Expected(("blocks.0.self_attn", "blocks.1.self_attn"), BOTH, first="#0"),
    "skyreels_df": Expected(FIRST, BOTH),
    "skyreels_df_async": Expected(FIRST, BOTH),
    "skyreels_df_causal": Expected(FIRST, BOTH),
    "ltx_condition": Expected(LTX, ("cond_uncond",)),
    "ltx2_condition": Expected(LTX, ("cond_uncond", "uncond_modality", "uncond_stg")),
    "framepack": Expected(KLEIN, ("#0", "#1")),
    "kandinsky6": Expected(KANDINSKY, BOTH),
    "kandinsky6_image": Expected(KANDINSKY, BOTH),
    "qwen_image_edit": Expected(BLOCKS, BOTH),
    "cosmos": Expected(LTX, ("#0", "#1")),
    "cosmos3": Expected(COSMOS3, BOTH),
    "cosmos3_image": Expected(COSMOS3, BOTH),
    "qwen_image21": Expected(BLOCKS, BOTH),
    "qwen_image21_image": Expected(BLOCKS, BOTH),
    "qwen_image21_image_uncached": Expected(BLOCKS, BOTH),
}
# What is not yet sparse, or not yet in time, and why.
PENDING: dict[tuple[str, str], str] = {
    ("sparse", "wan_animate2"): "its processor calls flex attention, with a padded block mask",
    ("sparse", "skyreels_df_causal"): "a mask that differs between video rows",
    ("memory", "skyreels_df_causal"): "no strategy is asked",
}


def cases(test: str, names: Iterable[str] = BUILDERS) -> list[object]:
    """The pipelines, those of `PENDING` as failures that are expected."""
    return [
        pytest.param(name, marks=pytest.mark.xfail(reason=PENDING[test, name], strict=True))
        if (test, name) in PENDING
        else name
        for name in names
    ]


def sparsely(name: str) -> tuple[torch.Tensor, Report]:
    pipe, call = BUILDERS[name]()
    with diffsparse.apply(pipe, Random(0.5, block=8), schedule=ALWAYS) as handle:
        return run(pipe, call), handle.report()


def test_all_are_expected() -> None:
    assert BUILDERS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", cases("identity"))
def test_no_bit_changes(name: str) -> None:
    pipe, call = BUILDERS[name]()
    want = run(pipe, call)
    assert torch.equal(run(pipe, call), want), "the untouched pipeline repeats itself"
    handle = diffsparse.apply(pipe, Dense(), schedule=ALWAYS)
    assert torch.equal(run(pipe, call), want)
    assert handle.report().calls
    assert torch.equal(run(pipe, call), want), "second call"
    handle.remove()
    assert torch.equal(run(pipe, call), want), "after removal"


@pytest.mark.parametrize("name", cases("sparse"))
def test_each_step_is_sparse(name: str) -> None:
    out, report = sparsely(name)
    assert out.isfinite().all()
    sparse = {(call.layer, call.step, call.branch) for call in report.calls if call.kind == "sparse"}
    layers, branches, steps, _ = EXPECTED[name]
    assert {(layer, step, branch) for layer in layers for step in range(steps) for branch in branches} <= sparse


@pytest.mark.parametrize("name", cases("moments"))
def test_steps_and_branches_are_named(name: str) -> None:
    _, report = sparsely(name)
    _, branches, steps, first = EXPECTED[name]
    want = {(step, branch) for step in range(steps) for branch in branches} | ({(0, first)} if first else set())
    assert report.steps == steps
    assert {(call.step, call.branch) for call in report.calls} == want


WINDOWS = {"skyreels_df": (3, 3, 3), "skyreels_df_async": (7, 3, 3), "framepack": (3, 3)}


@pytest.mark.parametrize("name", WINDOWS)
def test_each_window_is_a_run_of_its_own(name: str) -> None:
    pipe, call = BUILDERS[name]()
    spy = Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        run(pipe, call)
    want = [(step, steps) for steps in WINDOWS[name] for step in range(steps)]
    for layer, branch in itertools.product(EXPECTED[name].layers, EXPECTED[name].branches):
        assert [(x.step, x.steps) for x in spy.seen if (x.layer, x.branch) == (layer, branch)] == want


class Reader:
    """Runs dense and remembers where the grid was, and in which step its memory of the layer and branch began."""

    def __init__(self) -> None:
        self.grids: set[tuple[int, ...]] = set()
        self.begun: set[int] = set()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> torch.Tensor:
        layout = site.layout
        self.grids.add((layout.frames, layout.height, layout.width, layout.span.start))
        self.begun.add(site.memory.setdefault("step", site.step))
        return site.dense(q, k, v, reason="watched")


def read(name: str) -> Reader:
    pipe, call = BUILDERS[name]()
    reader = Reader()
    with diffsparse.apply(pipe, reader, schedule=ALWAYS):
        run(pipe, call)
    return reader


@pytest.mark.parametrize("name", cases("memory"))
def test_memory_lasts_from_step_to_step(name: str) -> None:
    assert read(name).begun == {0}


# Frames, height and width of what is made, and the token that it begins with; where layers differ, of each.
GRIDS: dict[str, set[tuple[int, ...]]] = {
    "h3": {(37, 2, 3, 9 + 414)},
    "h3_keyframes": {(37, 2, 3, 9 + 12 + 414)},
    "h3_references": {(37, 2, 3, 9 + 6 + 10 + 28 + 414)},
    "flux3": {(1, 8, 10, 0), (1, 8, 10, 10), (1, 8, 10, 7)},
    "flux2_klein_kv_text": {(1, 8, 10, 10)},
    "skyreels_df": {(3, 2, 3, 0)},
    "ltx_condition": {(3, 8, 16, 128)},
    "ltx2_condition": {(3, 2, 3, 0)},
    "framepack": {(3, 6, 4, 62)},
    "kandinsky6": {(3, 4, 6, 0)},
    "kandinsky6_image": {(3, 4, 6, 0)},
    "qwen_image_edit": {(1, 8, 10, 9), (1, 8, 10, 7)},
    "cosmos": {(3, 4, 6, 0)},
    "cosmos3": {(3, 4, 6, 15), (3, 4, 6, 11)},
    "cosmos3_image": {(3, 4, 6, 15), (3, 4, 6, 11)},
    "qwen_image21": {(1, 8, 10, 24), (1, 8, 10, 20)},
    "qwen_image21_image": {(1, 8, 10, 66), (1, 8, 10, 62)},
}


@pytest.mark.parametrize("name", cases("grid", GRIDS))
def test_where_the_grid_is(name: str) -> None:
    assert read(name).grids == GRIDS[name]


@pytest.mark.parametrize("name", ["h3", "flux3"])
def test_modular_pipelines_come_in_by_all_doors(name: str) -> None:
    pipe, call = BUILDERS[name]()
    want = run(pipe, call)
    with diffsparse.accelerate(pipe, cache=None, schedule=ALWAYS) as fast:
        assert not torch.equal(run(pipe, call), want)
        assert fast.report().sparse_calls
    with diffsparse.guide(pipe, [f"{EXPECTED[name].layers[-1]}:0"], head_scale=2.0) as guided:
        assert not torch.equal(run(pipe, call), want)
        assert guided.report().passes == STEPS
    assert torch.equal(run(pipe, call), want)


@pytest.mark.parametrize("name", BUILDERS)
def test_guidance_acts_or_refuses(name: str) -> None:
    pipe, call = BUILDERS[name]()
    want = run(pipe, call)
    try:
        handle = diffsparse.guide(pipe, "0.1", head_scale=2.0)
    except UnsupportedModelError:
        assert name == "wan_animate2", "FlexAttention alone"
        return
    with handle:
        out = run(pipe, call)
        assert handle.report().perturbed > 0
    assert out.isfinite().all()
    assert not torch.equal(out, want)
    assert torch.equal(run(pipe, call), want), "after removal"
