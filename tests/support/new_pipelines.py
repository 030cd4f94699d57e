"""More of the pipelines of Diffusers, classical and modular ones: references, audio, KV caches, windows.

Where a text encoder would add nothing but time, its output is given instead: random numbers, the same for each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers as d
import torch
import transformers as t
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.flux3 import modular_blocks_flux3 as flux3_blocks
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference, MiniMaxH3VideoReference
from diffusers.modular_pipelines.minimax_h3 import modular_blocks_minimax_h3 as h3_blocks
from diffusers.modular_pipelines.wan_animate_2 import modular_blocks_wan_animate_2 as animate_blocks
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

from support import tiny_pipelines
from support.tiny_transformers import CASES

Built = tuple[Any, dict[str, Any]]
STEPS = 3


def words(tokens: int, width: int, seed: int = 1) -> torch.Tensor:
    """Embeddings of a prompt."""
    return noise(1, tokens, width, seed=seed)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    """What an autoencoder would make of a picture or a sound."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(width: int = 32, height: int = 32) -> Image.Image:
    """An RGB image that is not all of one colour."""
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def modular(blocks: ModularPipelineBlocks, **components: Any) -> ModularPipeline:
    """The blocks as a pipeline with those components."""
    pipe = blocks.init_pipeline()
    pipe.update_components(**components)
    return pipe


# --- text encoders that see ---------------------------------------------------------------------------------------

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
WORDS = "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + WORDS + "<|im_end|>\n{% endfor %}"


def qwen_vocabulary() -> dict[str, int]:
    tokens = [*sorted(ByteLevel.alphabet()), *SPECIAL, "<|video_pad|>"]
    return {x: i for i, x in enumerate(tokens)}


class Processor(t.Qwen3VLProcessor):
    """Without videos, for which torchvision would be needed."""

    def check_argument_for_proper_class(self, name: str, argument: object) -> type:
        return type(argument)


def qwen3_vl_processor() -> Processor:
    special = [*SPECIAL[1:], "<|video_pad|>"]
    tokenizer = t.Qwen2Tokenizer(
        vocab=qwen_vocabulary(), merges=[], pad_token=SPECIAL[0], additional_special_tokens=special
    )
    images = t.Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=64, max_pixels=2**16)
    return Processor(image_processor=images, tokenizer=tokenizer, video_processor=None, chat_template=TEMPLATE)


