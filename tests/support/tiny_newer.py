"""Families whose sequence is packed, conditioned or remembered in a way of its own, and their modes.

Makers of inputs take the modes as arguments, for tests of these families; a `Case` is the plainest use of a class.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.tiny_pieces import (
    LATENT,
    Case,
    Inputs,
    Shape,
    all_words,
    grid_ids,
    image,
    n,
    now,
    packed,
    soon,
    video,
    video2,
    words,
)

TEXT, SOUND = 1, 2  # tags of MiniMax H3's tokens; 0 is video
REFERENCE = (2, 4)  # rows and columns of a reference image's tokens: no grid of a `Shape` has them


@dataclass(frozen=True)
class Mode:
    """Another use of a class than its case's.

    config: changes to that of the case.
    prepare: what its pipeline does with the model.
    """

    name: str
    inputs: Callable[[Shape], Inputs]
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = lambda model: None


def tokens(s: Shape) -> int:
    """Tokens of a video in patches of 1 x 2 x 2."""
    return s.frames * s.height // 2 * (s.width // 2)


# --- MiniMax H3: [text | conditions | audio | video] --------------------------------------------------------------

H3: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "hidden_size": 24,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "ffn_dim": 16,
    "in_channels": 4,
    "audio_in_channels": 6,
    "text_dim": 16,
    "freq_dim": 16,
    "time_embed_hidden_dim": 16,
    "time_embed_dim": 8,
    "rope_freq_dim": 2,
}


def h3_inputs(s: Shape, conditions: int = 1, audio: int = 8) -> Inputs:
    """`conditions` key frames (the first, the last) and `audio` tokens of a soundtrack of two channels."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    text = torch.full((s.text,), TEXT)
    sizes = (s.frames, s.height, s.width, audio // 2, (1, 2, 2), 2, SOUND, 0)
    places, tags, videos, sounds, texts, held, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        text, *sizes, keyframe_anchors=("first", "last")[:conditions]
    )
    levels = torch.zeros(len(tags), dtype=torch.int64)  # one timestep for what is made, one for what is given
    levels[videos[:held]] = 1
    return {
        "hidden_states": n(1, len(videos), 16),
        "audio_hidden_states": n(1, len(sounds), 6),
        "encoder_hidden_states": words(s),
        "timestep": torch.tensor([0.5, 0.999]),
        "timestep_indices": levels,
        "token_tags": tags,
        "position_ids": places,
        "video_indices": videos,
        "audio_indices": sounds,
        "text_indices": texts,
    }


# --- Flux 3: [text | image | reference] ---------------------------------------------------------------------------

