"""Whose run is it, where does it begin, and where does it end: every surrounding of a transformer's calls."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import diffusers as d
import pytest
import torch
import transformers as t
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

import diffsparse
from diffsparse import AdaSpa, Digest, Random, Schedule
from diffsparse.seam.clock import MOST_SHAPES, _place, calling_pipeline
from support.spy import Spy
from support.tiny_pipelines import BUILDERS, run, t5, t5_tokenizer
from support.tiny_transformers import Shape, build, inputs, tensors

WAN = "WanTransformer3DModel"
ALWAYS = Schedule(dense_first=0)
numbers_contexts = pytest.mark.skipif(
    len(signature(CacheMixin.cache_context).parameters) < 3, reason="this Diffusers has no step in a context"
)


class Cut(BaseException):
    """An interrupt: no Exception, so that nothing catches it on the way."""


def sd3(kind: str = "StableDiffusion3Pipeline") -> tuple[Any, dict[str, Any]]:
    """A pipeline of that class around the tiny SD3, and arguments of a call."""
    pipe, call = BUILDERS["sd3"]()
    other = getattr(d, kind)(**pipe.components)
    return other, call if kind == "StableDiffusion3Pipeline" else from_image(call)


def from_image(call: dict[str, Any], **more: Any) -> dict[str, Any]:
    sizes = {"height", "width"}
    picture = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    return {**{k: v for k, v in call.items() if k not in sizes}, "image": picture, "strength": 0.6, **more}


def passes(spy: Spy) -> list[tuple[int, int | None, str]]:
    """Step, number of steps and branch of each pass."""
    return [(s.step, s.steps, s.branch) for s in spy.seen if s.layer == spy.seen[0].layer]


# --- whose scheduler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "wan", "cogvideox"])
@pytest.mark.parametrize("how", ["bare", "gone", "shared"])
def test_the_pipeline_that_calls_is_read(name: str, how: str) -> None:
    """Not the one that was given to `apply`: it may be another one, gone, or none."""
    pipe, call = BUILDERS[name]()
    strategy, schedule = AdaSpa(block=8, sparsity=0.6), Schedule(dense_first=2, dense_last=1)
    with diffsparse.apply(pipe, strategy, schedule=schedule) as handle:
        want, report = run(pipe, call, num_inference_steps=6), handle.report()
    scheduler = deepcopy(pipe.scheduler)
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler}, **boundaries(pipe))
    target = other.transformer if how == "bare" else pipe
    with diffsparse.apply(target, strategy, schedule=schedule) as handle:
        if how == "gone":
            del pipe, target
            gc.collect()
        got = run(other, call, num_inference_steps=6)
        assert torch.equal(got, want)
        assert [(c.step, c.branch, c.kind) for c in handle.report().calls] == [
            (c.step, c.branch, c.kind) for c in report.calls
        ]
        assert (handle.report().steps, handle.report().dense_steps) == (6, 3)


def boundaries(pipe: Any) -> dict[str, Any]:
    return {k: v for k, v in pipe.config.items() if k in ("boundary_ratio", "expand_timesteps")}


def test_pipelines_that_share_a_transformer_take_turns() -> None:
    pipe, call = sd3()
    other = d.StableDiffusion3Img2ImgPipeline(**{**pipe.components, "scheduler": deepcopy(pipe.scheduler)})
    spy = Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS) as handle:
        run(pipe, call, num_inference_steps=3)
        run(other, from_image(call), num_inference_steps=10)
        assert handle.report().steps == 6
        run(pipe, call, num_inference_steps=2)
        assert handle.report().steps == 2
    seen = [(step, steps) for step, steps, _ in passes(spy)]
    assert seen == [(i, n) for n in (3, 6, 2) for i in range(n)]
    fresh = Counter(s.step for s in spy.seen if s.fresh)
    assert set(fresh) == {0}


def test_a_pipeline_within_another_ones_callback() -> None:
    """A preview in between is a run of its own, and so is what is left of the outer one."""
    pipe, call = sd3()
    spy = Spy()

    def preview(outer: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            inner = d.StableDiffusion3Pipeline(**{**outer.components, "scheduler": deepcopy(outer.scheduler)})
            run(inner, call, num_inference_steps=2)
        return tensors

    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        run(pipe, call, num_inference_steps=4, callback_on_step_end=preview)
    assert [(step, steps) for step, steps, _ in passes(spy)] == [(0, 4), (1, 4), (0, 2), (1, 2), (2, 4), (3, 4)]


def test_schedulers_are_swapped_between_calls() -> None:
    pipe, call = BUILDERS["wan"]()
    spy = Spy()
    schedulers = (d.FlowMatchEulerDiscreteScheduler(), pipe.scheduler, d.FlowMatchEulerDiscreteScheduler(shift=5.0))
    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        for scheduler in schedulers:
            pipe.scheduler = scheduler
            run(pipe, call, num_inference_steps=3)
    seen = [(step, steps) for step, steps, branch in passes(spy) if branch == "cond"]
    assert seen == [(i, 3) for _ in range(3) for i in range(3)]


def test_guidance_acts_in_a_pipeline_that_it_was_not_given_to() -> None:
    pipe, call = BUILDERS["flux"]()
    other = d.FluxPipeline(**{**pipe.components, "scheduler": deepcopy(pipe.scheduler)})
    dense = run(other, call)
    with diffsparse.guide(other, "single.0.1", head_scale=2.0, start=0.25, stop=0.75) as handle:
        want, report = run(other, call), handle.report()
    for target in (pipe, other.transformer):
        with diffsparse.guide(target, "single.0.1", head_scale=2.0, start=0.25, stop=0.75) as handle:
            got = run(other, call)
            assert torch.equal(got, want)
            assert handle.report().passes == report.passes == 2
    assert not torch.allclose(want, dense)


def test_the_pipeline_that_calls_a_compiled_model_is_read() -> None:
    pipe, call = BUILDERS["wan"]()
    spy = Spy()
    with diffsparse.apply(pipe.transformer, spy, schedule=ALWAYS):
        pipe.transformer.compile(backend="eager")
        run(pipe, call, num_inference_steps=3)
    torch._dynamo.reset()
    assert [(s, n) for s, n, branch in passes(spy) if branch == "cond"] == [(i, 3) for i in range(3)]


def test_only_a_running_pipeline_calls() -> None:
    assert calling_pipeline() is None

    class Mine:
        def __init__(self) -> None:
            self.scheduler = d.FlowMatchEulerDiscreteScheduler()

        def sample(self, call: Callable[[], Any]) -> Any:
            return call()

    mine, its = Mine(), Mine()
    assert mine.sample(calling_pipeline) is mine
    assert mine.sample(lambda: its.sample(calling_pipeline)) is its


# --- runs that are cut off --------------------------------------------------------------------------------------------


def stop_in_callback(at: int) -> Callable[..., Any]:
    def callback(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise Cut
        return tensors

    return callback


def cut_off(pipe: Any, call: dict[str, Any], how: str, at: int) -> None:
    """A call of 4 steps that ends at step `at`, one way or another."""
    if how == "callback":
        with pytest.raises(Cut):
            run(pipe, call, num_inference_steps=4, callback_on_step_end=stop_in_callback(at))
    elif how == "interrupt":

        def interrupt(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step == at
            return tensors

        run(pipe, call, num_inference_steps=4, callback_on_step_end=interrupt)
    else:
        raising = [x for name, x in pipe.transformer.named_modules() if name.endswith("to_q")][-1]
        count = Counter[str]()

        def fail(*_: Any) -> None:
            count["passes"] += 1
            if count["passes"] > at:
                raise Cut

        hook = raising.register_forward_hook(fail)
        with pytest.raises(Cut):
            run(pipe, call, num_inference_steps=4)
        hook.remove()


@pytest.mark.parametrize("name", ["wan", "sd3", "cogvideox"])
@pytest.mark.parametrize("how", ["callback", "interrupt", "pass"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_run_after_one_that_was_cut_off(name: str, how: str, at: int) -> None:
    """With the same number of steps, and with another."""
    pipe, call = BUILDERS[name]()
    if name == "cogvideox":
        pipe.scheduler = d.CogVideoXDDIMScheduler()
    with diffsparse.apply(pipe, AdaSpa(block=8, sparsity=0.6), schedule=Schedule(1)) as handle:
        want = {steps: run(pipe, call, num_inference_steps=steps) for steps in (4, 3)}
        for steps in want:
            cut_off(pipe, call, how, at)
            assert torch.equal(run(pipe, call, num_inference_steps=steps), want[steps])
            assert (handle.report().steps, handle.report().dense_steps) == (steps, 1)
            assert not handle.report().fallbacks


def test_a_call_that_was_cut_off_is_told() -> None:
    model, kwargs = build(WAN), inputs(WAN)

    class Failing:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
            raise Cut

    with diffsparse.apply(model, Failing(), schedule=ALWAYS) as handle:
        with pytest.raises(Cut):
            tensors(model, kwargs)
        assert handle.report().fallbacks == {"cut off": 1}


@numbers_contexts
def test_a_step_that_goes_back_is_a_new_run() -> None:
    model, kwargs, spy = build(WAN), inputs(WAN), Spy()
    with diffsparse.apply(model, spy, schedule=ALWAYS) as handle:
        for step in (0, 1, 2, 1, 2, 3):
            for branch in ("cond", "uncond"):
                with model.cache_context(branch, step_index=step, num_inference_steps=4):
                    tensors(model, kwargs)
        assert handle.report().table().keys() == {"1", "2", "3"}
    first = [s for s in spy.seen if s.layer == spy.seen[0].layer and s.branch == "cond"]
    assert [s.fresh for s in first] == [True, False, False, True, False, False]


def test_the_guider_leaves_guidance_its_clock() -> None:
    """`HeadGuidance` borrows the run of a guided model: its report goes on, and so does its place in the run."""
    pipe, call = BUILDERS["sd3"]()
    guider = diffsparse.HeadGuidance(["1.0"], guidance_scale=1.0, head_scale=2.0)
    model = pipe.transformer
    with diffsparse.guide(pipe, "1.1", head_scale=2.0) as handle:
        clock = handle._guides[0].run.clock

        def perturb_aside(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            guider.set_state(step=step, num_inference_steps=4, timestep=torch.tensor(1))
            for _ in range(2):
                guider.prepare_models(model)
                guider.cleanup_models(model)
            return tensors

        want, passed = run(pipe, call), handle.report().passes
        got = run(pipe, call, callback_on_step_end=perturb_aside)
        assert torch.equal(got, want)
        assert handle.report().passes == passed == call["num_inference_steps"]
        assert handle._guides[0].run.clock is clock
        assert clock.pipe is pipe


def test_the_guider_ends_with_a_pass_that_was_cut_off() -> None:
    pipe, call = BUILDERS["sd3"]()
    guider = diffsparse.HeadGuidance(["1.0"], guidance_scale=1.0, head_scale=2.0)
    with diffsparse.apply(pipe, Random(0.5, block=8), schedule=Schedule(1)) as handle:
        want = run(pipe, call)
        guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(1))
        guider.prepare_models(pipe.transformer)
        guider.prepare_models(pipe.transformer)
        hook = pipe.transformer.norm_out.register_forward_hook(lambda *_: (_ for _ in ()).throw(Cut()))
        with pytest.raises(Cut):
            run(pipe, call)
        hook.remove()
        run(pipe, call)  # its first layer tells that the perturbed pass is over
        assert torch.equal(run(pipe, call), want)
        assert handle.report().steps == call["num_inference_steps"]


# --- long videos in windows -------------------------------------------------------------------------------------------


def skyreels() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = d.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = d.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(t.UMT5Config, t.UMT5EncoderModel),
        vae=vae.eval(),
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=model.eval(),
    )
    sizes = {"height": 32, "width": 48, "num_frames": 33, "base_num_frames": 17, "overlap_history": 5}
    words = {"prompt": "a cat", "negative_prompt": "bad", "max_sequence_length": 16}
    return pipe, {**sizes, **words, "num_inference_steps": 4, "addnoise_condition": 20}


def helios() -> tuple[Any, dict[str, Any]]:
    pipe, _ = skyreels()
    model = build("HeliosTransformer3DModel")
    config = {**model.config, "in_channels": 16, "out_channels": 16, "text_dim": 32}
    torch.manual_seed(0)
    model = d.HeliosTransformer3DModel.from_config(config).eval()
    parts = {**pipe.components, "transformer": model, "scheduler": d.HeliosScheduler(stages=1, stage_range=[0, 1])}
    sizes = {"height": 32, "width": 48, "num_frames": 33, "num_latent_frames_per_chunk": 3}
    words = {"prompt": "a cat", "negative_prompt": "bad", "max_sequence_length": 16}
    return d.HeliosPipeline(**parts), {**sizes, **words, "num_inference_steps": 4}


def framepack() -> tuple[Any, dict[str, Any]]:
    pipe, call = BUILDERS["hunyuan_video"]()
    config = {**build("HunyuanVideoFramepackTransformer3DModel").config, "image_proj_dim": 16}
    torch.manual_seed(0)
    parts = {**pipe.components, "transformer": d.HunyuanVideoFramepackTransformer3DModel.from_config(config).eval()}
    pipe = d.HunyuanVideoFramepackPipeline(**parts, image_encoder=None, feature_extractor=None)
    pipe.encode_image = lambda *_, **__: torch.randn(1, 5, 16)  # stands for a vision model
    sizes = {"height": 32, "width": 48, "num_frames": 17, "latent_window_size": 3}
    first = {"image": torch.zeros(1, 3, 32, 48)}
    return pipe, {**call, **sizes, **first, "num_inference_steps": 4}


WINDOWS = {"skyreels": skyreels, "skyreels ar": skyreels, "helios": helios, "framepack": framepack}


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of Helios' scheduler
@pytest.mark.parametrize("kind", WINDOWS)
def test_later_windows_are_as_sparse_as_the_first(kind: str) -> None:
    pipe, call = WINDOWS[kind]()
    if kind == "skyreels ar":
        call |= {"ar_step": 1, "causal_block_size": 1}
    spy = Spy()
    pipe.set_progress_bar_config(disable=True)
    with diffsparse.apply(pipe, spy, schedule=Schedule(1)) as handle:
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
        report = handle.report()
    seen = [(step, steps) for step, steps, branch in passes(spy) if branch == spy.seen[0].branch]
    windows = list(_windows(seen))
    assert len(windows) > 1
    for window in windows:
        steps = window[0][1]
        assert [step for step, _ in window] == list(range(1, steps))  # the first is the schedule's
        assert {n for _, n in window} == {steps}
    assert report.dense_steps == report.steps
    assert {c.step for c in report.calls if c.reason == "schedule"} == {0}


def _windows(seen: list[tuple[int, int | None]]) -> Iterator[list[Any]]:
    window: list[Any] = []
    for step, steps in seen:
        if window and step <= window[-1][0]:
            yield window
            window = []
        window.append((step, steps))
    yield window


# --- where a run begins -----------------------------------------------------------------------------------------------

HEUN = d.FlowMatchHeunDiscreteScheduler


@pytest.mark.parametrize(
    ("strength", "scheduler", "more", "steps"),
    [
        (1.0, None, {"num_inference_steps": 10}, 10),
        (0.6, None, {"num_inference_steps": 10}, 6),
        (0.3, None, {"num_inference_steps": 10}, 3),
        (0.5, HEUN, {"num_inference_steps": 8}, 7),  # two passes a step, but the last
        (0.5, None, {"num_inference_steps": 4, "sigmas": [1.0, 0.7, 0.5, 0.2]}, 2),
    ],
)
def test_a_run_from_an_image_begins_at_step_0(strength: float, scheduler: Any, more: Any, steps: int) -> None:
    pipe, call = sd3("StableDiffusion3Img2ImgPipeline")
    pipe.scheduler = pipe.scheduler if scheduler is None else scheduler()
    spy = Spy()
    with diffsparse.apply(pipe, spy, schedule=Schedule(2)) as handle:
        run(pipe, {**call, "strength": strength}, **more)
        assert handle.report().table().keys() == {str(i) for i in range(steps)}
    assert [(step, n) for step, n, _ in passes(spy)] == [(i, steps) for i in range(2, steps)] or steps == 2


@pytest.mark.parametrize("kind", ["ddim", "dpm", "unipc"])
def test_a_run_from_a_video_begins_at_step_0(kind: str) -> None:
    """No pipeline of these sets a begin index; two of the schedulers have no step index."""
    if kind == "unipc":
        pipe, call = BUILDERS["wan"]()
        parts = {k: v for k, v in pipe.components.items() if k != "transformer_2"}
        pipe = d.WanVideoToVideoPipeline(**parts)
    else:
        pipe, call = BUILDERS["cogvideox"]()
        pipe = d.CogVideoXVideoToVideoPipeline(**pipe.components)
        pipe.scheduler = d.CogVideoXDDIMScheduler() if kind == "ddim" else d.CogVideoXDPMScheduler()
    call = {k: v for k, v in call.items() if k != "num_frames"}
    video, spy = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(1)), Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        run(pipe, {**call, "video": video}, num_inference_steps=8, strength=0.5)
    for branch in {s.branch for s in spy.seen}:
        assert [(s, n) for s, n, b in passes(spy) if b == branch] == [(i, 4) for i in range(4)]


def test_guidance_windows_count_from_where_the_run_begins() -> None:
    pipe, call = sd3("StableDiffusion3Img2ImgPipeline")
    with diffsparse.guide(pipe, "1.1", head_scale=2.0, stop=0.5) as handle:
        run(pipe, {**call, "strength": 0.6}, num_inference_steps=10)
        assert handle.report().passes == 3


# --- schedulers without a step index ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [d.CogVideoXDDIMScheduler, d.CogVideoXDPMScheduler])
def test_steps_that_a_cache_skipped_whole_are_counted(scheduler: Any) -> None:
    """The step is told by where the timestep is stored; counting passes would give 0, 1, 2."""
    pipe, call = BUILDERS["cogvideox"]()
    pipe.scheduler = scheduler()
    model, spy = pipe.transformer, Spy()
    forward, made, kept = model.forward, Counter[str](), {}

    def skipping(*args: Any, **kwargs: Any) -> Any:
        made["passes"] += 1
        if made["passes"] not in (2, 3, 5):
            kept["out"] = forward(*args, **kwargs)
        return kept["out"]

    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        model.forward = skipping
        run(pipe, call, num_inference_steps=6)
    assert [(step, steps) for step, steps, _ in passes(spy)] == [(0, 6), (3, 6), (5, 6)]


def test_places_in_a_schedule() -> None:
    schedule = torch.arange(12.0)[2:10:2]
    assert [_place(x, schedule) for x in schedule] == [(i, 4) for i in range(4)]
    matrix = torch.arange(12.0).view(4, 3)
    assert [_place(row, schedule) for row in matrix] == [(i, 4) for i in range(4)]
    assert _place(torch.tensor(3.0), schedule) is None
    assert _place(matrix[:, 0], schedule) is None
    assert _place(None, schedule) is None
    assert _place(3.0, schedule) is None


def test_a_pipeline_that_keeps_no_timestep() -> None:
    """DiT on DDIM: neither scheduler nor pipeline tells the step, so passes are counted; it stood at 0 once."""
    config = {**build("DiTTransformer2DModel").config, "num_embeds_ada_norm": 1000}
    model, vae = d.DiTTransformer2DModel.from_config(config).eval(), BUILDERS["sd3"]()[0].vae
    pipe, spy = d.DiTPipeline(transformer=model, vae=vae, scheduler=d.DDIMScheduler()), Spy()
    pipe.set_progress_bar_config(disable=True)
    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        pipe([1], num_inference_steps=4)
    assert [(step, steps) for step, steps, _ in passes(spy)] == [(i, 4) for i in range(4)]


# --- hand-written loops -----------------------------------------------------------------------------------------------


def test_a_loop_beside_the_scheduler_of_its_pipeline_is_never_silently_dense() -> None:
    """The pipeline's scheduler was never set, has run out, or was left in the middle of a run."""
    pipe, call = BUILDERS["wan"]()
    sizes = {"hidden_states": torch.randn(1, 16, 3, 4, 4), "timestep": torch.tensor([500])}
    kwargs = {**sizes, "encoder_hidden_states": torch.randn(1, 16, 32)}
    for before in (None, "whole", "cut off"):
        if before == "whole":
            run(pipe, call)
        if before == "cut off":
            cut_off(pipe, call, "callback", 1)
        for branch in ("cond", None):
            with diffsparse.apply(pipe, Random(0.5, block=4)) as handle:
                for _ in range(16):
                    with pipe.transformer.cache_context(branch) if branch else torch.no_grad():
                        tensors(pipe.transformer, kwargs)
                report = handle.report()
            assert report.dense_steps == 1, (before, branch)
            assert report.steps >= 12  # it may take some passes to see that a scheduler does not move