def qwen3_vl(width: int = 16) -> torch.nn.Module:
    torch.manual_seed(0)
    vocabulary = qwen_vocabulary()
    ids = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ids |= {f"vision_{end}_token_id": f"<|vision_{end}|>" for end in ("start", "end")}
    sizes = {"hidden_size": width, "intermediate_size": width}
    config = t.Qwen3VLConfig(
        text_config={
            **sizes,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": len(vocabulary),
            "rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e4},
        },
        vision_config={
            **sizes,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": width,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **{name: vocabulary[token] for name, token in ids.items()},
    )
    return t.Qwen3VLForConditionalGeneration(config).eval()


# --- MiniMax-H3 -------------------------------------------------------------------------------------------------


def h3(blocks: ModularPipelineBlocks, name: str = "transformer") -> ModularPipeline:
    """Latents and denoising, without autoencoders: latents of video have 24 channels then, and of sound 32."""
    torch.manual_seed(0)
    transformer = d.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    schedulers = {"scheduler": d.MiniMaxH3Scheduler(shift=12.0), "audio_scheduler": d.MiniMaxH3Scheduler(shift=3.0)}
    return modular(blocks, **{name: transformer.eval()}, **schedulers)


def h3_call(**more: Any) -> dict[str, Any]:
    """The shortest clip it makes: 124 frames are 37 latent ones of 2 x 3 tokens, and 2 x 207 tokens of sound.

    The last of its steps is the end of the schedule, which is not run.
    """
    text: dict[str, Any] = {"prompt_embeds": words(9, 16), "text_token_tags": torch.ones(9, dtype=torch.int64)}
    size = {"height": 64, "width": 96, "num_frames": 124, "num_inference_steps": STEPS + 1}
    return {**text, **size, "output": ["latents", "audio_latents"], **more}


def h3_text() -> Built:
    return h3(h3_blocks.MiniMaxH3CoreDenoiseStep()), h3_call()


def h3_keyframes() -> Built:
    """First and last frame given: both stand between text and sound."""
    frames = [noise(1, 24, 1, 4, 6, seed=seed) for seed in (1, 2)]
    pipe = h3(h3_blocks.MiniMaxH3FL2VACoreDenoiseStep())
    return pipe, h3_call(condition_latents=frames, keyframe_anchors=("first", "last"))


def h3_references() -> Built:
    """An image and a clip with sound, each of a size of its own, between text and sound."""
    sound = torch.zeros(2, 800)
    clip = MiniMaxH3VideoReference(frames=[picture()] * 22, audio=sound, sample_rate=32000)
    pipe = h3(h3_blocks.MiniMaxH3Ref2VACoreDenoiseStep(), "transformer_ref")
    return pipe, h3_call(
        normalized_references=[MiniMaxH3ImageReference(image=picture()), clip],
        condition_latents=[noise(1, 24, 1, 6, 4), noise(1, 24, 7, 4, 4)],
        audio_condition_latents=[noise(2 * 5, 32)],
    )


# --- Flux 3 and Flux 2 Klein --------------------------------------------------------------------------------------


def flux3(image: bool = False) -> Built:
    torch.manual_seed(0)
    transformer = d.Flux3Transformer2DModel(
        in_channels=8,
        cond_in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    pipe = modular(flux3_blocks.Flux3AutoCoreDenoiseStep(), transformer=transformer.eval(), scheduler=scheduler)
    call: dict[str, Any] = {"prompt_embeds": words(10, 16), "negative_prompt_embeds": words(7, 16, seed=2)}
    call |= {"height": 128, "width": 160, "num_inference_steps": STEPS, "output": "latents"}
    references = [noise(1, 8, 6, 4), noise(1, 8, 5, 5, seed=2)]
    return pipe, {**call, "image_cond_latents": references} if image else call


def flux2_vae() -> torch.nn.Module:
    torch.manual_seed(0)
    return d.AutoencoderKLFlux2(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    ).eval()


def flux2_klein(image: bool) -> Built:
    """The pipeline that computes a reference in its first step only and keeps its keys and values."""
    torch.manual_seed(0)
    transformer = d.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    pipe = d.Flux2KleinKVPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
    )
    call: dict[str, Any] = {"prompt_embeds": words(10, 16), "height": 128, "width": 160, "num_inference_steps": STEPS}
    return pipe, {**call, "image": picture(96, 64)} if image else call


# --- Qwen-Image ---------------------------------------------------------------------------------------------------


def qwen_image21(image: bool = False, cached: bool = True, **more: Any) -> Built:
    torch.manual_seed(0)
    transformer = d.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = d.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = d.QwenImage21Pipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=qwen3_vl(),
        processor=qwen3_vl_processor(),
        transformer=transformer.eval(),
    )
    call: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "a", "true_cfg_scale": 3.0, "use_kv_cache": cached}
    call |= {"height": 128, "width": 160, "num_inference_steps": STEPS, "output_resolution": 96}
    return pipe, {**call, "image": picture(64, 96)} if image else call


# --- Wan and its kin ----------------------------------------------------------------------------------------------


def wan_vae() -> torch.nn.Module:
    torch.manual_seed(0)
    return d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def wan_animate2() -> Built:
    """Two segments, the second of which goes on from the last frame of the first."""
    torch.manual_seed(0)
    transformer = d.WanAnimate2Transformer3DModel(
        text_len=12, dim=24, ffn_dim=32, freq_dim=16, text_dim=16, num_heads=2, num_layers=2
    )
    pipe = modular(
        animate_blocks.WanAnimate2CoreDenoiseStep(),
        vae=wan_vae(),
        transformer=transformer.eval(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    words_of = dict(zip(("prompt_embeds", "negative_prompt_embeds", "prompt_ref_embeds"), range(1, 4), strict=True))
    segments = {"segment_frame_length": 5, "prev_segment_conditioning_frames": 1, "effective_segment": 4}
    return pipe, {
        **{name: words(9, 16, seed) for name, seed in words_of.items()},
        **segments,
        "num_segments": 2,
        "height": 64,
        "width": 96,
        "num_inference_steps": STEPS,
        "driving_video_pixels": noise(1, 3, 9, 64, 96).clamp(-1, 1),
        "reference_image_latents": noise(20, 1, 8, 12),
        "condition_clip_context": noise(1, 5, 1280),
        "denoiser_input_fields": {"encoder_hidden_states_image": noise(1, 5, 1280, seed=2)},
        "output": "segment_frames",
    }


def skyreels(**more: Any) -> Built:
    """Three windows of 3 latent frames, each of which goes on from 2 frames of the one before."""
    torch.manual_seed(0)
    transformer = d.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        inject_sample_info=True,
    )
    pipe = d.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer.eval(),
        vae=wan_vae(),
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
    )
    call: dict[str, Any] = {
        "prompt_embeds": words(9, 16),
        "negative_prompt_embeds": words(9, 16, seed=2),
        "prompt": None,
    }
    call |= {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 0}
    return pipe, {**call, "height": 32, "width": 48, "num_inference_steps": STEPS, **more}


