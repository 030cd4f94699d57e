"""Classes that stay dense: of sound, priors and proteins, with linear or causal attention or sparsity of their own."""

from __future__ import annotations

from typing import Any

import torch

from support.tiny_pieces import (
    LATENT,
    Case,
    Inputs,
    Shape,
    all_words,
    image,
    n,
    now,
    soon,
    video,
    words,
)

SANA: dict[str, Any] = {
    **LATENT,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 16,
    "sample_size": 8,
}
SOUND = 40  # tokens of a soundtrack


def sana_inputs(s: Shape) -> Inputs:
    return {"hidden_states": image(s), "encoder_hidden_states": words(s), "timestep": now()}


def _protein(s: Shape) -> Inputs:
    known = torch.ones(1, SOUND, dtype=torch.bool)
    return {
        "bb_ca": n(1, SOUND, 3),
        "local_latents": n(1, SOUND, 4),
        "bb_ca_time": soon(),
        "local_latents_time": soon(),
        "padding_mask": known,
        "conditioning": {"is_in_context_conditioning": ~known, "supports_local_latent": known},
    }


CASES: dict[str, Case] = {
    "AceStepTransformer1DModel": Case(
        {
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 8,
        },
        lambda s: {
            "hidden_states": n(1, 2 * SOUND, 4),
            "timestep": soon(),
            "timestep_r": soon(),
            "encoder_hidden_states": words(s, 32),
            "context_latents": n(1, 2 * SOUND, 8),
        },
    ),
    "AnyFlowFARTransformer3DModel": Case(
        {
            **LATENT,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 16,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            "gate_value": 0.25,
            "deltatime_type": "r",
            "chunk_partition": (1, 2),
        },
        lambda s: {},  # it is refused
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 16,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 8),
            "nabla_window": (3, 1, 1),
        },
        lambda s: {"hidden_states": n(1, s.frames, 8, 16, 9), "timestep": torch.tensor([500.0])},
    ),
    "LongCatAudioDiTTransformer": Case(
        {"dit_dim": 32, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4, "ff_mult": 1.0},
        lambda s: {
            "hidden_states": n(1, SOUND, 4),
            "encoder_hidden_states": words(s),
            "encoder_attention_mask": all_words(s),
            "timestep": soon(),
            "latent_cond": n(1, SOUND, 4),
        },
    ),
    "MiniMaxMusic3RVQDepthDecoder": Case(
        {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "audio_vocab_size": 8},
        lambda s: {"inputs_embeds": n(1, 8, 32)},
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        {
            "in_channels": 4,
            "condition_dim": 8,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 16,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        lambda s: {"hidden_states": n(1, 4, SOUND), "timestep": soon(), "encoder_hidden_states": n(1, SOUND, 8)},
    ),
    "PriorTransformer": Case(
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "embedding_dim": 8, "num_embeddings": 6},
        lambda s: {
            "hidden_states": n(1, 8),
            "timestep": now(),
            "proj_embedding": n(1, 8),
            "encoder_hidden_states": n(1, 6, 8),
        },
    ),
    "RFD4ProteinaTransformer": Case(
        {
            "nlayers": 2,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 8,
            "pair_repr_dim": 8,
            "latent_dim": 4,
            "t_emb_dim": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca",),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "feats_pair_cond": ("time_emb_bb_ca",),
            "tri_mult_c": 8,
        },
        _protein,
    ),
    "SanaTransformer2DModel": Case(SANA, sana_inputs),
    "SanaVideoTransformer3DModel": Case(
        {**SANA, "rope_max_seq_len": 32}, lambda s: {**sana_inputs(s), "hidden_states": video(s)}
    ),
    "SanaWMTransformer3DModel": Case(
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "linear_head_dim": 12,
            "softmax_every_n": 2,
            "chunk_plucker_channels": 6,
            "caption_channels": 16,
            "mlp_ratio": 1.0,
        },
        lambda s: {
            "hidden_states": video(s),
            "timestep": torch.full((1, 1, s.frames), 500.0),
            "encoder_hidden_states": words(s)[None],
            "encoder_attention_mask": all_words(s),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Case(
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
        },
        lambda s: {
            "hidden_states": n(1, s.frames * s.height * s.width, 4),
            "encoder_hidden_states": words(s),
            "timestep": torch.tensor([[500.0]]),
            "video_rotary_emb": (n(1, s.frames * s.height * s.width, 16), n(1, s.frames * s.height * s.width, 16)),
        },
    ),
    "StableAudioDiTModel": Case(
        {
            "sample_size": SOUND,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 16,
        },
        lambda s: {
            "hidden_states": n(1, 4, SOUND),
            "timestep": now(),
            "encoder_hidden_states": words(s),
            "global_hidden_states": n(1, 1, 8),
            "rotary_embedding": (n(SOUND + 1, 4), n(SOUND + 1, 4)),
        },
    ),
    "StableAudio3DiTModel": Case(
        {
            "io_channels": 4,
            "embed_dim": 128,
            "depth": 1,
            "num_heads": 2,
            "cond_token_dim": 16,
            "global_cond_dim": 8,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 8,
            "ff_mult": 1.0,
            "num_memory_tokens": 4,
        },
        lambda s: {
            "hidden_states": n(1, 4, SOUND),
            "timestep": soon(),
            "encoder_hidden_states": words(s),
            "global_hidden_states": n(1, 8),
        },
    ),
    "T5FilmDecoder": Case(
        {
            "input_dims": 4,
            "targets_length": SOUND,
            "d_model": 16,
            "num_layers": 1,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 16,
        },
        lambda s: {
            "encodings_and_masks": [(words(s), torch.ones(1, s.text))],
            "decoder_input_tokens": n(1, SOUND, 4),
            "decoder_noise_time": soon(),
        },
    ),
    "TransformerTemporalModel": Case(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "norm_num_groups": 2},
        lambda s: {"hidden_states": n(s.frames, 4, s.height, s.width), "num_frames": s.frames},
    ),
}
