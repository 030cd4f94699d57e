"""Transformers of Diffusers with small random weights, and inputs for any grid: classes, not checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffsparse.wrappers import class_of, unwrapped
from support import tiny_newer, tiny_outside
from support.tiny_pieces import (
    HEADS,
    LATENT,
    OTHER,
    Case,
    Expected,
    Inputs,
    Shape,
    all_words,
    grid_ids,
    image,
    image2,
    image2_after,
    image2_before,
    n,
    now,
    packed,
    rotary,
    soon,
    video,
    video1_after,
    video2,
    video2_after,
    video2_before,
    words,
)

__all__ = ["CASES", "OTHER", "Case", "Expected", "Inputs", "Shape", "build", "case_of", "inputs", "made", "tensors"]

# --- families -----------------------------------------------------------------------------------------------------

WAN: dict[str, Any] = {
    **HEADS,
    **LATENT,
    "patch_size": (1, 2, 2),
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
CLASSES = {"norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "activation_fn": "gelu-approximate"}
COG: dict[str, Any] = {
    **LATENT,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "time_embed_dim": 4,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": 6,
    "use_rotary_positional_embeddings": True,
}
HUNYUAN: dict[str, Any] = {
    **LATENT,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 2, 4),
}


def wan_inputs(s: Shape) -> Inputs:
    return {"hidden_states": video(s), "timestep": now(), "encoder_hidden_states": words(s)}


def flux_inputs(s: Shape) -> Inputs:
    return {
        "hidden_states": packed(s, 16),
        "encoder_hidden_states": words(s),
        "timestep": soon(),
        "img_ids": grid_ids(s),
        "txt_ids": torch.zeros(s.text, 3),
    }


def image_inputs(s: Shape) -> Inputs:
    return {"hidden_states": image(s), "encoder_hidden_states": words(s), "timestep": now()}


def cog_inputs(s: Shape) -> Inputs:
    tokens = s.frames * (s.height // 2) * (s.width // 2)
    return {
        "hidden_states": n(1, s.frames, 4, s.height, s.width),
        "encoder_hidden_states": words(s),
        "timestep": now(),
        "image_rotary_emb": rotary(tokens, 8),
    }


def hunyuan_inputs(s: Shape) -> Inputs:
    return {
        "hidden_states": video(s),
        "timestep": now(),
        "encoder_hidden_states": words(s),
        "pooled_projections": n(1, 8),
        "encoder_attention_mask": torch.ones(1, s.text),
        "guidance": torch.tensor([6000.0]),
    }


def qwen_inputs(s: Shape) -> Inputs:
    return {
        "hidden_states": packed(s, 16),
        "encoder_hidden_states": words(s),
        "encoder_hidden_states_mask": torch.ones(1, s.text, dtype=torch.int64),
        "timestep": soon(),
        "img_shapes": [(1, s.height // 2, s.width // 2)],
    }


def ltx_inputs(s: Shape) -> Inputs:
    return {
        "hidden_states": n(1, s.frames * s.height * s.width, 4),
        "encoder_hidden_states": words(s),
        "encoder_attention_mask": all_words(s),
        "timestep": now(),
        "num_frames": s.frames,
        "height": s.height,
        "width": s.width,
    }


def cogview_inputs(s: Shape) -> Inputs:
    size = torch.tensor([[64, 64]])
    return {**image_inputs(s), "original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}


def framepack_inputs(s: Shape) -> Inputs:
    history = {"clean": 2, "history_2x": 2, "history_4x": 4}
    past = {f"latents_{name}": n(1, 4, count, s.height, s.width) for name, count in history.items()}
    places = {f"indices_latents_{name}": torch.arange(count).float() for name, count in history.items()}
    now_places = torch.arange(s.frames).float()
    return {**hunyuan_inputs(s), **past, **places, "indices_latents": now_places, "image_embeds": n(1, 5, 16)}


def helios_inputs(s: Shape) -> Inputs:
    history = {"short": 1, "mid": 2, "long": 4}
    past = {f"latents_history_{name}": n(1, 4, count, s.height, s.width) for name, count in history.items()}
    places = {f"indices_latents_history_{name}": torch.arange(count)[None].float() for name, count in history.items()}
    return {**wan_inputs(s), **past, **places, "indices_hidden_states": torch.arange(s.frames)[None].float()}


def ideogram_inputs(s: Shape) -> Inputs:
    """[two tokens of padding | text | image], with places that are apart from those of the text."""
    places = torch.cat([torch.zeros(2, 3), torch.arange(s.text)[:, None].expand(-1, 3), grid_ids(s) + 65536])
    tokens = len(places)
    return {
        "hidden_states": n(1, tokens, 16),
        "encoder_hidden_states": n(1, tokens, 24),
        "timestep": soon(),
        "position_ids": places.long()[None],
        "segment_ids": torch.tensor([[-1] * 2 + [1] * (tokens - 2)]),
        "indicator": torch.tensor([[0] * 2 + [3] * s.text + [2] * (tokens - 2 - s.text)]),
    }


CASES: dict[str, Case] = {
    "AllegroTransformer3DModel": Case(
        {
            **LATENT,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 16,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
        },
        lambda s: {**wan_inputs(s), "image_rotary_emb": _allegro_rotary(s)},
        video2,
    ),
    "AnyFlowTransformer3DModel": Case(
        {**WAN, "gate_value": 0.25, "deltatime_type": "r"},
        lambda s: {
            "hidden_states": n(1, s.frames, 4, s.height, s.width),
            "timestep": torch.full((1, s.frames), 500.0),
            "r_timestep": torch.full((1, s.frames), 250.0),
            "encoder_hidden_states": words(s),
        },
    ),
    "AuraFlowTransformer2DModel": Case(
        {
            **LATENT,
            "sample_size": 16,
            "patch_size": 2,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pos_embed_max_size": 256,
        },
        lambda s: {**image_inputs(s), "timestep": soon()},
    ),
    "BriaTransformer2DModel": Case(
        {**FLUX, "axes_dims_rope": (0, 8, 8), "pooled_projection_dim": None}, flux_inputs, image2_before
    ),
    "BriaFiboTransformer2DModel": Case(
        {**FLUX, "axes_dims_rope": (0, 8, 8), "joint_attention_dim": 32, "text_encoder_dim": 16},
        lambda s: {
            **flux_inputs(s),
            "encoder_hidden_states": words(s, 32),
            "text_encoder_layers": [words(s), words(s)],
        },
        image2_before,
    ),
    "ChromaTransformer2DModel": Case(
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        flux_inputs,
        image2_before,
    ),
    "ChronoEditTransformer3DModel": Case({**WAN, "rope_temporal_skip_len": 8}, wan_inputs, video2),
    "CogVideoXTransformer3DModel": Case(COG, cog_inputs, video2_before),
    "CogView3PlusTransformer2DModel": Case(
        {
            **LATENT,
            "patch_size": 2,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 16,
            "sample_size": 8,
        },
        cogview_inputs,
        image2_before,
    ),
    "CogView4Transformer2DModel": Case(
        {
            **LATENT,
            "patch_size": 2,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        cogview_inputs,
        image2_before,
    ),
    "ConsisIDTransformer3DModel": Case(
        {
            **COG,
            "num_layers": 1,
            "is_train_face": False,
        },
        cog_inputs,
        video2_before,
    ),
    "DiTTransformer2DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_embeds_ada_norm": 8,
            "patch_size": 2,
            "sample_size": 12,
        },
        lambda s: {"hidden_states": n(1, 4, s.height, s.height), "timestep": now(), "class_labels": torch.tensor([3])},
        lambda s: (1, s.height // 2, s.height // 2, 0, 0),
    ),
    "EasyAnimateTransformer3DModel": Case(
        {
            **LATENT,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "mmdit_layers": 2,
            "num_layers": 2,
            "patch_size": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        wan_inputs,
        video2_before,
    ),
    "ErnieImageTransformer2DModel": Case(
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_axes_dim": (8, 4, 4),
        },
        lambda s: {
            "hidden_states": image(s),
            "timestep": soon(),
            "text_bth": words(s),
            "text_lens": torch.tensor([s.text]),
        },
        lambda s: (1, s.height, s.width, 0, s.text),
        text="text_bth",
    ),
    "Flux2Transformer2DModel": Case(
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        lambda s: {
            **flux_inputs(s),
            "img_ids": grid_ids(s, 4)[None],
            "txt_ids": torch.zeros(1, s.text, 4),
            "guidance": torch.ones(1),
        },
        image2_before,
    ),
    "FluxTransformer2DModel": Case(
        {**FLUX, "pooled_projection_dim": 8},
        lambda s: {**flux_inputs(s), "pooled_projections": n(1, 8)},
        image2_before,
    ),
    "GlmImageTransformer2DModel": Case(
        {
            **LATENT,
            "patch_size": 2,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        lambda s: {
            **image_inputs(s),
            "prior_token_id": torch.tensor([44]),
            "prior_token_drop": torch.tensor([False]),
            "target_size": torch.tensor([[8.0, 8.0]]),
            "crop_coords": torch.zeros(1, 2),
        },
        image2_before,
    ),
    "HeliosTransformer3DModel": Case(
        {
            **{k: v for k, v in WAN.items() if k != "rope_max_seq_len"},
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        helios_inputs,
    ),
    "HiDreamImageTransformer2DModel": Case(
        {
            **LATENT,
            "patch_size": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda s: {
            "hidden_states": n(1, 4, s.height, s.height),
            "encoder_hidden_states_t5": words(s, 8),
            "encoder_hidden_states_llama3": n(2, 1, s.text, 4),
            "pooled_embeds": n(1, 8),
            "timesteps": now(),
        },
        text="encoder_hidden_states_t5",
    ),
    "HunyuanVideoTransformer3DModel": Case(HUNYUAN, hunyuan_inputs, video2_after),
    "HunyuanVideo15Transformer3DModel": Case(
        {
            **LATENT,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        lambda s: {
            **wan_inputs(s),
            "timestep": torch.tensor([500.0]),
            "encoder_attention_mask": torch.ones(1, s.text),
            "encoder_hidden_states_2": n(1, 4, 8),
            "encoder_attention_mask_2": torch.ones(1, 4),
            "image_embeds": n(1, 3, 12),
        },
        lambda s: (s.frames, s.height, s.width, 0, s.text + 7),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}, framepack_inputs
    ),
    "HunyuanDiT2DModel": Case(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 6,
            "text_len_t5": 4,
        },
        lambda s: {
            "hidden_states": n(1, 4, 8, 8),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": n(1, 6, 16),
            "text_embedding_mask": torch.ones(1, 6),
            "encoder_hidden_states_t5": n(1, 4, 16),
            "text_embedding_mask_t5": torch.ones(1, 4),
            "image_meta_size": torch.ones(1, 6),
            "style": torch.tensor([0]),
            "image_rotary_emb": rotary(16, 8),
        },
    ),
    "JoyImageEditTransformer3DModel": Case(
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        lambda s: {**wan_inputs(s), "timestep": soon()},
        video2_after,
    ),
    "LatteTransformer3DModel": Case(
        {
            **CLASSES,
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 16,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "attention_bias": True,
            "video_length": 3,
        },
        lambda s: {
            "hidden_states": n(1, 4, 3, 8, 8),
            "encoder_hidden_states": words(s),
            "timestep": now(),
        },
        lambda s: (1, 4, 4, 0, 0),  # spatial attention: frames are in the batch
    ),
    "LongCatImageTransformer2DModel": Case(
        {**FLUX, "pooled_projection_dim": 8},
        lambda s: {**flux_inputs(s), "guidance": torch.tensor([3.5])},
        image2_before,
    ),
    "LTXVideoTransformer3DModel": Case(
        {
            **LATENT,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
        },
        ltx_inputs,
        lambda s: (s.frames, s.height, s.width, 0, 0),
    ),
    "LTX2VideoTransformer3DModel": Case(
        {
            **LATENT,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 16,
            "rope_double_precision": False,
        },
        lambda s: {
            **ltx_inputs(s),
            "timestep": torch.tensor([500.0]),
            "audio_hidden_states": n(1, 9, 4),
            "audio_encoder_hidden_states": words(s),
            "audio_num_frames": 9,
            "fps": 25.0,
        },
        lambda s: (s.frames, s.height, s.width, 0, 0),
    ),
    "LuminaNextDiT2DModel": Case(
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 16,
            "learn_sigma": False,
        },
        lambda s: {
            "hidden_states": n(1, 4, 16, 16),
            "timestep": soon(),
            "encoder_hidden_states": words(s),
            "encoder_mask": torch.ones(1, s.text),
            "image_rotary_emb": torch.polar(torch.ones(384, 384, 4), torch.rand(384, 384, 4)),
            "cross_attention_kwargs": {},
        },
    ),
    "Lumina2Transformer2DModel": Case(
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 16,
        },
        lambda s: {**image_inputs(s), "timestep": soon(), "encoder_attention_mask": all_words(s)},
        image2_before,
    ),
    "MochiTransformer3DModel": Case(
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 16,
        },
        lambda s: {**wan_inputs(s), "encoder_attention_mask": all_words(s)},
        video2_after,
    ),
    "MotifVideoTransformer3DModel": Case(
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_decoder_layers": 0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "image_embed_dim": 4,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda s: {**wan_inputs(s), "hidden_states": video(s, 9)},
        video1_after,
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
            "moe_enabled": False,
            "capacity_factors": [8.0, 8.0],
        },
        qwen_inputs,
    ),
    "OvisImageTransformer2DModel": Case({**FLUX, "out_channels": 16}, flux_inputs, image2_before),
    "PixArtTransformer2DModel": Case(
        {
            **CLASSES,
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "use_additional_conditions": False,
            "caption_channels": None,
        },
        lambda s: {**image_inputs(s), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        image2,
    ),
    "PRXTransformer2DModel": Case(
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda s: {**image_inputs(s), "timestep": soon()},
    ),
    "QwenImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        qwen_inputs,
        image2_before,
    ),
    "SD3Transformer2DModel": Case(
        {
            **LATENT,
            "sample_size": 16,
            "patch_size": 2,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 24,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda s: {**image_inputs(s), "pooled_projections": n(1, 8)},
        image2_after,
    ),
    "SkyReelsV2Transformer3DModel": Case(WAN, wan_inputs, video2),
    "Transformer2DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 2,
            "norm_num_groups": 2,
            "cross_attention_dim": 16,
        },
        lambda s: {"hidden_states": image(s), "encoder_hidden_states": words(s)},
    ),
    "WanTransformer3DModel": Case(WAN, wan_inputs, video2),
    "WanVACETransformer3DModel": Case(
        {**WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 8},
        lambda s: {**wan_inputs(s), "control_hidden_states": video(s, 8)},
        video2,
    ),
    "WanAnimateTransformer3DModel": Case(
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda s: {
            **wan_inputs(s),
            "hidden_states": video(s, 12),
            "encoder_hidden_states_image": n(1, 12, 16),
            "pose_hidden_states": n(1, 4, s.frames - 1, s.height, s.width),
            "face_pixel_values": n(1, 3, 4 * (s.frames - 2) + 1, 16, 16),
        },
        video2,
    ),
    "ZImageTransformer2DModel": Case(
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        lambda s: {"x": [n(4, 1, s.height, s.width)], "cap_feats": [n(s.text, 16)], "t": torch.zeros(1)},
        text="cap_feats",
    ),
    "Krea2Transformer2DModel": Case(
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda s: {
            "hidden_states": packed(s, 16),
            "encoder_hidden_states": n(1, s.text, 3, 16),
            "timestep": soon(),
            "position_ids": torch.cat([torch.zeros(s.text, 3), grid_ids(s)]),
            "encoder_attention_mask": all_words(s),
        },
    ),
    "Ideogram4Transformer2DModel": Case(
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (2, 1, 1),
        },
        ideogram_inputs,
        lambda s: (1, s.height // 2, s.width // 2, s.text + 2, 0),
    ),
    **tiny_newer.CASES,
}


def _allegro_rotary(s: Shape) -> Any:
    rows, columns = s.height // 2, s.width // 2
    axes = [torch.rand(size, 4) for size in (s.frames, rows, columns)]
    tokens = s.frames * rows * columns
    places = torch.cartesian_prod(torch.arange(s.frames), torch.arange(rows), torch.arange(columns)).view(1, tokens, 3)
    return [(axis.cos(), axis.sin()) for axis in axes], [places[..., i] for i in range(3)]


def build(name: str) -> torch.nn.Module:
    """The transformer `name` in evaluation mode; no parameter is zero, for zeros hide mistakes."""
    return made(name, case_of(name).config)


def case_of(name: str) -> Case:
    """The case of a class; a class that this release of Diffusers has not skips the test."""
    if not hasattr(diffusers, name):
        pytest.skip(f"{name}: a later Diffusers has it")
    return CASES.get(name) or tiny_outside.CASES[name]


def made(name: str, config: dict[str, Any]) -> torch.nn.Module:
    """`build` of a configuration that is not the case's."""
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.05)
    return model  # type: ignore[no-any-return]


def inputs(name: str, shape: Shape = Shape(), seed: int = 0) -> Inputs:  # noqa: B008
    """Inputs of that shape; the same seed gives the same ones."""
    torch.manual_seed(seed)
    return case_of(name).inputs(shape)


@torch.no_grad()
def tensors(model: torch.nn.Module, kwargs: Inputs) -> list[Tensor]:
    """All output tensors of one forward pass."""
    plain = (
        {"return_dict": False}
        if "return_dict" in inspect.signature(class_of(unwrapped(model)).forward).parameters
        else {}
    )
    return list(_flat(model(**kwargs, **plain)))


def _flat(out: Any) -> Iterator[Tensor]:
    if torch.is_tensor(out):
        yield out
    elif isinstance(out, list | tuple):
        for part in out:
            yield from _flat(part)