# --- LTX ----------------------------------------------------------------------------------------------------------


def ltx_condition() -> Built:
    """The last frame given: its tokens stand before those of the clip."""
    pipe, call = tiny_pipelines.ltx()
    pipe = d.LTXConditionPipeline(**pipe.components)
    condition = LTXVideoCondition(image=picture(64, 32), frame_index=8)
    return pipe, {**call, "conditions": condition, "width": 64, "num_inference_steps": STEPS}


def ltx2_condition(**more: Any) -> Built:
    """The last frame given: its tokens stand after those of the clip."""
    torch.manual_seed(0)
    transformer = d.LTX2VideoTransformer3DModel(
        **{**CASES["LTX2VideoTransformer3DModel"].config, "in_channels": 8, "out_channels": 8}
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        rope_double_precision=False,
    )
    vae = d.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = d.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=8, resolution=32
    )
    pipe = d.LTX2ConditionPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=None,
        tokenizer=None,
        connectors=connectors.eval(),
        transformer=transformer.eval(),
        vocoder=None,
    )
    text: dict[str, Any] = {f"{side}prompt_embeds": words(12, 32, seed) for seed, side in ((1, ""), (2, "negative_"))}
    text |= {f"{side}prompt_attention_mask": torch.ones(1, 12, dtype=torch.int64) for side in ("", "negative_")}
    call: dict[str, Any] = {
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }
    call |= {"conditions": LTX2VideoCondition(frames=picture(96, 64), index=-1, crf=0)}
    call |= {"spatio_temporal_guidance_blocks": [1]}
    return pipe, {**text, **call, **more}


# --- others -------------------------------------------------------------------------------------------------------


class Absent:
    """A component that a pipeline insists on and then, with what it is given here, asks for nothing."""

    def to(self, device: object) -> None:
        """Nothing to move."""


def framepack(**more: Any) -> Built:
    """Two sections, the earlier of which is made last; what is made already stands before each as its history."""
    torch.manual_seed(0)
    _, call = tiny_pipelines.hunyuan_video()
    parts = tiny_pipelines.hunyuan_video()[0].components
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    history = {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True, "patch_size": 2}
    transformer = d.HunyuanVideoFramepackTransformer3DModel(**{**parts["transformer"].config, **history})
    parts["transformer"] = transformer.eval()
    pipe = d.HunyuanVideoFramepackPipeline(
        **parts,
        image_encoder=t.SiglipVisionModel(t.SiglipVisionConfig(image_size=8, patch_size=4, **sizes)).eval(),
        feature_extractor=t.SiglipImageProcessorPil(size={"height": 8, "width": 8}),
    )
    call |= {"image": picture(64, 96), "latent_window_size": 3, "num_frames": 13, "height": 96, "width": 64}
    call |= {"negative_prompt": "bad", "true_cfg_scale": 2.0, "output_type": "latent"}
    return pipe, {**call, "num_inference_steps": STEPS, **more}


