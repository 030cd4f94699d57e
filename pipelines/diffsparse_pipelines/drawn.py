"""Random inputs for one forward pass of a transformer without its pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffsparse.errors import ConfigError
from diffsparse.seam.models import modes_grid, packed_grid, spec_of

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from diffusers.configuration_utils import FrozenDict

PACKED = (packed_grid, modes_grid)  # readers of classes whose pipelines pack 2 x 2 cells
Inputs = dict[str, object]
_H3_TEXT, _H3_SOUND, _H3_VIDEO = 1, 2, 0  # tags of MiniMax-H3's tokens


@dataclass(frozen=True)
class _Draw:
    """Random inputs for one model.

    Attributes:
        config: of the model.
        size: the latent's frames, height and width.
        text: the prompt's tokens.
        dtype: of the inputs.
        device: of the inputs.
    """

    config: FrozenDict
    size: tuple[int, int, int]
    text: int
    dtype: torch.dtype
    device: str

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(1, *shape, dtype=self.dtype, device=self.device)

    def video(self) -> Tensor:
        """[1, C, F, H, W]."""
        return self.normal(self.config.in_channels, *self.size)

    def packed(self) -> Tensor:
        """[1, N, C]: an image whose cells were packed 2 x 2."""
        _, height, width = self.size
        return self.normal(height // 2 * (width // 2), self.config.in_channels)

    def words(self, width: int) -> Tensor:
        return self.normal(self.text, width)

    def full(self, value: float) -> Tensor:
        return torch.full((1,), value, dtype=self.dtype, device=self.device)

    def mask(self) -> Tensor:
        return torch.ones(1, self.text, dtype=torch.bool, device=self.device)


def _wan(d: _Draw) -> Inputs:
    return {"hidden_states": d.video(), "timestep": d.full(500), "encoder_hidden_states": d.words(d.config.text_dim)}


def _hunyuan(d: _Draw) -> Inputs:
    return {
        "hidden_states": d.video(),
        "timestep": d.full(500),
        "encoder_hidden_states": d.words(d.config.text_embed_dim),
        "encoder_attention_mask": d.mask(),
        "pooled_projections": d.normal(d.config.pooled_projection_dim),
        "guidance": d.full(6000),
    }


def _cogvideox(d: _Draw) -> Inputs:
    frames, height, width = d.size
    time = d.config.patch_size_t or 1
    frames += -frames % time  # the pipeline pads in front and cuts off afterwards
    tokens = frames // time * (height // 2) * (width // 2)
    angles = torch.rand(tokens, d.config.attention_head_dim, dtype=torch.float32, device=d.device)
    return {
        "hidden_states": d.normal(frames, d.config.in_channels, height, width),
        "timestep": d.full(500),
        "encoder_hidden_states": d.words(d.config.text_embed_dim),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _ltx(d: _Draw) -> Inputs:
    frames, height, width = d.size
    return {
        "hidden_states": d.normal(frames * height * width, d.config.in_channels),
        "timestep": d.full(500),
        "encoder_hidden_states": d.words(d.config.caption_channels),
        "encoder_attention_mask": d.mask(),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _mochi(d: _Draw) -> Inputs:
    return {
        "hidden_states": d.video(),
        "timestep": d.full(500),
        "encoder_hidden_states": d.words(d.config.text_embed_dim),
        "encoder_attention_mask": d.mask(),
    }


def _flux(d: _Draw) -> Inputs:
    _, height, width = d.size
    ids = torch.zeros(height // 2, width // 2, 3, device=d.device)
    ids[..., 1] = torch.arange(height // 2, device=d.device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=d.device)
    return {
        "hidden_states": d.packed(),
        "timestep": d.full(0.5),
        "encoder_hidden_states": d.words(d.config.joint_attention_dim),
        "pooled_projections": d.normal(d.config.pooled_projection_dim),
        "guidance": d.full(3.5),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(d.text, 3, device=d.device),
    }


def _sd3(d: _Draw) -> Inputs:
    return {
        "hidden_states": d.video()[:, :, 0],
        "timestep": d.full(500),
        "encoder_hidden_states": d.words(d.config.joint_attention_dim),
        "pooled_projections": d.normal(d.config.pooled_projection_dim),
    }


def _qwen(d: _Draw) -> Inputs:
    _, height, width = d.size
    return {
        "hidden_states": d.packed(),
        "timestep": d.full(0.5),
        "encoder_hidden_states": d.words(d.config.joint_attention_dim),
        "encoder_hidden_states_mask": d.mask(),
        "img_shapes": [(1, height // 2, width // 2)],
    }


def _flux2(d: _Draw) -> Inputs:
    ids = torch.zeros(*(edge // 2 for edge in d.size[1:]), 4, device=d.device)
    ids[..., 1] = torch.arange(ids.shape[0], device=d.device)[:, None]
    ids[..., 2] = torch.arange(ids.shape[1], device=d.device)
    return {
        "hidden_states": d.packed(),
        "timestep": d.full(0.5),
        "encoder_hidden_states": d.words(d.config.joint_attention_dim),
        "guidance": d.full(4),
        "img_ids": ids.flatten(0, 1)[None],
        "txt_ids": torch.zeros(1, d.text, 4, device=d.device),
    }


def _flux3(d: _Draw) -> Inputs:
    made = _flux2(d)
    ids, text = made["img_ids"], torch.zeros(d.text, 4, device=d.device)
    assert isinstance(ids, Tensor)
    text[:, 3] = torch.arange(d.text, device=d.device)
    return {key: made[key] for key in ("hidden_states", "timestep", "encoder_hidden_states")} | {
        "img_ids": ids[0],
        "txt_ids": text,
    }


def _qwen21(d: _Draw) -> Inputs:
    _, height, width = d.size
    slots = torch.zeros(1, d.text, dtype=torch.bool, device=d.device)
    cells = torch.ones(1, height * width // 4, dtype=torch.bool, device=d.device)  # four tokens a slot
    return {
        "hidden_states": d.normal(height * width, d.config.in_channels),
        "timestep": d.full(0.5),
        "encoder_hidden_states": d.words(d.config.context_in_dim),
        "encoder_hidden_states_mask": d.mask(),
        "img_shapes": [[(1, height, width)]],
        "img_mask": torch.cat([slots, cells], 1),
    }


def _nucleus(d: _Draw) -> Inputs:
    return {**_qwen(d), "encoder_hidden_states_mask": torch.ones(1, d.text, dtype=torch.int64, device=d.device)}


def _z_image(d: _Draw) -> Inputs:
    return {
        "x": list(d.video()),
        "t": d.full(0.5),
        "cap_feats": list(d.words(d.config.cap_feat_dim)),
    }


def _image(d: _Draw, width: int) -> Inputs:
    return {"hidden_states": d.video()[:, :, 0], "timestep": d.full(0.5), "encoder_hidden_states": d.words(width)}


def _hunyuan_image(d: _Draw) -> Inputs:
    return {**_image(d, d.config.text_embed_dim), "encoder_attention_mask": d.mask()}


def _prx(d: _Draw) -> Inputs:
    return _image(d, d.config.context_in_dim)


def _fibo2(d: _Draw) -> Inputs:
    layers = 2  # of the text encoder
    return {
        **_image(d, d.config.cap_feat_dim),
        "encoder_hidden_states": d.normal(layers, d.text, d.config.cap_feat_dim),
    }


def _omnigen(d: _Draw) -> Inputs:
    _, height, width = d.size
    before, cells = d.text + 1, height // 2 * (width // 2)  # the words, the time
    mask = torch.ones(1, before + cells, before + cells, device=d.device).tril()
    mask[:, before:] = 1
    return {
        "hidden_states": d.video()[:, :, 0],
        "timestep": d.full(0.5),
        "input_ids": torch.zeros(1, d.text, dtype=torch.int64, device=d.device),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(before + cells, device=d.device)[None],
    }


def _cosmos(d: _Draw) -> Inputs:
    words = d.words(
        d.config.text_embed_dim if not d.config.use_crossattn_projection else d.config.crossattn_proj_in_channels
    )
    return {"hidden_states": d.video(), "timestep": d.full(500), "encoder_hidden_states": words, "fps": 16}


def _cosmos3(d: _Draw) -> Inputs:
    patch = d.config.latent_patch_size
    grid = (d.size[0], -(-d.size[1] // patch), -(-d.size[2] // patch))
    cells, words = math.prod(grid), torch.arange(d.text, device=d.device)
    where = torch.arange(cells, device=d.device) + d.text
    axes = [torch.arange(edge, device=d.device) for edge in grid]
    places = torch.cartesian_prod(*axes).T + torch.tensor([[d.text], [0], [0]], device=d.device)
    return {
        "input_ids": torch.zeros_like(words),
        "text_indexes": words,
        "position_ids": torch.cat([words.expand(3, -1), places], 1),
        "und_len": d.text,
        "sequence_length": d.text + cells,
        "vision_tokens": [d.normal(d.config.latent_channel, *d.size)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": where,
        "vision_mse_loss_indexes": where,
        "vision_timesteps": torch.full((cells,), 500.0, device=d.device),
        "vision_noisy_frame_indexes": [axes[0]],
    }


def _kandinsky6(d: _Draw) -> Inputs:
    channels = d.config.in_visual_dim * (2 if d.config.visual_cond else 1) + bool(d.config.visual_cond)
    return {
        "hidden_states": d.normal(*d.size, channels),
        "timestep": d.full(500),
        "encoder_hidden_states": d.words(d.config.in_text_dim),
        "pooled_projections": d.normal(d.config.in_text_dim2),
        "audio_hidden_states": d.normal(d.size[0] * 8, d.config.in_audio_dim),
    }


def _ltx2(d: _Draw) -> Inputs:
    sound = max(1, d.size[0] * 8)  # about its tokens
    return {
        **_ltx(d),
        "audio_hidden_states": d.normal(sound, d.config.audio_in_channels),
        "audio_encoder_hidden_states": d.words(d.config.caption_channels),
        "audio_num_frames": sound,
        "fps": 24.0,
    }


def _framepack(d: _Draw) -> Inputs:
    past = {"clean": 2, "history_2x": 2, "history_4x": 16}
    edges = d.size[1:]
    latents = {f"latents_{name}": d.normal(d.config.in_channels, count, *edges) for name, count in past.items()}
    places = {f"indices_latents_{name}": torch.arange(count, device=d.device).float() for name, count in past.items()}
    return {
        **_hunyuan(d),
        **latents,
        **places,
        "indices_latents": torch.arange(d.size[0], device=d.device).float(),
        "image_embeds": d.normal(729, d.config.image_proj_dim),  # patches that the image encoder sees
    }


def _minimax_h3(d: _Draw) -> Inputs:
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    frames = (d.size[0] - 2) // 5 * 17 + 5
    sound = round(frames / 24 * 40)  # of each of two channels
    tags = torch.full((d.text,), _H3_TEXT, device=d.device)
    made = (*d.size, sound, tuple(d.config.patch_size), 2, _H3_SOUND, _H3_VIDEO)
    places, tags, video, audio, text, *_ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(tags, *made)
    return {
        "hidden_states": d.normal(len(video), d.config.in_channels * math.prod(d.config.patch_size)),
        "audio_hidden_states": d.normal(len(audio), d.config.audio_in_channels),
        "encoder_hidden_states": d.words(d.config.text_dim),
        "timestep": d.full(0.5),
        "timestep_indices": torch.zeros(len(tags), dtype=torch.int64, device=d.device),
        "token_tags": tags,
        "position_ids": places,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


_INPUTS: dict[str, Callable[[_Draw], Inputs]] = {
    "BriaFibo2Transformer2DModel": _fibo2,
    "CogVideoXTransformer3DModel": _cogvideox,
    "Cosmos3OmniTransformer": _cosmos3,
    "CosmosTransformer3DModel": _cosmos,
    "Flux2Transformer2DModel": _flux2,
    "Flux3Transformer2DModel": _flux3,
    "FluxTransformer2DModel": _flux,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "HunyuanVideoFramepackTransformer3DModel": _framepack,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "Kandinsky6Transformer3DModel": _kandinsky6,
    "LTX2VideoTransformer3DModel": _ltx2,
    "LTXVideoTransformer3DModel": _ltx,
    "MiniMaxH3Transformer3DModel": _minimax_h3,
    "MochiTransformer3DModel": _mochi,
    "NucleusMoEImageTransformer2DModel": _nucleus,
    "OmniGenTransformer2DModel": _omnigen,
    "PRXTransformer2DModel": _prx,
    "QwenImage21Transformer2DModel": _qwen21,
    "QwenImageTransformer2DModel": _qwen,
    "SD3Transformer2DModel": _sd3,
    "SkyReelsV2Transformer3DModel": _wan,
    "WanTransformer3DModel": _wan,
    "ZImageTransformer2DModel": _z_image,
}


def inputs(model: ModelMixin, size: tuple[int, int, int], text: int) -> Inputs:
    """Random arguments of one forward pass of one sample, on the model's device.

    Args:
        model: one that `Architecture.build` has made.
        size: latent cells along frames, height and width.
        text: tokens of the prompt; all of them count, none is padding.
    """
    if spec_of(model).grid in PACKED and (size[1] % 2 or size[2] % 2):
        raise ConfigError(f"this model packs 2 x 2 latent cells; wanted an even height and width, got {size[1:]}")
    draw = _Draw(model.config, size, text, model.dtype, str(model.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _INPUTS[type(model).__name__](draw)
