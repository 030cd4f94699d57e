"""The parts of the embedded model: a transformer to train; a VAE, a tokenizer and a text encoder set by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffsparse_pipelines.tiny.captions import CAPTIONS, WORDS
from diffsparse_pipelines.tiny.variants import VAE_PATCH, Variant

LATENT = 3 * VAE_PATCH**2
LATENT_STD = 0.5
TEXT_DIM = 64
SHIFT = 3.0


def transformer(variant: Variant, seed: int = 1) -> WanTransformer3DModel:
    """An untrained transformer that predicts the clean latents; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=variant.heads,
            attention_head_dim=variant.head_dim,
            in_channels=LATENT,
            out_channels=LATENT,
            text_dim=TEXT_DIM,
            freq_dim=128,
            ffn_dim=variant.ffn,
            num_layers=variant.layers,
            cross_attn_norm=True,
            rope_max_seq_len=64,
        )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the captions, and an end mark."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **marks)


def text_encoder() -> UMT5EncoderModel:
    """A frozen encoder of random weights: it keeps words and their order apart, and that is all the model needs."""
    config = UMT5Config(
        vocab_size=max(len(WORDS), 32),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UMT5EncoderModel(config).eval()


def vae() -> AutoencoderKLWan:
    """A stock Wan VAE set by hand to move 2x2 pixels into channels, and back.

    All residual and attention branches are zero. Two steps of the stock network are not linear and are made so: the
    last RMS norm by one constant channel far larger than the others, SiLU by pairs, since silu(x) - silu(-x) = x.
    """
    width = 2 * LATENT + 2
    model = AutoencoderKLWan(
        base_dim=width,
        z_dim=LATENT,
        dim_mult=[1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[],
        latents_mean=[0.0] * LATENT,
        latents_std=[LATENT_STD] * LATENT,
        in_channels=LATENT,
        out_channels=LATENT,
        patch_size=VAE_PATCH,
        scale_factor_temporal=1,
        scale_factor_spatial=VAE_PATCH,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "gamma" in name else 0.0)
        _connect(model.quant_conv, range(2 * LATENT), range(2 * LATENT))
        _connect(model.post_quant_conv, range(LATENT), range(LATENT))
        for side in (model.encoder, model.decoder):
            _make_linear(side, width)
        model.encoder.conv_out.bias[LATENT:] = -30.0  # log variance: the encoder is certain
    return model.eval()


def _connect(conv: torch.nn.Conv3d, outputs: range, inputs: range, weight: float = 1.0) -> None:
    """Let output channels copy input channels: causal in time, centred in space."""
    frame, row, column = conv.kernel_size[0] - 1, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2
    conv.weight[list(outputs), list(inputs), frame, row, column] = weight


def _make_linear(side: Any, width: int) -> None:
    constant, plus, minus = 512.0, range(LATENT), range(LATENT, 2 * LATENT)
    _connect(side.conv_in, plus, plus)
    _connect(side.conv_in, minus, plus, -1.0)
    side.conv_in.bias[2 * LATENT] = constant
    side.norm_out.gamma.fill_(constant / width**0.5)  # undoes the division by the constant channel
    _connect(side.conv_out, plus, plus)
    _connect(side.conv_out, plus, minus, -1.0)


def scheduler() -> UniPCMultistepScheduler:
    """The stock sampler for a model that predicts clean latents."""
    return UniPCMultistepScheduler(prediction_type="sample", use_flow_sigmas=True, flow_shift=SHIFT)


def pipeline(model: WanTransformer3DModel) -> WanPipeline:
    """A stock pipeline around `model`."""
    parts = {"tokenizer": tokenizer(), "text_encoder": text_encoder(), "vae": vae(), "scheduler": scheduler()}
    return WanPipeline(transformer=model.eval(), **parts)


def latents(video: Tensor) -> Tensor:
    """What the VAE makes of a video, without its cost: [B, 3, F, H, W] -> [B, 12, F, H/2, W/2]."""
    cut: Tensor = patchify(video, VAE_PATCH)
    return cut / LATENT_STD


@torch.no_grad()
def caption_embeddings(length: int) -> Tensor:
    """Text features of all captions and, last, of the empty one, padded with zeros as the stock pipeline does.

    Returns:
        float32 [captions + 1, length, TEXT_DIM].
    """
    texts = [*map(str, CAPTIONS), ""]
    words = tokenizer()(texts, padding="max_length", max_length=length, return_tensors="pt")
    features: Tensor = text_encoder()(words.input_ids, words.attention_mask).last_hidden_state
    mask: Tensor = words.attention_mask
    return features * mask[..., None]


def export(weights: dict[str, Tensor], variant: Variant, folder: Path) -> None:
    """Write a pipeline folder for the stock `WanPipeline.from_pretrained`; the transformer is kept in bfloat16."""
    model = transformer(variant)
    model.load_state_dict(weights)
    pipeline(model).save_pretrained(folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.bfloat16().contiguous() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