def kandinsky6(image: bool = False) -> Built:
    """Video and sound side by side; the first frame, if given, stands behind those that are made."""
    torch.manual_seed(0)
    transformer = d.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 8),
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )
    pipe = d.Kandinsky6TI2VAPipeline(
        transformer=transformer.eval(),
        vae=tiny_pipelines.hunyuan_video()[0].vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=5.0),
        audio_vae=d.MMAudioVAE(mel_bins=8, latent_channels=4, hidden_channels=8, layers_per_block=1).eval(),
        vocoder=Absent(),
    )
    call: dict[str, Any] = {"prompt_embeds": words(9, 16), "pooled_prompt_embeds": noise(1, 8)}
    call |= {"negative_prompt_embeds": words(7, 16, seed=2), "negative_pooled_prompt_embeds": noise(1, 8, seed=2)}
    call |= {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe, {**call, "image": picture(96, 64)} if image else call


def qwen_image_edit() -> Built:
    """Two pictures, each of a size of its own, behind the one that is made."""
    edit_plus.VAE_IMAGE_SIZE = edit_plus.CONDITION_IMAGE_SIZE = 64 * 64  # pixels; 16,384 tokens for each otherwise
    parts = tiny_pipelines.qwen_image()[0].components
    pipe = d.QwenImageEditPlusPipeline(**parts, processor=None)
    call: dict[str, Any] = {"prompt_embeds": words(9, 16), "negative_prompt_embeds": words(7, 16, seed=2)}
    masks = {"prompt_embeds_mask": torch.ones(1, 9), "negative_prompt_embeds_mask": torch.ones(1, 7)}
    images = [picture(64, 64), picture(32, 96)]
    return pipe, {**call, **masks, "image": images, "height": 64, "width": 80, "num_inference_steps": STEPS}


def cosmos3(image: bool = False) -> Built:
    """Text is a stream of its own, whose keys the other tokens see too."""
    torch.manual_seed(0)
    transformer = d.Cosmos3OmniTransformer(
        head_dim=12,
        hidden_size=24,
        intermediate_size=32,
        latent_channel=16,
        patch_latent_dim=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        vocab_size=len(qwen_vocabulary()),
        rope_axes_dim=[2, 2, 2],
        dtype="float32",
    )
    pipe = d.Cosmos3OmniPipeline(
        transformer=transformer.eval(),
        text_tokenizer=qwen3_vl_processor().tokenizer,
        vae=wan_vae(),
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        enable_safety_checker=False,
    )
    pipe.text_tokenizer.chat_template = TEMPLATE
    call: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "a", "height": 64, "width": 96, "num_frames": 9}
    call |= {"num_inference_steps": STEPS, "output_type": "latent", "add_duration_template": False}
    call |= {"use_system_prompt": False, "add_resolution_template": False}
    return pipe, {**call, "image": picture(96, 64)} if image else call


def cosmos() -> Built:
    torch.manual_seed(0)
    transformer = d.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
    )
    vae = d.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    )
    pipe = d.CosmosTextToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=d.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5),
        safety_checker=Absent(),
    )
    call: dict[str, Any] = {"prompt_embeds": words(9, 16), "negative_prompt_embeds": words(9, 16, seed=2)}
    call |= {"height": 64, "width": 96, "num_frames": 17, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe, call


BUILDERS: dict[str, Callable[[], Built]] = {
    "h3": h3_text,
    "h3_keyframes": h3_keyframes,
    "h3_references": h3_references,
    "flux3": flux3,
    "flux3_references": lambda: flux3(image=True),
    "flux2_klein_kv": lambda: flux2_klein(image=True),
    "flux2_klein_kv_text": lambda: flux2_klein(image=False),
    "wan_animate2": wan_animate2,
    "skyreels_df": skyreels,
    "skyreels_df_async": lambda: skyreels(ar_step=2, causal_block_size=1),
    "skyreels_df_causal": lambda: skyreels(ar_step=2, causal_block_size=2, num_frames=21, base_num_frames=13),
    "ltx_condition": ltx_condition,
    "ltx2_condition": ltx2_condition,
    "framepack": framepack,
    "kandinsky6": kandinsky6,
    "kandinsky6_image": lambda: kandinsky6(image=True),
    "qwen_image_edit": qwen_image_edit,
    "cosmos": cosmos,
    "cosmos3": cosmos3,
    "cosmos3_image": lambda: cosmos3(image=True),
    "qwen_image21": qwen_image21,
    "qwen_image21_image": lambda: qwen_image21(image=True),
    "qwen_image21_image_uncached": lambda: qwen_image21(image=True, cached=False),
}


def run(pipe: Any, kwargs: dict[str, Any], **over: Any) -> torch.Tensor:
    """All that one seeded call makes, in one row."""
    pipe.set_progress_bar_config(disable=True)
    more = {} if isinstance(pipe, ModularPipeline) else {"output_type": "pt"}
    with torch.compiler.set_stance("force_eager"):  # Wan-Animate 2 would compile the making of its mask
        out = pipe(**{**more, **kwargs, **over}, generator=torch.Generator().manual_seed(0))
    return torch.cat([part.flatten() for part in _tensors(out)])


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(out):
        yield out
    else:
        for part in out.values() if isinstance(out, dict) else out:
            yield from _tensors(part)