def test_a_loop_after_a_call_that_was_cut_off() -> None:
    """While applied: the call's schedule is not the loop's."""
    pipe, call = BUILDERS["wan"]()
    sizes = {"hidden_states": torch.randn(1, 16, 3, 4, 4), "timestep": torch.tensor([500])}
    kwargs = {**sizes, "encoder_hidden_states": torch.randn(1, 16, 32)}
    with diffsparse.apply(pipe, Random(0.5, block=4)) as handle:
        for at in (0, 2):
            cut_off(pipe, call, "callback", at)
            for _ in range(8):
                tensors(pipe.transformer, kwargs)
            assert (handle.report().steps, handle.report().dense_steps) == (8, 1)
            handle.reset()


def test_an_unknown_length_is_told() -> None:
    model, kwargs = build(WAN), inputs(WAN)
    with diffsparse.apply(model, Random(0.5, block=8), schedule=Schedule(0.2, 2)) as handle:
        for _ in range(6):
            tensors(model, kwargs)
        report = handle.report()
    assert (report.steps, report.dense_steps) == (6, 1)
    assert len(report.notes) == 1
    assert "dense_first=0.2 is 1 step and dense_last=2 is not kept" in report.notes[0]
    with diffsparse.apply(model, Random(0.5, block=8), schedule=Schedule(1)) as handle:
        tensors(model, kwargs)
        assert not handle.report().notes


