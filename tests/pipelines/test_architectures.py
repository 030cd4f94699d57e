"""Published architectures: their size, their grid, and inputs that their classes take."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import Schedule
from diffsparse.errors import ConfigError, UnknownNameError
from diffsparse.insight.cost import flops
from diffsparse_pipelines import families
from diffsparse_pipelines.architectures import (
    ARCHITECTURES,
    Architecture,
    MinimalPipeline,
    architecture,
    heads_of,
    inputs,
)
from diffsparse_pipelines.families import FAMILIES
from diffsparse_pipelines.preflight import Compression, grid_tokens
from support import tiny_transformers

# billions of parameters and tokens on the grid at the family's default size; where a class's defaults are the released
# model's (MiniMax-H3, Flux 2 and 3, Qwen-Image 2.1, Z-Image, HunyuanImage and others), its own
PUBLISHED = {
    "wan2.1-1.3b": (1.42, 32_760),
    "wan2.1-14b": (14.29, 75_600),
    "wan2.2-a14b": (14.29, 75_600),
    "wan2.2-5b": (5.00, 27_280),
    "hunyuan-video": (12.82, 118_800),
    "cogvideox1.5-5b": (5.57, 11 * 4080),
    "ltx-video": (1.92, 21 * 15 * 22),
    "mochi": (10.03, 15 * 30 * 53),
    "flux": (11.90, 4096),
    "sd3.5": (8.06, 4096),
    "qwen-image": (20.43, 4096),
    "wan2.2-lightning": (14.29, 75_600),
    "fastwan2.2-5b": (5.00, 27_280),
    "skyreels-v2-df": (14.29, 25 * 34 * 60),
    "minimax-h3": (33.12, 37 * 24 * 42),
    "minimax-h3-turbo": (33.12, 37 * 24 * 42),
    "framepack": (12.87, 9 * 45 * 80),
    "ltx-condition": (1.92, 21 * 16 * 22),
    "ltx-distilled": (13.04, 21 * 16 * 24),
    "ltx2": (18.88, 16 * 16 * 24),
    "ltx2-distilled": (18.88, 16 * 16 * 24),
    "cosmos1-7b": (7.24, 16 * 44 * 80),
    "cosmos2-2b": (1.96, 24 * 44 * 80),
    "cosmos2-2b-image": (1.96, 48 * 85),
    "cosmos2.5-2b": (2.06, 24 * 44 * 80),
    "cosmos3-nano": (15.16, 48 * 23 * 40),
    "kandinsky6-pro-distilled": (48.19, 31 * 30 * 54),
    "flux-schnell": (11.89, 4096),
    "flux2": (32.22, 4096),
    "flux2-klein-4b": (3.88, 4096),
    "flux2-klein-9b-kv": (9.08, 4096),
    "flux3-klein": (5.54, 4096),
    "flux3-klein-base": (5.54, 4096),
    "qwen-image-edit": (20.43, 4096),
    "qwen-image-2.1": (7.12, 4096),
    "z-image-turbo": (6.15, 4096),
    "hunyuan-image": (17.41, 4096),
    "hunyuan-image-distilled": (17.41, 4096),
    "omnigen": (3.76, 4096),
    "bria-fibo2": (8.13, 4096),
    "prx": (1.17, 1024),
    "nucleus-moe": (22.67, 4096),
}


def skip_unknown(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"Diffusers {diffusers.__version__} has no {name}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_the_published_ones(name: str) -> None:
    skip_unknown(ARCHITECTURES[name].transformer)
    known, model = ARCHITECTURES[name], ARCHITECTURES[name].build(device="meta")
    billions, tokens = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    call = FAMILIES[name].defaults
    frames, _ = FAMILIES[name].windows(call.get("num_frames", 1))
    latent = known.compression.latent(frames, call["height"], call["width"])
    assert grid_tokens(model, latent) == tokens
    assert math.prod(families.grid(name, {})) == tokens
    assert heads_of(model) > 0
    assert 0 < flops(model, tokens, known.text).share < 1


# class -> what differs from the small model that other tests take
SMALL: dict[str, dict[str, Any]] = {
    "BriaFibo2Transformer2DModel": {},
    "CogVideoXTransformer3DModel": {"patch_size_t": 2, "patch_bias": False},
    "Cosmos3OmniTransformer": {"sound_gen": False, "action_gen": False},
    "CosmosTransformer3DModel": {"concat_padding_mask": False},
    "Flux2Transformer2DModel": {},
    "Flux3Transformer2DModel": {},
    "FluxTransformer2DModel": {"guidance_embeds": True, "pooled_projection_dim": 8},
    "HunyuanImageTransformer2DModel": {},
    "HunyuanVideoFramepackTransformer3DModel": {},
    "HunyuanVideoTransformer3DModel": {},
    "Kandinsky6Transformer3DModel": {},
    "LTX2VideoTransformer3DModel": {},
    "LTXVideoTransformer3DModel": {},
    "MiniMaxH3Transformer3DModel": {},
    "MochiTransformer3DModel": {},
    "NucleusMoEImageTransformer2DModel": {},
    "OmniGenTransformer2DModel": {},
    "PRXTransformer2DModel": {},
    "QwenImage21Transformer2DModel": {},
    "QwenImageTransformer2DModel": {},
    "SD3Transformer2DModel": {},
    "SkyReelsV2Transformer3DModel": {},
    "WanTransformer3DModel": {},
    "ZImageTransformer2DModel": {},
}


def small(name: str) -> Architecture:
    config = {**tiny_transformers.CASES[name].config, **SMALL[name]}
    return Architecture(name, config, Compression(4, 8), 6)


class Layouts:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int | None, Any]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Any) -> Tensor:
        self.seen.append((site.step, site.steps, site.layout))
        return site.dense(q, k, v)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_take_their_inputs_and_steps_may_be_skipped(name: str, dtype: torch.dtype) -> None:
    skip_unknown(name)
    model = small(name).build(dtype=dtype)
    size = (1 if "2D" in name else 7 if "H3" in name else 3, 8, 12)
    pipe, watch = MinimalPipeline(model, 20), Layouts()
    with diffsparse.apply(pipe, watch, schedule=Schedule(0), strict=True):
        for step in (3, 11):
            pipe.step(step, inputs(model, size, 6))
    assert {(step, steps) for step, steps, _ in watch.seen} == {(3, 20), (11, 20)}
    assert grid_tokens(model, size) in {layout.video for *_, layout in watch.seen}


def test_every_listed_class_has_inputs() -> None:
    assert {known.transformer for known in ARCHITECTURES.values()} == set(SMALL)


def test_layers_are_cut_by_kind_and_weights_are_the_same_each_time() -> None:
    known = replace(small("FluxTransformer2DModel"), config={**small("FluxTransformer2DModel").config, "num_layers": 3})
    model, again = (known.build(2) for _ in range(2))
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (2, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    state = torch.random.get_rng_state()
    known.build()
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_loading_keeps_in_float32_stays_so() -> None:
    model = small("WanTransformer3DModel").build(dtype=torch.bfloat16)
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_the_embedded_model_is_known_by_its_files() -> None:
    model = architecture("tiny-twin").build(device="meta")
    assert grid_tokens(model, architecture("tiny-twin").compression.latent(9, 32, 32)) == 576


def test_unknown_and_impossible() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean wan2\.1-14b"):
        architecture("wan2.1-15b")
    with pytest.raises(ConfigError, match="wanted an even height and width"):
        inputs(small("FluxTransformer2DModel").build(), (1, 7, 8), 6)
