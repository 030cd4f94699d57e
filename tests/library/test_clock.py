"""Step, branch, run: what a strategy is told, on stock pipelines and schedulers, is what happens."""

from __future__ import annotations

import threading
from inspect import signature
from itertools import pairwise

import diffusers as d
import pytest
import torch
from diffusers.models.cache_utils import CacheMixin

import diffsparse
from diffsparse import AdaSpa, Dense, Schedule
from support.spy import Spy
from support.tiny_pipelines import BUILDERS, run
from support.tiny_transformers import OTHER, build, inputs, tensors

ALWAYS = Schedule(dense_first=0)
STEPS = 4
# One pass a step, or one for each guidance branch, by name where the pipeline names them.
BRANCHES = {
    "wan": ["cond", "uncond"],
    "wan22": ["cond", "uncond"],
    "hunyuan_video": ["cond"],
    "cogvideox": ["cond_uncond"],
    "ltx": ["cond_uncond"],
    "mochi": ["cond_uncond"],
    "flux": ["cond", "uncond"],
    "sd3": ["#0"],
    "qwen_image": ["cond", "uncond"],
}


@pytest.mark.parametrize("name", BUILDERS)
def test_steps_and_branches(name: str) -> None:
    pipe, call = BUILDERS[name]()
    spy = Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        run(pipe, call, num_inference_steps=STEPS)
    first = spy.seen[0].layer
    order = [(s.step, s.branch) for s in spy.seen if s.layer == first]
    steps = sorted({s.step for s in spy.seen})
    assert steps == list(range(STEPS))
    assert {s.steps for s in spy.seen} == {STEPS}
    at_once = [s.branch for s in spy.seen if s.layer == first and s.step == 0]
    assert list(dict.fromkeys(at_once)) == BRANCHES[name]
    assert all(a <= b for a, b in pairwise(step for step, _ in order))


def test_memory_is_fresh_for_each_run_layer_and_branch() -> None:
    pipe, call = BUILDERS["wan"]()
    spy = Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        for _ in range(2):
            run(pipe, call, num_inference_steps=3)
    fresh = [(s.layer, s.branch, s.step) for s in spy.seen if s.fresh]
    layers = {s.layer for s in spy.seen}
    assert len(fresh) == 2 * 2 * len(layers)  # runs x branches x layers
    assert {step for *_, step in fresh} == {0}


def test_memory_is_fresh_for_another_shape_in_the_same_run() -> None:
    model = build("WanTransformer3DModel")
    spy = Spy()
    with diffsparse.apply(model, spy, schedule=ALWAYS):
        tensors(model, inputs("WanTransformer3DModel"))
        tensors(model, inputs("WanTransformer3DModel", OTHER))
    assert all(s.fresh for s in spy.seen)


def test_experts_share_the_clock_and_not_their_memory() -> None:
    pipe, call = BUILDERS["wan22"]()
    spy = Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS) as handle:
        run(pipe, call, num_inference_steps=STEPS)
        assert handle.report().steps == STEPS
    conditional = [s for s in spy.seen if s.branch == "cond" and s.layer.endswith("blocks.0.attn1")]
    assert [s.step for s in conditional] == list(range(STEPS))
    assert [s.fresh for s in conditional].count(True) == 2


SCHEDULERS = {
    "heun": ("sd3", d.FlowMatchHeunDiscreteScheduler),  # two passes a step, the same timestep twice
    "unipc": ("wan", lambda: d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
    "dpm": ("cogvideox", d.CogVideoXDPMScheduler),  # no step_index
    "ddim": ("cogvideox", d.CogVideoXDDIMScheduler),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(kind: str) -> None:
    name, scheduler = SCHEDULERS[kind]
    pipe, call = BUILDERS[name]()
    pipe.scheduler = scheduler()
    spy = Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        run(pipe, call, num_inference_steps=STEPS)
    total = len(pipe.scheduler.timesteps)
    passes = [s.step for s in spy.seen if s.layer == spy.seen[0].layer and s.branch == spy.seen[0].branch]
    assert passes == list(range(total))
    assert {s.steps for s in spy.seen} == {total}


def test_a_scheduler_that_is_only_stepped_as_a_copy() -> None:
    """As SkyReels' diffusion forcing does: the pipeline's own scheduler never moves, passes are counted."""
    from copy import deepcopy

    model = build("WanTransformer3DModel")

    class Pipe:
        def __init__(self) -> None:
            self.transformer = model
            self.scheduler = d.FlowMatchEulerDiscreteScheduler()

        @property
        def components(self) -> dict[str, object]:
            return {"transformer": self.transformer, "scheduler": self.scheduler}

    pipe, spy = Pipe(), Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        for _ in range(2):
            pipe.scheduler.set_timesteps(3)
            copy = deepcopy(pipe.scheduler)
            for t in copy.timesteps:
                for branch in ("cond", "uncond"):
                    with model.cache_context(branch):
                        out = tensors(model, inputs("WanTransformer3DModel"))[0]
                copy.step(out, t, out)
    first = [s for s in spy.seen if s.layer == spy.seen[0].layer and s.branch == "cond"]
    assert [s.step for s in first] == [0, 1, 2, 0, 1, 2]
    assert [s.fresh for s in first] == [True, False, False] * 2


@pytest.mark.skipif(
    len(signature(CacheMixin.cache_context).parameters) < 3, reason="this Diffusers has no step in a context"
)
def test_a_bare_transformer_is_told_by_its_context() -> None:
    model, spy = build("WanTransformer3DModel"), Spy()
    kwargs = inputs("WanTransformer3DModel")
    with diffsparse.apply(model, spy, schedule=ALWAYS):
        for step in (0, 1, 5):
            with model.cache_context("cond", step_index=step, num_inference_steps=9):
                tensors(model, kwargs)
    assert spy.steps() == [0, 1, 5]
    assert {s.steps for s in spy.seen} == {9}


def test_a_context_goes_by_what_the_guiders_of_modular_pipelines_call_it() -> None:
    """They say `pred_uncond`; without the first word the branch is known as unconditional."""
    model, spy = build("WanTransformer3DModel"), Spy()
    with diffsparse.apply(model, spy, schedule=ALWAYS):
        for name in ("pred_cond", "pred_uncond"):
            with model.cache_context(name):
                tensors(model, inputs("WanTransformer3DModel"))
    assert {s.branch for s in spy.seen} == {"cond", "uncond"}


def test_a_bare_transformer_counts_its_passes_until_it_is_reset() -> None:
    model, spy = build("WanTransformer3DModel"), Spy()
    kwargs = inputs("WanTransformer3DModel")
    with diffsparse.apply(model, spy, schedule=ALWAYS) as handle:
        for _ in range(2):
            for _ in range(2):
                tensors(model, kwargs)
            handle.reset()
    assert spy.steps() == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["wan", "cogvideox", "sd3"])
def test_pipelines_in_threads_do_not_mix(name: str) -> None:
    jobs = [BUILDERS[name]() for _ in range(3)]
    strategies = [AdaSpa(block=8), Dense(), AdaSpa(block=4, sparsity=0.6)]

    def one(i: int) -> torch.Tensor:
        pipe, call = jobs[i]
        with diffsparse.apply(pipe, strategies[i], schedule=Schedule(dense_first=1)):
            return run(pipe, call, num_inference_steps=3)

    alone = [one(i) for i in range(3)]
    together: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: one(i)})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[i], alone[i]) for i in range(3))
