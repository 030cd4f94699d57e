"""Guidance on stock pipelines: exact algebra on every branch, nothing left behind, beside sparse attention."""

from __future__ import annotations

import copy
from typing import Any

import diffusers as d
import pytest
import torch
from diffusers.hooks import apply_group_offloading

import diffsparse
from diffsparse import AdaSpa, Dense, HeadGuidance, Random, Schedule
from diffsparse.errors import ConfigError
from diffsparse.guidance.perturb import KINDS
from diffsparse.seam.targets import models_of
from support.spy import Spy
from support.tiny_pipelines import BUILDERS, run
from support.tiny_transformers import CASES, build, inputs, tensors

ALWAYS = Schedule(dense_first=0)
WAN = "WanTransformer3DModel"
HEADS = {"flux": "single.0.1", "hunyuan_video": "single.0.1"}  # of the last block; elsewhere it is block 1
SINGLE = ("hunyuan_video",)  # guidance-distilled: there is no unconditional pass


def heads_of(name: str) -> str:
    return HEADS.get(name, "1.1")


def untouched(model: torch.nn.Module) -> bool:
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return not hooked and not [m for m in model.modules() if "_diffsparse" in {**vars(m), **m._modules}]


@pytest.mark.parametrize("name", BUILDERS)
def test_no_guidance_changes_no_bit_and_removal_restores(name: str) -> None:
    pipe, call = BUILDERS[name]()
    want = run(pipe, call)
    for knobs in (
        {"head_scale": 0.0},
        {"head_strength": 0.0},
        {"head_strength": 0.0, "branch": "uncond"},
        {"start": 99},
    ):
        with diffsparse.guide(pipe, heads_of(name), **knobs):
            assert torch.equal(run(pipe, call), want), knobs
    with diffsparse.guide(pipe, heads_of(name)) as handle:
        assert not torch.equal(run(pipe, call), want)
        assert handle.report().passes == call["num_inference_steps"]
    handle.remove()
    assert torch.equal(run(pipe, call), want)
    assert all(untouched(model) for model in models_of(pipe).values())


class Recorder:
    """The transformer's outputs in order, as they come out of its own forward."""

    def __init__(self, pipe: Any) -> None:
        self.outs: list[torch.Tensor] = []
        self.busy = False
        for model in models_of(pipe).values():
            model.register_forward_hook(lambda _, __, out: self.outs.append(out[0].clone()))


