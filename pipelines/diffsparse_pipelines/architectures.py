"""The transformers of known models as their authors published them, built with random weights: no download."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffsparse.errors import ConfigError, UnknownNameError, closest
from diffsparse.seam.models import packed_grid, spec_of
from diffsparse_pipelines.preflight import Compression

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from diffusers.configuration_utils import FrozenDict

Inputs = dict[str, object]
_COUNTS = ("num_layers", "num_single_layers")


@dataclass(frozen=True)
class Architecture:
    """A transformer without weights.

    transformer: class of Diffusers.
    config: what differs from the defaults of that class.
    compression: of the VAE.
    text: tokens of a padded prompt.
    guided: two passes a step, with and without the prompt.
    masked: a key mask hides the padding of the prompt in self-attention.
    """

    transformer: str
    config: Mapping[str, object]
    compression: Compression
    text: int
    guided: bool = True
    masked: bool = False

    def build(self, layers: int | None = None, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
        """The model in evaluation mode, its weights drawn as for training; `layers` cuts each kind of block to so many.

        On the device "meta" it has shapes only. The global random state is left as it was on the CPU.
        """
        import diffusers

        cls: type[ModelMixin] = getattr(diffusers, self.transformer)
        with torch.random.fork_rng(devices=[]), _default(dtype), torch.device(device):
            torch.manual_seed(0)
            model: nn.Module = cls(**self.cut(layers)).eval().requires_grad_(False)
        kept = getattr(model, "_keep_in_fp32_modules", None) or ()  # as `from_pretrained` has it
        for name, parameter in model.named_parameters():
            if any(part in name.split(".") for part in kept):
                parameter.data = parameter.data.float()
        return model

    def cut(self, layers: int | None) -> Mapping[str, object]:
        """The configuration with at most `layers` blocks of each kind."""
        if layers is None:
            return self.config
        whole: ModelMixin = self.build(device="meta")
        return {**self.config, **{name: min(layers, whole.config[name]) for name in _COUNTS if name in whole.config}}


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_WAN = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
_BY_8_AND_4 = Compression(time=4, space=8)

ARCHITECTURES: dict[str, Architecture] = {
    "wan2.1-1.3b": Architecture(
        "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        _BY_8_AND_4,
        512,
    ),
    "wan2.1-14b": Architecture("WanTransformer3DModel", _WAN, _BY_8_AND_4, 512),
    "wan2.2-a14b": Architecture("WanTransformer3DModel", _WAN, _BY_8_AND_4, 512),  # each of its two experts
    "wan2.2-5b": Architecture(
        "WanTransformer3DModel",
        {
            **_WAN,
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        Compression(time=4, space=16),
        512,
    ),
    "hunyuan-video": Architecture(
        "HunyuanVideoTransformer3DModel",
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40},
        _BY_8_AND_4,
        256,
        guided=False,
        masked=True,
    ),
    "cogvideox1.5-5b": Architecture(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "num_layers": 42,
            "patch_size_t": 2,
            "patch_bias": False,
            "use_rotary_positional_embeddings": True,
        },
        _BY_8_AND_4,
        226,
    ),
    "ltx-video": Architecture(
        "LTXVideoTransformer3DModel",
        {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 28},
        Compression(time=8, space=32),
        128,
    ),
    "mochi": Architecture(
        "MochiTransformer3DModel",
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 48},
        Compression(time=6, space=8),
        256,
    ),
    "flux": Architecture(
        "FluxTransformer2DModel",
        {"num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
        Compression(time=1, space=8),
        512,
        guided=False,
    ),
    "sd3.5": Architecture(
        "SD3Transformer2DModel",
        {
            "num_attention_heads": 38,
            "num_layers": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        Compression(time=1, space=8),
        77 + 256,
    ),
    "qwen-image": Architecture(
        "QwenImageTransformer2DModel",
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 60},
        Compression(time=1, space=8),
        512,
        masked=True,
    ),
}


def architecture(name: str) -> Architecture:
    """The architecture of a known model; of an embedded one, from its own files.

    Raises:
        UnknownNameError: no such model, or one whose architecture is not listed.
    """
    if name in ("tiny", "tiny-twin"):
        from diffsparse_pipelines import tiny
        from diffsparse_pipelines.tiny.variants import TEXT_LENGTH, VAE_PATCH

        file = tiny.folder("twin" if name == "tiny-twin" else "default") / "transformer" / "config.json"
        config = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("_")}
        return Architecture("WanTransformer3DModel", config, Compression(1, VAE_PATCH), TEXT_LENGTH, guided=False)
    if name not in ARCHITECTURES:
        raise UnknownNameError(f"no architecture is listed for model {name!r}; known: {closest(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]


# --- inputs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draw:
    """Random inputs for one model.

    config: of the model.
    size: the latent's frames, height and width.
    text: the prompt's tokens.
    dtype, device: of the inputs.
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


_INPUTS: dict[str, Callable[[_Draw], Inputs]] = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "FluxTransformer2DModel": _flux,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "LTXVideoTransformer3DModel": _ltx,
    "MochiTransformer3DModel": _mochi,
    "QwenImageTransformer2DModel": _qwen,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
}


def inputs(model: ModelMixin, size: tuple[int, int, int], text: int) -> Inputs:
    """Random arguments of one forward pass of one sample, on the model's device.

    Args:
        model: one that `Architecture.build` has made.
        size: latent cells along frames, height and width.
        text: tokens of the prompt; all of them count, none is padding.
    """
    if spec_of(model).grid is packed_grid and (size[1] % 2 or size[2] % 2):
        raise ConfigError(f"this model packs 2 x 2 latent cells; wanted an even height and width, got {size[1:]}")
    draw = _Draw(model.config, size, text, model.dtype, str(model.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _INPUTS[type(model).__name__](draw)


class MinimalPipeline:
    """What `apply` needs of a pipeline: a transformer, and a scheduler that can be set to any step."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.components = {"transformer": model}
        self.transformer = model
        self.scheduler = SimpleNamespace(timesteps=torch.arange(steps), step_index=0)

    def begin(self) -> None:
        """Start another run, for which strategies keep nothing of the one before."""
        self.scheduler.timesteps = self.scheduler.timesteps.clone()

    @torch.inference_mode()
    def step(self, number: int, arguments: Inputs) -> None:
        """One forward pass at step `number`."""
        self.scheduler.step_index = number
        self.transformer(**arguments, return_dict=False)
