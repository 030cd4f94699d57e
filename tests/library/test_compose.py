"""Beside other features of Diffusers: caches, offloading, LoRA, fused projections, backends, gradients, copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import attention_backend

import diffsparse
from diffsparse import AdaSpa, Dense, Random, Schedule
from diffsparse.errors import ConfigError, DenseFallbackError
from support.spy import Spy
from support.tiny_pipelines import BUILDERS, run
from support.tiny_transformers import build, inputs, tensors

ALWAYS = Schedule(dense_first=0)
WAN = "WanTransformer3DModel"


def wan() -> tuple[Any, dict[str, Any], torch.Tensor]:
    model, kwargs = build(WAN), inputs(WAN)
    return model, kwargs, tensors(model, kwargs)[0]


CACHES = {
    "first-block": lambda: d.FirstBlockCacheConfig(threshold=0.3),
    "taylor": lambda: d.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    "pyramid": lambda: d.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 900)
    ),
}


def with_timestep(pipe: Any, config: Any) -> Any:
    if hasattr(config, "current_timestep_callback"):
        config.current_timestep_callback = lambda: pipe._current_timestep
    return config


@pytest.mark.parametrize("order", ["cache first", "diffsparse first"])
@pytest.mark.parametrize("kind", CACHES)
def test_step_caches(kind: str, order: str) -> None:
    """A cache skips work; what it does not skip is computed as without us."""
    pipe, call = BUILDERS["wan"]()
    pipe.transformer.enable_cache(with_timestep(pipe, CACHES[kind]()))
    want = run(pipe, call, num_inference_steps=6)
    pipe.transformer.disable_cache()
    if order == "cache first":
        pipe.transformer.enable_cache(with_timestep(pipe, CACHES[kind]()))
    handle = diffsparse.apply(pipe, Dense(), schedule=ALWAYS)
    if order != "cache first":
        pipe.transformer.enable_cache(with_timestep(pipe, CACHES[kind]()))
    assert torch.equal(run(pipe, call, num_inference_steps=6), want)
    assert handle.report().dense_calls
    handle.remove()
    assert torch.equal(run(pipe, call, num_inference_steps=6), want)


def test_steps_that_a_cache_skips_are_not_counted() -> None:
    pipe, call = BUILDERS["wan"]()
    pipe.transformer.enable_cache(d.FirstBlockCacheConfig(threshold=1e9))  # after the first step only block 0 runs
    spy = Spy()
    with diffsparse.apply(pipe, spy, schedule=ALWAYS):
        run(pipe, call, num_inference_steps=4)
    assert [s.step for s in spy.seen if s.branch == "cond" and s.layer == "blocks.0.attn1"] == [0, 1, 2, 3]
    assert {s.step for s in spy.seen if s.layer == "blocks.1.attn1"} == {0}


def test_sparse_runs_beside_a_cache() -> None:
    pipe, call = BUILDERS["wan"]()
    pipe.transformer.enable_cache(d.FirstBlockCacheConfig(threshold=0.05))
    with diffsparse.apply(pipe, AdaSpa(block=8), schedule=Schedule(dense_first=1)) as handle:
        out = run(pipe, call, num_inference_steps=6)
    assert out.isfinite().all()
    assert handle.report().sparse_calls


def offload(model: torch.nn.Module) -> None:
    cpu = torch.device("cpu")
    try:
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    except AttributeError:
        pytest.skip("this Diffusers offloads from an accelerator only")


@pytest.mark.parametrize("when", ["before", "after"])
def test_group_offloading(when: str) -> None:
    model, kwargs, want = wan()
    if when == "before":
        offload(model)
    handle = diffsparse.apply(model, Dense(), schedule=ALWAYS)
    if when == "after":
        offload(model)
    assert torch.equal(tensors(model, kwargs)[0], want)
    assert handle.report().dense_calls
    handle.remove()
    assert torch.equal(tensors(model, kwargs)[0], want)


def test_layerwise_casting() -> None:
    model, kwargs = build(WAN), inputs(WAN)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    want = tensors(model, kwargs)[0]
    with diffsparse.apply(model, Dense(), schedule=ALWAYS):
        assert torch.equal(tensors(model, kwargs)[0], want)


def test_lora_added_while_applied() -> None:
    peft = pytest.importorskip("peft")
    model, kwargs, want = wan()
    handle = diffsparse.apply(model, Dense(), schedule=ALWAYS)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    changed = tensors(model, kwargs)[0]
    assert not torch.equal(changed, want)
    handle.remove()
    assert torch.equal(tensors(model, kwargs)[0], changed)


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_projections(when: str) -> None:
    pipe, call = BUILDERS["flux"]()
    twin, _ = BUILDERS["flux"]()
    twin.transformer.fuse_qkv_projections()
    want = run(twin, call)
    if when == "before":
        pipe.transformer.fuse_qkv_projections()
    handle = diffsparse.apply(pipe, Dense(), schedule=ALWAYS)
    if when == "after":
        pipe.transformer.fuse_qkv_projections()
    assert torch.equal(run(pipe, call), want)
    assert handle.report().dense_calls
    handle.remove()
    assert torch.equal(run(pipe, call), want)


def test_processors_that_are_replaced_are_adopted_anew() -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    model, kwargs, want = wan()
    spy = Spy()
    handle = diffsparse.apply(model, spy, schedule=ALWAYS)
    new = WanAttnProcessor()
    model.set_attn_processor(new)
    assert torch.equal(tensors(model, kwargs)[0], want)
    assert spy.seen
    handle.remove()
    assert all(p is new for p in model.attn_processors.values())
    assert type(new) is WanAttnProcessor


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_backend_of_the_user_runs_dense_calls_and_comes_back(when: str) -> None:
    model, kwargs, _ = wan()
    model.set_attention_backend("_native_math")
    want = tensors(model, kwargs)[0]
    processors = list(model.attn_processors.values())
    state = [dict(vars(p)) for p in processors]
    if when == "after":
        model.reset_attention_backend()
    handle = diffsparse.apply(model, Dense(), schedule=ALWAYS)
    if when == "after":
        model.set_attention_backend("_native_math")
    assert torch.equal(tensors(model, kwargs)[0], want)
    assert set(handle.report().backends) == {"_native_math"}
    handle.remove()
    assert [dict(vars(p)) for p in processors] == state
    assert torch.equal(tensors(model, kwargs)[0], want)


def test_a_backend_for_a_while() -> None:
    model, kwargs, _ = wan()
    with diffsparse.apply(model, Dense(), schedule=ALWAYS) as handle:
        with attention_backend("_native_math"):
            tensors(model, kwargs)
        assert "_native_math" in handle.report().backends


def test_gradients_run_dense_and_are_the_same() -> None:
    model, kwargs = build(WAN), inputs(WAN)
    model.enable_gradient_checkpointing()
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**kwargs, return_dict=False)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients()
    with diffsparse.apply(model, AdaSpa(block=8), schedule=ALWAYS) as handle:
        got = gradients()
        report = handle.report()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert report.fallbacks
    assert set(report.fallbacks) == {"gradients are wanted"}


def test_strict_refuses_what_would_run_dense() -> None:
    model, kwargs, _ = wan()
    with (
        diffsparse.apply(model, AdaSpa(block=8), schedule=ALWAYS, strict=True),
        pytest.raises(DenseFallbackError, match=r"layer 'blocks.0.attn1' at step 0 would run dense \(gradients"),
    ):
        model(**{**kwargs, "hidden_states": kwargs["hidden_states"].requires_grad_()})


def test_a_failed_call_leaves_nothing_behind() -> None:
    """After an exception in the middle of a forward pass the next call is a fresh one."""
    model, kwargs, want = wan()

    class Fails:
        broken = True

        def attend(self, q: Any, k: Any, v: Any, site: Any) -> Any:
            if self.broken and site.index > 0:
                raise RuntimeError("broken on purpose")
            return site.dense(q, k, v)

    strategy = Fails()
    with diffsparse.apply(model, strategy, schedule=ALWAYS):
        with pytest.raises(RuntimeError, match="on purpose"):
            tensors(model, kwargs)
        strategy.broken = False
        assert torch.equal(tensors(model, kwargs)[0], want)
    assert torch.equal(tensors(model, kwargs)[0], want)


def test_applying_again_replaces() -> None:
    model, kwargs, want = wan()
    first = diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS)
    second = diffsparse.apply(model, Dense(), schedule=ALWAYS)
    assert torch.equal(tensors(model, kwargs)[0], want)
    first.remove()  # of no effect: it was replaced
    assert torch.equal(tensors(model, kwargs)[0], want)
    assert second.report().dense_calls
    diffsparse.remove(model)
    diffsparse.remove(model)
    assert not [m for m in model.modules() if "_diffsparse" in vars(m)]


def test_a_deep_copy_runs_dense_and_leaves_the_original_alone() -> None:
    model, kwargs, want = wan()
    with diffsparse.apply(model, Random(0.5, block=8), schedule=ALWAYS) as handle:
        twin = copy.deepcopy(model)
        torch.testing.assert_close(tensors(twin, kwargs)[0], want)  # other memory, other alignment
        assert not handle.report().steps
        assert not torch.equal(tensors(model, kwargs)[0], want)
    assert torch.equal(tensors(model, kwargs)[0], want)


def test_saving_while_applied(tmp_path: Path) -> None:
    model, kwargs, want = wan()
    with diffsparse.apply(model, AdaSpa(block=8)):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(tensors(again, kwargs)[0], want)


def test_half_precision_and_another_dtype_on_the_way() -> None:
    model, kwargs, _ = wan()
    with diffsparse.apply(model, AdaSpa(block=8), schedule=Schedule(dense_first=1)) as handle:
        model.to(torch.bfloat16)
        half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in kwargs.items()}
        outs = [tensors(model, half)[0] for _ in range(3)]
        assert handle.report().sparse_calls
    assert all(o.dtype == torch.bfloat16 and o.isfinite().all() for o in outs)


def masked_inputs(name: str, valid: int) -> dict[str, Any]:
    kwargs = inputs(name)
    for key in ("encoder_attention_mask", "encoder_hidden_states_mask"):
        if key in kwargs:
            kwargs[key] = kwargs[key].clone()
            kwargs[key][:, valid:] = 0
    return kwargs


@pytest.mark.parametrize(
    "name", ["HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel", "QwenImageTransformer2DModel"]
)
def test_padded_text_is_masked(name: str) -> None:
    """With all blocks kept, sparse attention honours the mask just as dense attention does."""
    model, kwargs = build(name), masked_inputs(name, 4)
    want = tensors(model, kwargs)[0]
    unmasked = tensors(model, inputs(name))[0]
    assert (want - unmasked).abs().max() > 1e-4, "the mask matters"

    class All:
        def attend(self, q: Any, k: Any, v: Any, site: Any) -> Any:
            import diffsparse_kernels as dk

            n = q.shape[2]
            edge = -(-n // 8)
            mask = torch.ones(1, q.shape[1], edge, edge, dtype=torch.bool)
            lists = dk.BlockLists.from_mask(mask, q_block=8, kv_block=8, q_len=n, kv_len=n)
            out, _ = dk.block_sparse_attention(q, k, v, lists, scale=site.scale, key_mask=site.key_mask)
            site.record.ran_sparse(lists.density(), "cpu")
            return out

    with diffsparse.apply(model, All(), schedule=ALWAYS) as handle:
        got = tensors(model, kwargs)[0]
        assert handle.report().sparse_calls
        assert not handle.report().fallbacks
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "CogVideoXTransformer3DModel", "SD3Transformer2DModel"])
def test_odd_sizes(name: str) -> None:
    from support.tiny_transformers import Shape

    model, kwargs = build(name), inputs(name, Shape(3, 10, 14, 7))
    if name == "CogVideoXTransformer3DModel":
        model.config.sample_height, model.config.sample_width = 10, 14
    with diffsparse.apply(model, AdaSpa(block=16, sparsity=0.5), schedule=Schedule(dense_first=1)) as handle:
        outs = [tensors(model, kwargs)[0] for _ in range(3)]
        assert handle.report().sparse_calls
    assert all(o.isfinite().all() for o in outs)


@pytest.mark.parametrize("bad", [AdaSpa, "adaspa", object(), None], ids=["class", "name", "object", "none"])
def test_what_is_no_strategy(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"method attend\(q, k, v, site\)"):
        diffsparse.apply(build(WAN), bad)