FLUX3: dict[str, Any] = {
    "in_channels": 16,
    "cond_in_channels": 12,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "timestep_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}


def flux3_inputs(s: Shape, reference: tuple[int, int] | None = None) -> Inputs:
    """Packed tokens; `reference`: rows and columns of tokens of a reference image."""
    given: Inputs = {}
    if reference is not None:
        rows, columns = reference
        places = grid_ids(Shape(1, 2 * rows, 2 * columns), 4) / 2
        places[:, 3] = -1  # the references count down along the axis of the text
        given = {"image_cond_hidden_states": n(1, rows * columns, 12), "image_cond_ids": places}
    text = torch.zeros(s.text, 4)
    text[:, 3] = torch.arange(s.text)
    return {
        "hidden_states": packed(s, 16),
        "encoder_hidden_states": words(s),
        "timestep": soon(),
        "img_ids": grid_ids(s, 4) / 2,
        "txt_ids": text,
        **given,
    }


# --- Flux 2 with a cache of its references' keys: [text | references | image] ----------------------------------------


def klein_inputs(s: Shape, mode: str | None = "extract") -> Inputs:
    """A reference image ahead of the image; "cached": its keys alone, of a model with one layer of each kind."""
    rows, columns = REFERENCE
    reference = grid_ids(Shape(1, 2 * rows, 2 * columns), 4) + torch.tensor([10.0, 0, 0, 0])
    ids, hidden, given = grid_ids(s, 4), packed(s, 16), rows * columns
    inputs: Inputs = {
        "hidden_states": hidden,
        "encoder_hidden_states": words(s),
        "timestep": soon(),
        "img_ids": ids[None],
        "txt_ids": torch.zeros(1, s.text, 4),
        "guidance": torch.ones(1),
    }
    if mode == "cached":
        return {**inputs, "kv_cache": _klein_cache(given), "kv_cache_mode": mode}
    inputs |= {"hidden_states": torch.cat([n(1, given, 16), hidden], 1), "img_ids": torch.cat([reference, ids])[None]}
    return inputs if mode is None else {**inputs, "kv_cache_mode": mode, "num_ref_tokens": given}


def klein_processors(model: Any) -> None:
    """What the pipeline with the cache sets."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())


def _klein_cache(given: int) -> object:
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    cache = Flux2KVCache(1, 1)
    cache.num_ref_tokens = given
    for layer in (cache.get_double(0), cache.get_single(0)):
        layer.store(n(1, given, 2, 16), n(1, given, 2, 16))
    return cache


# --- Qwen Image 2.1: [text | conditions among the text | image], text causal -----------------------------------------

QWEN21: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": 24,
    "axes_dims_rope": (8, 4, 4),
}


def qwen21_inputs(s: Shape, conditions: int = 0, mode: str | None = None, padding: int = 0) -> Inputs:
    """`conditions` images after the first word, each of `REFERENCE`; `padding`: words at the end that are none.

    mode: "extract" writes keys and values of all but the image, "cached" reads them.
    """
    given = conditions * math.prod(REFERENCE)
    slots = torch.zeros(1, s.text + given // 4, dtype=torch.bool)
    slots[:, 1 : 1 + given // 4] = True
    known = torch.ones_like(slots)
    known[:, slots.shape[1] - padding :] = False
    cells = s.height // 2 * (s.width // 2)
    cache = {"kv_cache": _qwen21_cache(s.text + given, mode), "kv_cache_mode": mode} if mode else {}
    return {
        "hidden_states": n(1, given + cells, 16),
        "encoder_hidden_states": n(1, slots.shape[1], 24),
        "encoder_hidden_states_mask": known,
        "timestep": soon(),
        "img_shapes": [[*[(1, *REFERENCE)] * conditions, (1, s.height // 2, s.width // 2)]],
        "img_mask": torch.cat([slots, torch.ones(1, cells // 4, dtype=torch.bool)], 1),
        **cache,
    }


def _qwen21_cache(prefix: int, mode: str) -> object:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(2)
    for layer in cache.layer_caches if mode == "cached" else ():
        layer.store(n(1, prefix, 2, 16), n(1, prefix, 2, 16))
    return cache


# --- Wan Animate 2: the driving video is read once, then each frame sees its own frame of it ------------------------

ANIMATE2: dict[str, Any] = {
    "text_len": 16,
    "in_dim": 12,
    "dim": 24,
    "ffn_dim": 32,
    "freq_dim": 32,
    "text_dim": 16,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 2,
    "use_img_emb": False,
}


def animate2_inputs(s: Shape, mode: str = "cached") -> Inputs:
    """mode: "extract" reads the driving video, "cached" denoises beside its keys; it has a frame less."""
    _dont_compile_masks()
    grid = (s.frames, s.height // 2, s.width // 2)
    reference = torch.tensor([[s.frames - 1, *grid[1:]]])
    sizes = {
        "extract": {"offset_grid_sizes": reference},
        "cached": {
            "reference_grid_sizes": reference,
            "origin_len": 4 * (s.frames - 2),
            "origin_area": [8 * s.height, 8 * s.width],
        },
    }[mode]
    return {
        "hidden_states": [n(4, s.frames, s.height, s.width)],
        "timestep": now(),
        "encoder_hidden_states": [n(s.text, 16)],
        "condition_latents": [n(8, s.frames, s.height, s.width)],
        "kv_cache": _animate2_cache(math.prod(reference[0].tolist()), mode),
        "kv_cache_mode": mode,
        "seq_len": math.prod(grid),
        **sizes,
    }


def _dont_compile_masks() -> None:
    """The model compiles the making of its mask, which takes longer than all tests of the class."""
    from diffusers.models.transformers import transformer_wan_animate_2
    from torch.nn.attention.flex_attention import create_block_mask

    def plain(mask_mod: Any, *sizes: Any, _compile: bool, **named: Any) -> Any:
        return create_block_mask(mask_mod, *sizes, **named)

    transformer_wan_animate_2.create_block_mask = plain


def _animate2_cache(reference: int, mode: str) -> object:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches if mode == "cached" else ():
        layer.store(n(1, reference, 2, 12), n(1, reference, 2, 12))
    return cache


# --- Cosmos 3: words see words before them, the rest sees all: [text] and [video | action | sound] -------------------

COSMOS3: dict[str, Any] = {
    "head_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 32,
    "latent_channel": 4,
    "patch_latent_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rope_axes_dim": (2, 1, 1),
    "vocab_size": 32,
    "sound_gen": True,
    "sound_dim": 5,
    "action_gen": True,
    "action_dim": 7,
    "num_embodiment_domains": 2,
}


def cosmos3_inputs(s: Shape, conditions: int = 0, action: int = 0, sound: int = 0) -> Inputs:
    """`conditions` frames are given; `action` and `sound` tokens follow the video."""
    grid, count = (s.frames, s.height // 2, s.width // 2), tokens(s)
    made = torch.arange(conditions, s.frames)
    first, cells = s.text + conditions * math.prod(grid[1:]), len(made) * math.prod(grid[1:])
    total = s.text + count + action + sound
    return {
        "input_ids": torch.arange(s.text) + 3,
        "text_indexes": torch.arange(s.text),
        "position_ids": _cosmos3_places(s.text, grid, action + sound),
        "und_len": s.text,
        "sequence_length": total,
        "vision_tokens": [video(s)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": torch.arange(s.text, s.text + count),
        "vision_mse_loss_indexes": torch.arange(first, first + cells),
        "vision_timesteps": torch.full((cells,), 500.0),
        "vision_noisy_frame_indexes": [made],
        **_cosmos3_line("action", [n(action, 7)], s.text + count, action),
        **_cosmos3_line("sound", [n(5, sound)], total - sound, sound),
        **({"action_domain_ids": [torch.tensor(1)]} if action else {}),
    }


def _cosmos3_places(text: int, grid: tuple[int, int, int], others: int) -> Tensor:
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).T + torch.tensor([[100], [0], [0]])
    line = torch.arange(others) + 100
    return torch.cat([torch.arange(text).expand(3, -1), places, torch.stack([line, 0 * line, 0 * line])], 1)


def _cosmos3_line(name: str, latents: list[Tensor], start: int, count: int) -> Inputs:
    if not count:
        return {}
    where = torch.arange(start, start + count)
    return {
        f"{name}_tokens": latents,
        f"{name}_token_shapes": [(count, 1, 1)],
        f"{name}_sequence_indexes": where,
        f"{name}_mse_loss_indexes": where,
        f"{name}_timesteps": torch.full((count,), 500.0),
        f"{name}_noisy_frame_indexes": [torch.arange(count)],
    }


# --- Cosmos 1, 2 and 2.5 --------------------------------------------------------------------------------------------

COSMOS: dict[str, Any] = {
    **LATENT,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "mlp_ratio": 1.0,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 24),
}
COSMOS25: dict[str, Any] = {
    "extra_pos_embed_type": None,
    "text_embed_dim": 48,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 16,
    "encoder_hidden_states_channels": 48,
    "img_context_dim_in": 12,
    "img_context_num_tokens": 5,
    "img_context_dim_out": 48,
}


def cosmos_inputs(s: Shape, pictures: bool = False) -> Inputs:
    """`pictures`: what 2.5 is given beside the text; its frames have timesteps of their own."""
    do_without_torchvision("transformers.transformer_cosmos")
    padding = torch.zeros(1, 1, s.height, s.width)
    inputs: Inputs = {"hidden_states": video(s), "timestep": now(), "encoder_hidden_states": words(s)}
    inputs |= {"fps": 16, "padding_mask": padding}
    if not pictures:
        return inputs
    times = torch.full((1, 1, s.frames, 1, 1), 500.0)
    return {**inputs, "timestep": times, "encoder_hidden_states": (words(s), n(1, 5, 12)), "attention_mask": None}


def do_without_torchvision(module: str) -> None:
    """Cosmos resizes its padding mask with torchvision, which the tests have not."""
    home = importlib.import_module(f"diffusers.models.{module}")
    resize = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size))
    if not hasattr(home, "transforms"):
        vars(home)["transforms"] = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST=None))


# --- Kandinsky 5 and 6: [B, F, H, W, C] -----------------------------------------------------------------------------

KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 16,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 8),
}


def kandinsky5_inputs(s: Shape) -> Inputs:
    return {
        "hidden_states": n(1, s.frames, s.height, s.width, 4),
        "encoder_hidden_states": words(s),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": n(1, 8),
        "visual_rope_pos": [torch.arange(size) for size in (s.frames, s.height // 2, s.width // 2)],
        "text_rope_pos": torch.arange(s.text),
    }


def kandinsky6_inputs(s: Shape, audio: int = 10) -> Inputs:
    """With `audio` tokens of a soundtrack; the channels are latents, given latents and their mask."""
    return {
        "hidden_states": n(1, s.frames, s.height, s.width, 9),
        "encoder_hidden_states": words(s),
        "pooled_projections": n(1, 8),
        "timestep": torch.tensor([500.0]),
        **({"audio_hidden_states": n(1, audio, 5)} if audio else {}),
    }


# --- images ---------------------------------------------------------------------------------------------------------

HUNYUAN_IMAGE: dict[str, Any] = {
    **LATENT,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 4),
}
OMNIGEN: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "num_layers": 2,
    "pad_token_id": 0,
    "vocab_size": 32,
    "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    "pos_embed_max_size": 16,
    "time_step_dim": 16,
}
FIBO2: dict[str, Any] = {
    "in_channels": 4,
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 16,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 4,
    "max_num_gist_tokens": 8,
    "gist_step": 4,
    "gist_min_text_len": 4,
    "gist_max_text_len": 16,
    "axes_dims": (8, 12, 12),
    "axes_lens": (32, 32, 32),
}
JOY_PLUS: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "mlp_width_ratio": 1.0,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


def hunyuan_image_inputs(s: Shape) -> Inputs:
    return {
        "hidden_states": image(s),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": words(s),
        "encoder_attention_mask": all_words(s),
    }


def omnigen_inputs(s: Shape, reference: tuple[int, int] | None = None) -> Inputs:
    """[words, with a reference image among them | the time | image]: causal, but all see the images' own tokens."""
    rows, columns = reference or (0, 0)
    given, cells = rows * columns, s.height // 2 * (s.width // 2)
    before = s.text + given + 1
    mask = torch.ones(1, before + cells, before + cells).tril()
    mask[:, before:] = 1
    mask[:, 1 : 1 + given, 1 : 1 + given] = 1
    return {
        "hidden_states": image(s),
        "timestep": soon(),
        "input_ids": torch.arange(s.text + given)[None] % 32,
        "input_img_latents": [n(1, 4, 2 * rows, 2 * columns)] if given else [],
        "input_image_sizes": {0: [[1, 1 + given]]} if given else {},
        "attention_mask": mask,
        "position_ids": torch.arange(before + cells)[None],
    }


def fibo2_inputs(s: Shape, reference: tuple[int, int] | None = None) -> Inputs:
    """[tokens made of the text | image | reference]; how many the first are depends on the length of the text."""
    rows, columns = reference or (0, 0)
    return {
        "hidden_states": image(s),
        "timestep": soon(),
        "encoder_hidden_states": n(1, 2, s.text, 16),
        "context_latents": [n(1, 4, 2 * rows, 2 * columns)] if reference else None,
    }


def joy_plus_inputs(s: Shape, reference: tuple[int, int] | None = REFERENCE) -> Inputs:
    """[image | reference | text], in patches."""
    sizes = [(1, s.height // 2, s.width // 2), *([(1, *reference)] if reference else [])]
    return {
        "hidden_states": n(1, sum(map(math.prod, sizes)), 4, 1, 2, 2),
        "timestep": soon(),
        "encoder_hidden_states": words(s),
        "encoder_hidden_states_mask": torch.ones(1, s.text),
        "shape_list": [sizes],
    }


# --- controlnets of transformer blocks -----------------------------------------------------------------------------


def _control(s: Shape, latents: torch.Tensor) -> Inputs:
    return {"hidden_states": latents, "controlnet_cond": torch.randn_like(latents), "encoder_hidden_states": words(s)}


def _cosmos_control(s: Shape) -> Inputs:
    do_without_torchvision("controlnets.controlnet_cosmos")
    return {
        "controls_latents": video(s),
        "latents": video(s),
        "timestep": now(),
        "encoder_hidden_states": words(s),
        "condition_mask": torch.ones(1, 1, s.frames, s.height, s.width),
        "padding_mask": torch.zeros(1, 1, s.height, s.width),
    }


CASES: dict[str, Case] = {
    "MiniMaxH3Transformer3DModel": Case(H3, h3_inputs),
    "Flux3Transformer2DModel": Case(FLUX3, flux3_inputs),
    "QwenImage21Transformer2DModel": Case(QWEN21, qwen21_inputs),
    "WanAnimate2Transformer3DModel": Case(ANIMATE2, animate2_inputs),
    "Cosmos3OmniTransformer": Case(COSMOS3, cosmos3_inputs, text="input_ids"),
    "CosmosTransformer3DModel": Case(COSMOS, cosmos_inputs, video2),
    "Kandinsky5Transformer3DModel": Case(KANDINSKY, kandinsky5_inputs, video2),
    "Kandinsky6Transformer3DModel": Case(
        {**KANDINSKY, "in_audio_dim": 5, "out_audio_dim": 5}, kandinsky6_inputs, video2
    ),
    "HunyuanImageTransformer2DModel": Case(
        {**HUNYUAN_IMAGE, "patch_size": (1, 1)}, hunyuan_image_inputs, lambda s: (1, s.height, s.width, 0, s.text)
    ),
    "OmniGenTransformer2DModel": Case(
        OMNIGEN, omnigen_inputs, lambda s: (1, s.height // 2, s.width // 2, s.text + 1, 0), text="input_ids"
    ),
    "BriaFibo2Transformer2DModel": Case(FIBO2, fibo2_inputs),
    "JoyImageEditPlusTransformer3DModel": Case(JOY_PLUS, joy_plus_inputs),
    "DreamLiteTransformer2DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "qk_norm": "rms_norm",
            "in_channels": 4,
            "num_layers": 2,
            "norm_num_groups": 2,
            "cross_attention_dim": 16,
        },
        lambda s: {"hidden_states": image(s), "encoder_hidden_states": words(s)},
        lambda s: (1, s.height, s.width, 0, 0),
    ),
    "CosmosControlNetModel": Case(
        {
            "n_controlnet_blocks": 1,
            "in_channels": 6,
            "latent_channels": 6,
            "model_channels": 48,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "mlp_ratio": 1.0,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
        },
        _cosmos_control,
    ),
    "FluxControlNetModel": Case(
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "axes_dims_rope": [4, 4, 8],
        },
        lambda s: {
            **_control(s, packed(s, 16)),
            "pooled_projections": n(1, 8),
            "timestep": soon(),
            "img_ids": grid_ids(s),
            "txt_ids": torch.zeros(s.text, 3),
        },
    ),
    "QwenImageControlNetModel": Case(
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda s: {
            **_control(s, packed(s, 16)),
            "encoder_hidden_states_mask": torch.ones(1, s.text, dtype=torch.int64),
            "timestep": soon(),
            "img_shapes": [(1, s.height // 2, s.width // 2)],
        },
    ),
    "SD3ControlNetModel": Case(
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 24,
        },
        lambda s: {**_control(s, image(s)), "pooled_projections": n(1, 8), "timestep": now()},
    ),
}

_H3, _FLUX3, _QWEN21 = "MiniMaxH3Transformer3DModel", "Flux3Transformer2DModel", "QwenImage21Transformer2DModel"
_ANIMATE2, _COSMOS3, _COSMOS = "WanAnimate2Transformer3DModel", "Cosmos3OmniTransformer", "CosmosTransformer3DModel"
_KLEIN, _JOY, _FIBO2 = (
    "Flux2Transformer2DModel",
    "JoyImageEditPlusTransformer3DModel",
    "BriaFibo2Transformer2DModel",
)
_HUNYUAN_IMAGE = "HunyuanImageTransformer2DModel"

MODES: dict[str, Mode] = {
    "MiniMax H3, text alone": Mode(_H3, lambda s: h3_inputs(s, 0, 0)),
    "MiniMax H3, a key frame without sound": Mode(_H3, lambda s: h3_inputs(s, 1, 0)),
    "MiniMax H3, two key frames": Mode(_H3, lambda s: h3_inputs(s, 2, 4)),
    "Flux 3 with a reference": Mode(_FLUX3, lambda s: flux3_inputs(s, REFERENCE)),
    "Flux 3, distilled": Mode(
        _FLUX3, lambda s: {**flux3_inputs(s), "target_timestep": torch.tensor([0.25])}, {"flow_map": True}
    ),
    "Flux 2 with a reference ahead": Mode(_KLEIN, lambda s: klein_inputs(s, None)),
    "Flux 2 writing its cache": Mode(_KLEIN, klein_inputs, prepare=klein_processors),
    "Flux 2 reading its cache": Mode(_KLEIN, lambda s: klein_inputs(s, "cached"), prepare=klein_processors),
    "Qwen Image 2.1 with two conditions": Mode(_QWEN21, lambda s: qwen21_inputs(s, 2, padding=2)),
    "Qwen Image 2.1 writing its cache": Mode(_QWEN21, lambda s: qwen21_inputs(s, 1, "extract")),
    "Qwen Image 2.1 reading its cache": Mode(_QWEN21, lambda s: qwen21_inputs(s, 1, "cached", 1)),
    "Wan Animate 2 writing its cache": Mode(_ANIMATE2, lambda s: animate2_inputs(s, "extract")),
    "Cosmos 3 with a given frame, actions and sound": Mode(_COSMOS3, lambda s: cosmos3_inputs(s, 1, 3, 4)),
    "Cosmos 2": Mode(_COSMOS, cosmos_inputs, {"extra_pos_embed_type": None}),
    "Cosmos 2.5": Mode(_COSMOS, lambda s: cosmos_inputs(s, pictures=True), COSMOS25),
    "Kandinsky 6 without sound": Mode("Kandinsky6Transformer3DModel", lambda s: kandinsky6_inputs(s, 0)),
    "HunyuanImage's refiner": Mode(
        _HUNYUAN_IMAGE,
        lambda s: {**hunyuan_image_inputs(s), "hidden_states": video(s)},
        {"patch_size": (1, 1, 1), "rope_axes_dim": (2, 2, 4)},
    ),
    "OmniGen with a reference": Mode("OmniGenTransformer2DModel", lambda s: omnigen_inputs(s, REFERENCE)),
    "Bria Fibo 2 with a reference": Mode(_FIBO2, lambda s: fibo2_inputs(s, REFERENCE)),
    "JoyImage Edit Plus without a reference": Mode(_JOY, lambda s: joy_plus_inputs(s, None)),
}
