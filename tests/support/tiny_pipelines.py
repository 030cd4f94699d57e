"""Stock Diffusers pipelines with small random weights, built without a network in a fraction of a second each."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
import transformers as t
from tokenizers.pre_tokenizers import ByteLevel

LETTERS = string.ascii_letters + string.digits + string.punctuation
Built = tuple[d.DiffusionPipeline, dict[str, Any]]


# --- tokenizers and text encoders -------------------------------------------------------------------------------


def t5_tokenizer() -> t.PreTrainedTokenizerBase:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\u2581", -1.5)]
    return t.T5Tokenizer(vocab=special + [(x, -3.0) for x in LETTERS], extra_ids=0, model_max_length=77)


def clip_tokenizer() -> t.PreTrainedTokenizerBase:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    return t.CLIPTokenizer(vocab={x: i for i, x in enumerate(tokens)}, merges=[], model_max_length=77)


def llama_tokenizer() -> t.PreTrainedTokenizerBase:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    vocab = {x: i for i, x in enumerate(tokens)}
    return t.LlamaTokenizer(vocab=vocab, merges=[], pad_token="<pad>", model_max_length=512)


def qwen_tokenizer() -> t.PreTrainedTokenizerBase:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {x: i for i, x in enumerate(tokens)}
    return t.Qwen2Tokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", model_max_length=512)


def t5(config: type = t.T5Config, model: type = t.T5EncoderModel, width: int = 32) -> torch.nn.Module:
    torch.manual_seed(0)
    return model(config(vocab_size=256, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)).eval()


def clip(model: type = t.CLIPTextModel, width: int = 32) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 3}
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    return model(t.CLIPTextConfig(vocab_size=514, projection_dim=32, **sizes, **ends)).eval()


def llama(width: int = 16) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 3}
    return t.LlamaModel(t.LlamaConfig(vocab_size=256, bos_token_id=0, eos_token_id=2, pad_token_id=1, **sizes)).eval()


def qwen(width: int = 16) -> torch.nn.Module:
    torch.manual_seed(0)
    config = t.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2,
            "hidden_size": width,
            "intermediate_size": width,
            "num_heads": 2,
            "out_hidden_size": width,
        },
        hidden_size=width,
        vocab_size=512,
    )
    return t.Qwen2_5_VLForConditionalGeneration(config).eval()


# --- video ------------------------------------------------------------------------------------------------------


def call(**more: Any) -> dict[str, Any]:
    """Call arguments of a 9-frame, 32 x 32 clip in 4 steps."""
    common = {"prompt": "dance monkey", "num_inference_steps": 4, "height": 32, "width": 32}
    return {**common, "max_sequence_length": 16, **more}


def wan(experts: bool = False) -> Built:
    def transformer() -> torch.nn.Module:
        return d.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ).eval()

    torch.manual_seed(0)
    vae = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    more = {"transformer_2": transformer(), "boundary_ratio": 0.875} if experts else {}
    pipe = d.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(t.UMT5Config, t.UMT5EncoderModel),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer(),
        **more,
    )
    return pipe, call(negative_prompt="bad", guidance_scale=6.0, num_frames=9)


def hunyuan_video() -> Built:
    torch.manual_seed(0)
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = d.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = d.HunyuanVideoPipeline(
        text_encoder=llama(),
        tokenizer=llama_tokenizer(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(width=8),
        tokenizer_2=clip_tokenizer(),
    )
    template = {"template": "{}", "crop_start": 0}
    return pipe, call(prompt_template=template, guidance_scale=4.5, num_frames=9)


def cogvideox() -> Built:
    torch.manual_seed(0)
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
    )
    vae = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = d.CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=d.CogVideoXDDIMScheduler(),
    )
    return pipe, call(negative_prompt="", guidance_scale=6.0, num_frames=9)


def ltx() -> Built:
    torch.manual_seed(0)
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        encoder_causal=True,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    pipe = d.LTXPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer.eval(),
    )
    return pipe, call(negative_prompt="", guidance_scale=3.0, num_frames=9)


def mochi() -> Built:
    torch.manual_seed(0)
    transformer = d.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    vae = d.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    pipe = d.MochiPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer.eval(),
    )
    return pipe, call(negative_prompt="bad", guidance_scale=4.5, num_frames=7, height=16, width=16)


# --- images -----------------------------------------------------------------------------------------------------


def kl(channels: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return d.AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()


def flux() -> Built:
    torch.manual_seed(0)
    transformer = d.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=kl(1),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer.eval(),
    )
    return pipe, call(negative_prompt="bad", true_cfg_scale=4.0, height=16, width=16, max_sequence_length=24)


def sd3() -> Built:
    torch.manual_seed(0)
    transformer = d.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    pipe = d.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=kl(4),
        text_encoder=clip(t.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(t.CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )
    return pipe, call(guidance_scale=5.0, height=8, width=12, max_sequence_length=24)


def qwen_image() -> Built:
    torch.manual_seed(0)
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = d.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = d.QwenImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=qwen(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer.eval(),
    )
    return pipe, call(negative_prompt="bad", true_cfg_scale=2.0)


BUILDERS: dict[str, Callable[[], Built]] = {
    "wan": wan,
    "wan22": lambda: wan(experts=True),
    "hunyuan_video": hunyuan_video,
    "cogvideox": cogvideox,
    "ltx": ltx,
    "mochi": mochi,
    "flux": flux,
    "sd3": sd3,
    "qwen_image": qwen_image,
}
# Sizes at which blocks and tiles are ragged.
ODD: dict[str, dict[str, int]] = {
    "wan": {"height": 48, "width": 80, "num_frames": 13},
    "hunyuan_video": {"height": 48, "width": 80, "num_frames": 5},
    "cogvideox": {"height": 48, "width": 80},
    "ltx": {"height": 32, "width": 96},
    "flux": {"height": 10, "width": 14},
    "sd3": {"height": 9, "width": 7},
}
VIDEO = ("wan", "wan22", "hunyuan_video", "cogvideox", "ltx", "mochi")


def run(pipe: d.DiffusionPipeline, kwargs: dict[str, Any], **over: Any) -> torch.Tensor:
    """Frames [B, F, C, H, W] or images [B, C, H, W] of one seeded call."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipe(**{**kwargs, **over}, generator=generator, output_type="pt")
    return out.frames if hasattr(out, "frames") else out.images