def test_sequences_of_several_shapes_are_counted_apart() -> None:
    """Two requests that a server works on in turn."""
    model, spy = build(WAN), Spy()
    small, large = inputs(WAN), inputs(WAN, Shape(2, 12, 16, 9))
    with diffsparse.apply(model, spy, schedule=ALWAYS):
        for kwargs in (small, large, small, large, large, small):
            tensors(model, kwargs)
    assert spy.steps() == [0, 0, 1, 1, 2, 2]


# --- without end ------------------------------------------------------------------------------------------------------


SIZES = MOST_SHAPES + 2  # more than are remembered at once


def serve(model: Any) -> None:
    for request in range(SIZES):
        kwargs = inputs(WAN, Shape(1, 8, 8 + 2 * request, 4 + request % 7))
        for _ in range(4):
            tensors(model, kwargs)


@pytest.mark.parametrize("strategy", [Digest(block=8, sparsity=0.6), AdaSpa(block=8, sparsity=0.6)], ids=repr)
def test_a_server_remembers_and_records_no_more_in_the_end(strategy: Any) -> None:
    model = build(WAN)
    with diffsparse.apply(model, strategy, schedule=Schedule(dense_first=1)) as handle:
        sizes = []
        for _ in range(2):
            serve(model)
            (kept,), report = handle._runs, handle.report()
            sizes.append((len(report.calls), len(kept._memories), len(kept.clock._counts)))
            assert report.memory_bytes == held(kept._memories)
        assert sizes[0] == sizes[1]
        self_attentions = sum("attn1" in layer.name for layer in kept.layers)
        assert sizes[0][1:] == (MOST_SHAPES * self_attentions, MOST_SHAPES)
        assert report.sparse_calls + report.dense_calls == 2 * SIZES * 4 * self_attentions
        assert report.steps == 4
        by_shape = 1 / 4
        assert report.density == pytest.approx(by_shape + (1 - by_shape) * report.sparse_density)


