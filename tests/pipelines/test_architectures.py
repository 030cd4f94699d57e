"""Published architectures: their size, their grid, and inputs that their classes take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import diffsparse
from diffsparse import Schedule
from diffsparse.errors import ConfigError, UnknownNameError
from diffsparse_pipelines.architectures import ARCHITECTURES, Architecture, MinimalPipeline, architecture, inputs
from diffsparse_pipelines.families import FAMILIES
from diffsparse_pipelines.preflight import Compression, grid_tokens
from support import tiny_transformers

# billions of parameters, as the authors give them, and tokens on the grid at the family's default size
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
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_the_published_ones(name: str) -> None:
    known, model = ARCHITECTURES[name], ARCHITECTURES[name].build(device="meta")
    billions, tokens = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    call = FAMILIES[name].defaults
    latent = known.compression.latent(call.get("num_frames", 1), call["height"], call["width"])
    assert grid_tokens(model, latent) == tokens


SMALL = {
    "CogVideoXTransformer3DModel": {"patch_size_t": 2, "patch_bias": False},
    "FluxTransformer2DModel": {"guidance_embeds": True, "pooled_projection_dim": 8},
    "HunyuanVideoTransformer3DModel": {},
    "LTXVideoTransformer3DModel": {},
    "MochiTransformer3DModel": {},
    "QwenImageTransformer2DModel": {},
    "SD3Transformer2DModel": {},
    "WanTransformer3DModel": {},
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
    model = small(name).build(dtype=dtype)
    size = (1 if "2D" in name else 3, 8, 12)
    pipe, watch = MinimalPipeline(model, 20), Layouts()
    with diffsparse.apply(pipe, watch, schedule=Schedule(0), strict=True):
        for step in (3, 11):
            pipe.step(step, inputs(model, size, 6))
    assert {(step, steps) for step, steps, _ in watch.seen} == {(3, 20), (11, 20)}
    layouts = {layout for *_, layout in watch.seen if layout.has_text or name.startswith(("Wan", "LTX"))}
    assert {layout.video for layout in layouts} == {grid_tokens(model, size)}


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
    with pytest.raises(UnknownNameError, match=r"known: wan2\.1-14b"):
        architecture("wan2.1-15b")
    with pytest.raises(ConfigError, match="wanted an even height and width"):
        inputs(small("FluxTransformer2DModel").build(), (1, 7, 8), 6)