def shift(pipe: Any, call: dict[str, Any], **knobs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Predictions of the first step before and after guidance; both in the order of the passes."""
    raw = Recorder(pipe)
    with diffsparse.guide(pipe, **knobs):
        guided = Recorder(pipe)
        run(pipe, call, num_inference_steps=2)
    return raw.outs, guided.outs


@pytest.mark.parametrize("name", BUILDERS)
def test_the_algebra_of_one_step(name: str) -> None:
    """Each pass of a step gets s (c - p), so that linear guidance ends with u + g (c - u) + s (c - p)."""
    pipe, call = BUILDERS[name]()
    raw, guided = shift(pipe, call, heads=heads_of(name), head_scale=2.5)
    # `raw` hooks run ahead of the guidance's, `guided` ones after it; the extra pass is seen by both, unguided.
    c = raw[0]  # conditional, or both halves [uncond | cond]
    p = next(x for x in raw[1:] if x.shape == c.shape)
    batched = name in ("cogvideox", "ltx", "mochi", "sd3")
    delta = 2.5 * (c - p)
    if batched:
        delta = delta.chunk(2)[1].repeat(2, *[1] * (delta.ndim - 1))
    torch.testing.assert_close(guided[1], c + delta)
    if not batched and name not in SINGLE:
        torch.testing.assert_close(guided[2], raw[2] + delta)
    assert delta.abs().max() > 0


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in SINGLE])
def test_the_unconditional_pass_can_be_perturbed_instead(name: str) -> None:
    """No pass more, and only the unconditional prediction changes."""
    pipe, call = BUILDERS[name]()
    plain = Recorder(pipe)
    run(pipe, call, num_inference_steps=2)
    pipe, call = BUILDERS[name]()
    raw, _ = shift(pipe, call, heads=heads_of(name), branch="uncond")
    assert len(raw) == len(plain.outs)
    if len(raw) == 4:  # two steps of two passes
        (c, u), (want_c, want_u) = raw[:2], plain.outs[:2]
    else:
        (u, c), (want_u, want_c) = raw[0].chunk(2), plain.outs[0].chunk(2)
    assert torch.equal(c, want_c)
    assert not torch.equal(u, want_u)


@pytest.mark.parametrize("name", SINGLE)
def test_without_an_unconditional_pass_there_is_none_to_perturb(name: str) -> None:
    pipe, call = BUILDERS[name]()
    with (
        diffsparse.guide(pipe, heads_of(name), branch="uncond"),
        pytest.raises(ConfigError, match=r'this call has none .*; use branch "extra"'),
    ):
        run(pipe, call)


def test_two_images_of_a_batch_are_no_pair() -> None:
    """A batch without classifier-free guidance is all conditional: each sample has a difference of its own."""
    pipe, call = BUILDERS["sd3"]()
    options = {**call, "guidance_scale": 1.0, "num_images_per_prompt": 2}
    with diffsparse.guide(pipe, "1.1"):
        both = run(pipe, options)
    plain = run(pipe, options)
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(both, plain, strict=True))
    raw, guided = shift(pipe, options, heads="1.1", head_scale=1.0)
    torch.testing.assert_close(guided[1], 2 * raw[0] - raw[1])


@pytest.mark.parametrize("alike", [(), (0,), (0, 1)])
def test_a_batch_is_a_pair_only_if_its_halves_hold_the_same_latents(alike: tuple[int, ...]) -> None:
    """Of four samples of a bare model those in `alike` stand in both halves; if all do, the first is unconditional."""
    model, kwargs = build(WAN), inputs(WAN)
    latents = torch.randn(4, *kwargs["hidden_states"].shape[1:])
    for sample in alike:
        latents[2 + sample] = latents[sample]
    words = torch.randn(4, *kwargs["encoder_hidden_states"].shape[1:])
    call = {**kwargs, "hidden_states": latents, "encoder_hidden_states": words, "timestep": torch.full((4,), 500)}
    raw: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, out: raw.append(out[0].clone()))
    with torch.no_grad(), diffsparse.guide(model, "1.*", head_scale=1.0):
        out = tensors(model, call)[0]
    plain, perturbed = raw
    delta = plain - perturbed
    if len(alike) == 2:
        delta = delta.chunk(2)[1].repeat(2, *[1] * (delta.ndim - 1))
    torch.testing.assert_close(out, plain + delta)
    assert delta.abs().max() > 1e-4


def test_lists_of_samples_and_a_conditional_half_that_comes_first() -> None:
    """Z-Image takes and gives lists, the conditional samples ahead of the unconditional ones."""
    name = "ZImageTransformer2DModel"
    model, kwargs = build(name), inputs(name)
    (x,), (words,) = kwargs["x"], kwargs["cap_feats"]
    pair = {"x": [x, x], "cap_feats": [words, -words], "t": torch.zeros(2), "return_dict": False}
    raw: list[list[torch.Tensor]] = []
    model.register_forward_hook(lambda _, __, out: raw.append([part.clone() for part in out[0]]))
    with torch.no_grad(), diffsparse.guide(model, "1.*", head_scale=2.0):
        out = model(**pair)[0]
    (c, u), (p, _) = raw
    assert isinstance(out, list)
    assert not torch.allclose(c, p)
    torch.testing.assert_close(out[0], c + 2 * (c - p))
    torch.testing.assert_close(out[1], u + 2 * (c - p))


def test_equals_the_pag_pipeline_of_diffusers() -> None:
    """Its perturbed tokens see themselves and the text: kind "self", on all heads of the layer."""
    pipe, call = BUILDERS["sd3"]()
    plain = run(pipe, call)
    parts = {name: x for name, x in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    pag = d.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    want = run(pag, call, pag_scale=3.0)
    pipe, call = BUILDERS["sd3"]()
    with diffsparse.guide(pipe, "1.*", kind="self", head_scale=3.0):
        got = run(pipe, call)
    assert (want - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, want)


def test_without_text_identity_and_self_are_the_same() -> None:
    pipe, call = BUILDERS["wan"]()
    outs = []
    for kind in ("identity", "self"):
        with diffsparse.guide(pipe, "1.0", kind=kind):
            outs.append(run(pipe, call))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_have_an_effect(kind: str) -> None:
    pipe, call = BUILDERS["flux"]()
    want = run(pipe, call)
    with diffsparse.guide(pipe, "0.*", kind=kind):
        assert not torch.equal(run(pipe, call), want)


def test_text_rows_are_an_option() -> None:
    pipe, call = BUILDERS["flux"]()
    outs = []
    for text in (False, True):
        with diffsparse.guide(pipe, "0.*", text=text):
            outs.append(run(pipe, call))
    assert not torch.equal(*outs)


@pytest.mark.parametrize(("start", "stop", "want"), [(0, 2, 2), (0.5, 1.0, 2), (1, 3, 2), (0.25, 0.5, 1)])
def test_steps_that_are_guided(start: float, stop: float, want: int) -> None:
    pipe, call = BUILDERS["wan"]()
    with diffsparse.guide(pipe, "0.0", start=start, stop=stop) as handle:
        run(pipe, call, num_inference_steps=4)
    assert handle.report().passes == want


def test_rescaling_gives_the_deviation_back() -> None:
    pipe, call = BUILDERS["hunyuan_video"]()
    raw, guided = shift(pipe, call, heads="0.*", head_scale=20.0, rescale=1.0)
    torch.testing.assert_close(guided[1].std(), raw[0].std())
    pipe, call = BUILDERS["hunyuan_video"]()
    raw, guided = shift(pipe, call, heads="0.*", head_scale=20.0)
    assert guided[1].std() > 1.01 * raw[0].std()


# --- blocks that are not computed twice -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_skipped_blocks_change_no_bit(name: str) -> None:
    pipe, call = BUILDERS[name]()
    outs, reports = [], []
    for reuse in (True, False):
        with diffsparse.guide(pipe, heads_of(name), reuse=reuse) as handle:
            outs.append(run(pipe, call))
            reports.append(handle.report())
    assert torch.equal(*outs)
    assert reports[0].blocks_skipped == reports[0].blocks_run == call["num_inference_steps"]
    assert not reports[0].whole
    assert not reports[1].blocks_skipped


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.layout])
def test_skipped_blocks_on_every_class(name: str) -> None:
    """Whatever the structure, output and plain output are the same; where it is a chain, blocks are skipped."""
    model, kwargs = build(name), inputs(name)
    last = diffsparse.guidance.heads.names_of(model)[-1]
    outs = []
    for reuse in (True, False):
        with diffsparse.guide(model, last, reuse=reuse) as handle:
            outs.append(tensors(model, kwargs))
            report = handle.report()
            if reuse:
                assert bool(report.blocks_skipped) != bool(report.whole)
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


class Skips(torch.nn.Module):
    """Wraps a block so that its output is kept by others, or changed in place."""

    def __init__(self, block: torch.nn.Module, how: str) -> None:
        super().__init__()
        self.block, self.how, self.kept = block, how, []

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.how == "kept":
            self.kept.append(x)
        elif self.how == "in place":
            x += 0.1
        return self.block(x, *args, **kwargs)


@pytest.mark.parametrize(
    ("how", "reason"), [("kept", "used again later"), ("in place", "changed in place"), ("plain", "")]
)
def test_what_is_no_chain_runs_whole(how: str, reason: str) -> None:
    torch.manual_seed(0)
    model = d.WanTransformer3DModel(**{**CASES[WAN].config, "num_layers": 4}).eval()
    model.blocks[1] = Skips(model.blocks[1], how)
    with diffsparse.guide(model, "3.0") as handle:
        tensors(model, inputs(WAN))
        report = handle.report()
    assert all(reason in text for text in report.whole)
    assert bool(report.whole) == bool(reason)
    assert report.blocks_skipped == (0 if reason else 3)


def test_a_first_perturbed_block_saves_nothing_and_says_so() -> None:
    model = build(WAN)
    with diffsparse.guide(model, "0.0") as handle:
        tensors(model, inputs(WAN))
    assert handle.report().whole == {"the first block is perturbed": 1}
    assert "whole: the first block is perturbed x1" in str(handle.report())


# --- beside other things --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["guide first", "apply first"])
@pytest.mark.parametrize("name", ["wan", "cogvideox", "flux"])
def test_beside_sparse_attention_in_either_order(name: str, order: str) -> None:
    pipe, call = BUILDERS[name]()
    want = run(pipe, call)
    with diffsparse.guide(pipe, heads_of(name)):
        dense = run(pipe, call)
    sparse = AdaSpa(block=8, sparsity=0.5)
    if order == "guide first":
        guided = diffsparse.guide(pipe, heads_of(name))
        applied = diffsparse.apply(pipe, sparse, schedule=Schedule(1))
    else:
        applied = diffsparse.apply(pipe, sparse, schedule=Schedule(1))
        guided = diffsparse.guide(pipe, heads_of(name))
    both = run(pipe, call)
    assert not torch.equal(both, dense)
    branches = {c.branch for c in applied.report().calls}
    assert len([b for b in branches if b.endswith("+perturbed")]) == 1
    assert {c.step for c in applied.report().calls if c.branch.endswith("+perturbed") and c.kind == "sparse"}
    applied.remove()
    assert torch.equal(run(pipe, call), dense), "guidance stays when sparse attention goes"
    again = diffsparse.apply(pipe, sparse, schedule=Schedule(1))
    assert torch.equal(run(pipe, call), both)
    guided.remove()
    only = run(pipe, call)
    assert not torch.equal(only, both)
    again.remove()
    assert torch.equal(run(pipe, call), want)
    assert all(untouched(model) for model in models_of(pipe).values())


def test_dense_applied_under_guidance_changes_no_bit() -> None:
    pipe, call = BUILDERS["cogvideox"]()
    with diffsparse.guide(pipe, "1.1"):
        want = run(pipe, call)
        diffsparse.apply(pipe, Dense(), schedule=ALWAYS)
        assert torch.equal(run(pipe, call), want)
    diffsparse.remove(pipe)
    assert untouched(pipe.transformer)


@pytest.mark.parametrize("name", BUILDERS)
def test_steps_and_branches_are_counted_as_without_guidance(name: str) -> None:
    """The window opens in the middle: names, ordinals and steps of all other passes stay what they were."""
    pipe, call = BUILDERS[name]()

    def seen(guided: bool) -> list[tuple[str, int, str]]:
        spy = Spy()
        with diffsparse.apply(pipe, spy, schedule=ALWAYS):
            if guided:
                diffsparse.guide(pipe, heads_of(name), start=1, stop=3, reuse=False)
            run(pipe, call, num_inference_steps=4)
            diffsparse.remove(pipe)
        return [(s.layer, s.step, s.branch) for s in spy.seen]

    plain, guided = seen(False), seen(True)
    assert [s for s in guided if not s[2].endswith("+perturbed")] == plain
    assert {s[1] for s in guided if s[2].endswith("+perturbed")} == {1, 2}


def test_memory_is_apart_for_the_extra_pass() -> None:
    pipe, call = BUILDERS["wan"]()
    spy = Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS), diffsparse.guide(pipe, "0.0"):
        run(pipe, call, num_inference_steps=3)
    fresh = [(s.layer, s.branch, s.step) for s in spy.seen if s.fresh]
    assert len(fresh) == 3 * len({s.layer for s in spy.seen})
    assert {step for *_, step in fresh} == {0}


CACHES = {
    "first-block": lambda: d.FirstBlockCacheConfig(threshold=0.3),
    "taylor": lambda: d.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    "pyramid": lambda: d.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_step_caches_do_not_see_the_extra_pass(kind: str) -> None:
    """Guidance of scale nearly 0 runs all extra passes, and leaves what the cache does as it was."""
    pipe, call = BUILDERS["wan"]()
    pipe.transformer.enable_cache(CACHES[kind]())
    want = run(pipe, call, num_inference_steps=6)
    with diffsparse.guide(pipe, "1.0", head_scale=1e-30) as handle:
        got = run(pipe, call, num_inference_steps=6)
        report = handle.report()
    assert report.passes
    assert set(report.whole) == {"a step cache is on"}
    torch.testing.assert_close(got, want)
    with diffsparse.guide(pipe, "0.0", head_scale=3.0):
        assert not torch.allclose(run(pipe, call, num_inference_steps=6), want)
    torch.testing.assert_close(run(pipe, call, num_inference_steps=6), want)


def test_what_one_run_of_a_model_knew_is_not_held_against_the_next() -> None:
    """`apply` gives the model a new clock, whose counts begin anew."""
    model, kwargs = build(WAN), inputs(WAN)
    with diffsparse.guide(model, "1.0") as handle:
        want = tensors(model, kwargs)[0]
        for _ in range(2):
            with diffsparse.apply(model, Dense(), schedule=ALWAYS):
                assert torch.equal(tensors(model, kwargs)[0], want)
                assert handle.report().passes == 1


def test_nothing_is_kept_between_passes() -> None:
    pipe, call = BUILDERS["wan"]()
    with diffsparse.guide(pipe, "1.0", stop=2):
        run(pipe, call)
        prefix = diffsparse.seam.hooks.run_of(pipe.transformer).guidance.prefix  # type: ignore[union-attr]
        assert not prefix._outputs
        assert not prefix._passed


def test_group_offloading_keeps_its_order() -> None:
    """Each group fetches the next one: a block that is passed over would leave the next without its weights."""
    model, kwargs, cpu = build(WAN), inputs(WAN), torch.device("cpu")
    with diffsparse.guide(model, "1.0"):
        want = tensors(model, kwargs)[0]
    try:
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    except AttributeError:
        pytest.skip("this Diffusers offloads from an accelerator only")
    with diffsparse.guide(model, "1.0") as handle:
        assert torch.equal(tensors(model, kwargs)[0], want)
        assert handle.report().whole == {"group offloading fetches blocks in a fixed order": 1}


def test_guiding_again_replaces() -> None:
    pipe, call = BUILDERS["wan"]()
    want = run(pipe, call)
    first = diffsparse.guide(pipe, "0.0")
    second = diffsparse.guide(pipe, "1.1")
    both = run(pipe, call)
    first.remove()
    assert torch.equal(run(pipe, call), both)
    assert "replaced by a later guide" in str(first.report())
    assert "replaced" not in str(second.report())
    second.remove()
    with diffsparse.guide(pipe, "1.1"):
        assert torch.equal(run(pipe, call), both)
    assert torch.equal(run(pipe, call), want)


def test_a_block_whose_guidance_was_replaced_says_so() -> None:
    model = build(WAN)
    with (
        pytest.warns(UserWarning, match="head guidance was replaced by a later guide within its block"),
        diffsparse.guide(model, "0.0"),
        diffsparse.guide(model, "1.1"),
    ):
        pass
    assert untouched(model)


def test_a_deep_copy_is_not_guided() -> None:
    model, kwargs = build(WAN), inputs(WAN)
    want = tensors(model, kwargs)[0]
    with diffsparse.guide(model, "1.0") as handle:
        twin = copy.deepcopy(model)
        torch.testing.assert_close(tensors(twin, kwargs)[0], want)
        assert not handle.report().passes
        assert not torch.allclose(tensors(model, kwargs)[0], want)
    assert torch.equal(tensors(model, kwargs)[0], want)


def test_a_failed_pass_leaves_nothing_behind() -> None:
    pipe, call = BUILDERS["wan"]()
    with diffsparse.guide(pipe, "1.0"):
        want = run(pipe, call)
    with diffsparse.guide(pipe, "1.0") as handle:
        ffn = pipe.transformer.blocks[1].ffn
        calls: list[int] = []

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 2:  # in the extra pass
                raise RuntimeError("broken on purpose")

        hook = ffn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            run(pipe, call)
        hook.remove()
        assert "forward" not in vars(pipe.transformer.blocks[0])
        assert torch.equal(run(pipe, call), want)
        assert handle.report().passes == 4


def test_output_classes_are_kept() -> None:
    model, kwargs = build(WAN), inputs(WAN)
    with torch.no_grad(), diffsparse.guide(model, "1.0"):
        as_tuple = model(**{**kwargs, "return_dict": False})
        as_class = model(**{**kwargs, "return_dict": True})
    assert isinstance(as_tuple, tuple)
    assert type(as_class).__name__ == "Transformer2DModelOutput"
    torch.testing.assert_close(as_class.sample, as_tuple[0])


def test_heads_of_cross_attention_are_told() -> None:
    """They could be named by module, and would do nothing in silence."""
    model, kwargs = build(WAN), inputs(WAN)
    with (
        diffsparse.guide(model, "blocks.1.attn2:0"),
        pytest.raises(ConfigError, match=r"blocks.1.attn2 was not perturbed: it is no self-attention"),
    ):
        tensors(model, kwargs)


def test_a_pass_that_comes_too_early_is_told() -> None:
    model, kwargs = build(WAN), inputs(WAN)
    early = pytest.warns(UserWarning, match="'uncond' ran ahead of the conditional one")
    with diffsparse.guide(model, "1.0"), early, model.cache_context("uncond"):
        tensors(model, kwargs)


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning")
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_compiled_equals_eager(regional: bool) -> None:
    torch._dynamo.reset()
    model, kwargs = build(WAN), inputs(WAN)
    with diffsparse.guide(model, "1.0"):
        want = tensors(model, kwargs)[0]
    with diffsparse.guide(model, "1.0") as handle:
        if regional:
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
        forward: Any = model if regional else torch.compile(model, backend="eager")
        with torch.no_grad():
            got = [forward(**kwargs)[0] for _ in range(2)]
        assert handle.report().perturbed
    for out in got:
        torch.testing.assert_close(out, want)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning")
def test_compiled_blocks_share_a_graph() -> None:
    """Hooks of its own on each block would give each a graph, and end at the compiler's limit of eight."""
    torch._dynamo.reset()
    model = d.WanTransformer3DModel(**{**CASES[WAN].config, "num_layers": 10}).eval()
    kwargs = inputs(WAN)
    with diffsparse.guide(model, "9.0"):
        want = tensors(model, kwargs)[0]
    with diffsparse.guide(model, "9.0") as handle:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(tensors(model, kwargs)[0], want)
        assert handle.report().whole == {"blocks are compiled": 1}
    torch._dynamo.reset()


# --- Modular Diffusers ----------------------------------------------------------------------------------------------


@pytest.fixture
def modular() -> Any:
    from diffusers.modular_pipelines import WanBlocks

    stock, _ = BUILDERS["wan"]()
    pipe = WanBlocks().init_pipeline()
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    pipe.update_components(**{name: getattr(stock, name) for name in parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_modular(pipe: Any, guider: Any) -> torch.Tensor:
    pipe.update_components(guider=guider)
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "max_sequence_length": 16}
    words = {"prompt": "dance", "negative_prompt": "bad"}
    generator = torch.Generator().manual_seed(0)
    out: torch.Tensor = pipe(**words, **size, generator=generator, output_type="pt", output="videos")
    return out


def test_the_guider(modular: Any) -> None:
    plain = d.ClassifierFreeGuidance(guidance_scale=5.0)
    want = run_modular(modular, plain)
    for knobs in ({"head_scale": 0.0}, {"head_strength": 0.0}, {"perturbed_guidance_stop": 0.0}):
        assert torch.equal(run_modular(modular, HeadGuidance(["1.0"], guidance_scale=5.0, **knobs)), want)
    got = run_modular(modular, HeadGuidance(["1.0"], guidance_scale=5.0, head_scale=2.0))
    assert not torch.allclose(got, want)
    with diffsparse.guide(modular, "1.0", head_scale=2.0):
        torch.testing.assert_close(run_modular(modular, plain), got)
    assert torch.equal(run_modular(modular, plain), want)
    assert untouched(modular.transformer)


def test_the_guider_beside_sparse_attention(modular: Any) -> None:
    guider = HeadGuidance(["1.0"], guidance_scale=5.0)
    dense = run_modular(modular, guider)
    with diffsparse.apply(modular, Random(0.5, block=8), schedule=Schedule(1)) as handle:
        sparse = run_modular(modular, guider)
        branches = {call.branch for call in handle.report().calls}
        assert branches == {"cond", "uncond", "cond+perturbed"}
        assert {call.step for call in handle.report().calls} == {0, 1, 2, 3}
    assert not torch.allclose(sparse, dense)
    assert torch.equal(run_modular(modular, guider), dense)


def test_the_guider_is_saved_and_loaded(tmp_path: Any) -> None:
    guider = HeadGuidance(["1.0", "0.*"], head_strength=0.5, kind="uniform")
    guider.save_pretrained(tmp_path)
    again = HeadGuidance.from_pretrained(tmp_path)
    assert again.preset == guider.preset
    with pytest.raises(ConfigError, match="strength wants"):
        HeadGuidance(["1.0"], head_strength=2.0)


def test_a_guider_that_an_earlier_release_has_saved(tmp_path: Any) -> None:
    """Two of its knobs have other names."""
    HeadGuidance(["1.0"], head_strength=0.5, head_scale=2.0).save_pretrained(tmp_path)
    (file,) = tmp_path.iterdir()
    first = file.read_text().replace('"head_strength"', '"strength"')
    file.write_text(first.replace('"head_scale"', '"perturbed_guidance_scale"'))
    again = HeadGuidance.from_pretrained(tmp_path)
    assert (again.preset.head_strength, again.preset.head_scale) == (0.5, 2.0)
    assert again.skip_layer_guidance_scale == 2.0
    assert again.config.head_scale == 2.0
    assert again.new(head_scale=1.0).preset.head_scale == 1.0


def test_the_guider_without_classifier_free_guidance() -> None:
    """Then the perturbed pass is the second of two."""
    model, kwargs = build(WAN), inputs(WAN)
    guider = HeadGuidance(["1.0"], guidance_scale=1.0, head_scale=2.0)
    c = tensors(model, kwargs)[0]
    with torch.no_grad(), diffsparse.guide(model, "1.0", head_scale=2.0):
        want = model(**kwargs)[0]
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(1))
    text = kwargs.pop("encoder_hidden_states")
    batches = guider.prepare_inputs({"encoder_hidden_states": (text, text)})
    for batch in batches:
        guider.prepare_models(model)
        with torch.no_grad():
            batch.noise_pred = model(**kwargs, encoder_hidden_states=batch.encoder_hidden_states)[0]
        guider.cleanup_models(model)
    assert len(batches) == 2
    assert torch.equal(batches[0].noise_pred, c)
    # Diffusers' formula without classifier-free guidance starts from the perturbed prediction
    torch.testing.assert_close(guider(batches).pred + (c - batches[1].noise_pred), want)