def held(memories: Any) -> int:
    """Bytes of all tensors that the garbage collector finds in there, each storage once."""
    found, todo, seen = {}, [memories], set()
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, type):
            continue
        seen.add(id(x))
        if torch.is_tensor(x):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        else:
            todo += gc.get_referents(x)
    return sum(found.values())


@dataclass
class _Holder:
    masks: list[Tensor]


class Hoarder:
    """Keeps all kinds of things; `twice` shares its storage."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        x = torch.zeros(1000)
        site.memory.update(a=_Holder([x, torch.zeros(10)]), b={"c": (torch.zeros(5), {"d": x[:3]})}, e="f", twice=x)
        return site.dense(q, k, v)


def test_memory_bytes_counts_what_is_held_each_storage_once() -> None:
    model, kwargs = build(WAN), inputs(WAN)
    with diffsparse.apply(model, Hoarder(), schedule=ALWAYS) as handle:
        tensors(model, kwargs)
        layers = handle.report().dense_calls
        assert handle.report().memory_bytes == layers * 4 * (1000 + 10 + 5)
        handle.reset()
        assert handle.report().memory_bytes == layers * 4 * (1000 + 10 + 5)  # the last run's
        assert not handle._runs[0]._memories


@numbers_contexts
def test_a_run_of_known_length_keeps_every_call() -> None:
    model, kwargs = build(WAN), inputs(WAN, Shape(1, 4, 4, 2))
    with diffsparse.apply(model, Random(0.5, block=4), schedule=Schedule(1)) as handle:
        for step in range(100):
            for branch in ("cond", "uncond"):
                with model.cache_context(branch, step_index=step, num_inference_steps=100):
                    tensors(model, kwargs)
        report = handle.report()
    assert len(report.calls) == report.sparse_calls + report.dense_calls == 100 * 2 * 2
    assert (report.steps, report.dense_steps) == (100, 1)


@numbers_contexts
def test_one_step_for_ever_is_bounded_too() -> None:
    """A distilled model's server: each request is the step 0 of 1, under a name of its own."""
    model, kwargs = build(WAN), inputs(WAN, Shape(1, 4, 4, 2))
    with diffsparse.apply(model, Random(0.5, block=4), schedule=ALWAYS) as handle:
        for request in range(60):
            with model.cache_context(f"request {request}", step_index=0, num_inference_steps=1):
                tensors(model, kwargs)
        report, (kept,) = handle.report(), handle._runs
    assert report.sparse_calls == 60 * 2
    assert len(report.calls) <= 8 * len(kept.layers)
    assert len(kept._memories) <= 2 * MOST_SHAPES
    assert report.steps == 1
