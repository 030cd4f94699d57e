"""The transformers of known models as their authors published them, built with random weights: no download."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffsparse import wrappers
from diffsparse.errors import UnknownNameError
from diffsparse.seam.targets import attentions
from diffsparse_pipelines.drawn import Inputs
from diffsparse_pipelines.drawn import inputs as inputs
from diffsparse_pipelines.known import FAMILIES, suggested
from diffsparse_pipelines.preflight import Compression

if TYPE_CHECKING:
    from diffusers import ModelMixin

_COUNTS = ("num_layers", "num_single_layers", "n_layers", "depth", "num_hidden_layers", "num_visual_blocks")


@dataclass(frozen=True)
class Architecture:
    """A transformer without weights.

    Attributes:
        transformer: class of Diffusers.
        config: what differs from the defaults of that class, which for the newer ones are those of the released model.
        compression: of the VAE.
        text: tokens of a prompt, as long as the pipeline pads it, or as a long one where it doesn't.
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
        stored = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.data = buffer.data.to(dtype)  # as `from_pretrained` has it, and what follows
        kept = getattr(model, "_keep_in_fp32_modules", None) or ()
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
_WAN_5B = {
    **_WAN,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
    "in_channels": 48,
    "out_channels": 48,
}
_COSMOS = {"concat_padding_mask": False}  # one channel that costs next to nothing, and wants torchvision
_BY_8, _BY_8_AND_4, _BY_16_AND_4 = (
    Compression(time=1, space=8),
    Compression(time=4, space=8),
    Compression(time=4, space=16),
)

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
        _WAN_5B,
        _BY_16_AND_4,
        512,
    ),
    "wan2.2-lightning": Architecture("WanTransformer3DModel", _WAN, _BY_8_AND_4, 512, guided=False),
    "fastwan2.2-5b": Architecture("WanTransformer3DModel", _WAN_5B, _BY_16_AND_4, 512, guided=False),
    "skyreels-v2-df": Architecture("SkyReelsV2Transformer3DModel", _WAN, _BY_8_AND_4, 512),
    "minimax-h3": Architecture("MiniMaxH3Transformer3DModel", {}, Compression(4, 16, (17, 5)), 512, guided=False),
    "minimax-h3-turbo": Architecture("MiniMaxH3Transformer3DModel", {}, Compression(4, 16, (17, 5)), 512, guided=False),
    "framepack": Architecture(
        "HunyuanVideoFramepackTransformer3DModel",
        {"has_image_proj": True, "has_clean_x_embedder": True},
        _BY_8_AND_4,
        256,
        guided=False,
        masked=True,
    ),
    "ltx-condition": Architecture(
        "LTXVideoTransformer3DModel",
        {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 28},
        Compression(time=8, space=32),
        256,
    ),
    "ltx-distilled": Architecture(
        "LTXVideoTransformer3DModel",
        {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
        Compression(time=8, space=32),
        256,
        guided=False,
    ),
    "ltx2": Architecture("LTX2VideoTransformer3DModel", {}, Compression(time=8, space=32), 1024),
    "ltx2-distilled": Architecture(
        "LTX2VideoTransformer3DModel", {}, Compression(time=8, space=32), 1024, guided=False
    ),
    "cosmos1-7b": Architecture("CosmosTransformer3DModel", _COSMOS, Compression(time=8, space=8), 512),
    "cosmos2-2b": Architecture(
        "CosmosTransformer3DModel",
        {**_COSMOS, "in_channels": 17, "num_attention_heads": 16, "extra_pos_embed_type": None},
        _BY_8_AND_4,
        512,
    ),
    "cosmos2-2b-image": Architecture(
        "CosmosTransformer3DModel",
        {**_COSMOS, "num_attention_heads": 16, "extra_pos_embed_type": None},
        Compression(time=1, space=8),
        512,
    ),
    "cosmos2.5-2b": Architecture(
        "CosmosTransformer3DModel",
        {
            **_COSMOS,
            "in_channels": 17,
            "num_attention_heads": 16,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 100352,
        },
        _BY_8_AND_4,
        512,
    ),
    "cosmos3-nano": Architecture("Cosmos3OmniTransformer", {}, _BY_16_AND_4, 512),
    "kandinsky6-pro-distilled": Architecture("Kandinsky6Transformer3DModel", {}, _BY_8_AND_4, 1024, guided=False),
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
    "flux-schnell": Architecture(
        "FluxTransformer2DModel",
        {"num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38},
        _BY_8,
        256,
        guided=False,
    ),
    "flux2": Architecture("Flux2Transformer2DModel", {}, _BY_8, 512, guided=False),
    "flux2-klein-4b": Architecture(
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        _BY_8,
        512,
        guided=False,
    ),
    "flux2-klein-9b-kv": Architecture(
        "Flux2Transformer2DModel",
        {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
        _BY_8,
        512,
        guided=False,
    ),
    "flux3-klein": Architecture("Flux3Transformer2DModel", {}, _BY_8, 512, guided=False),
    "flux3-klein-base": Architecture("Flux3Transformer2DModel", {}, _BY_8, 512),
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
    "qwen-image-edit": Architecture("QwenImageTransformer2DModel", {}, _BY_8, 512, masked=True),
    "qwen-image-2.1": Architecture("QwenImage21Transformer2DModel", {}, Compression(1, 16), 512, guided=False),
    "z-image-turbo": Architecture("ZImageTransformer2DModel", {}, _BY_8, 512, guided=False),
    "hunyuan-image": Architecture(
        "HunyuanImageTransformer2DModel", {}, Compression(time=1, space=32), 1000, masked=True
    ),
    "hunyuan-image-distilled": Architecture(
        "HunyuanImageTransformer2DModel", {}, Compression(time=1, space=32), 1000, guided=False, masked=True
    ),
    "omnigen": Architecture(
        "OmniGenTransformer2DModel",
        {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},  # cost is the same for any
        _BY_8,
        128,
        masked=True,
    ),
    "bria-fibo2": Architecture("BriaFibo2Transformer2DModel", {}, _BY_8, 512),
    "prx": Architecture("PRXTransformer2DModel", {}, _BY_8, 256),
    "nucleus-moe": Architecture("NucleusMoEImageTransformer2DModel", {}, _BY_8, 512),
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
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name in FAMILIES:
        raise UnknownNameError(
            f"model {name!r} is known, but its architecture isn't listed, so it can't be built without its weights: "
            "generate and evaluate load them, or name one with yes in the column timed of diffsparse models"
        )
    raise UnknownNameError(f"no known model is called {name!r}; {suggested(name, ARCHITECTURES)}")


def heads_of(model: ModelMixin) -> int:
    """Heads of the queries of a transformer's first attention module that says how many."""
    return next(count for _, module in attentions(model) if (count := wrappers.heads_of(module)))


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
