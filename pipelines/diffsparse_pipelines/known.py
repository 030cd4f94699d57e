"""Known models as data: where they live on the hub, and the call arguments that their authors recommend.

Numbers are defaults of the pipelines and blocks of Diffusers, or those of the examples in its documentation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

if TYPE_CHECKING:
    from PIL.Image import Image

_MEANT = 4  # names that are suggested at most


class Call(TypedDict, total=False):
    """Arguments of a pipeline call, by the names that Diffusers has for them."""

    prompt: str
    negative_prompt: str
    image: Image
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float
    max_sequence_length: int
    sigmas: list[float]
    timesteps: list[float]
    decode_timestep: float
    decode_noise_scale: float
    image_cond_noise_scale: float
    guidance_rescale: float
    audio_guidance_scale: float


class Adapter(NamedTuple):
    """Weights of a LoRA.

    Attributes:
        hub: where they are.
        file: which of them.
        second: for the second expert.
    """

    hub: str
    file: str
    second: bool = False


@dataclass(frozen=True)
class Family:
    """A model that can be loaded by name.

    Attributes:
        hub: checkpoint for text input.
        defaults: call arguments.
        image_hub: checkpoint for image input.
        image_class: its pipeline class, if not the one that the checkpoint names.
        text_class: the same for text input.
        fps: frames in a second.
        dtype: number format of the weights on a GPU.
        output: what it makes.
        flow_shift: of the scheduler, where it depends on the size.
        float32_vae: keep the VAE in float32, as the model's authors do.
        token: frames, rows and columns of pixels that one token stands for.
        multiple: pixels of which height and width are multiples; 0 if that is the token's.
        chunk: frames that the VAE encodes at a time and the latents that it makes of them, if the first frame has none
            of its own; a last chunk of as many frames as latents makes 2.
        window: frames that the transformer sees at a time, in a run of their own; 0 for all.
        whole: the VAE also makes multiples of the token's frames, without a first frame of its own.
        revision: of the checkpoint.
        adapters: LoRAs that go on top.
        distilled: to few steps; see `families.few_steps`.
        modular: Diffusers has it as blocks alone.
        workflows: which of the blocks serve text, and an image.
        wants_image: it can't do without.
        dense: why nothing of it is sparse, in words.
        by_hand: what `generate` can't give it, in words.
        script: in the folder `pipelines`, shows it in Python.
    """

    hub: str
    defaults: Call = field(default_factory=Call)
    image_hub: str = ""
    image_class: str = ""
    text_class: str = ""
    fps: int = 16
    dtype: str = "bfloat16"
    output: Literal["video", "image"] = "video"
    flow_shift: float | None = None
    float32_vae: bool = False
    token: tuple[int, int, int] = (4, 16, 16)
    multiple: int = 0
    chunk: tuple[int, int] | None = None
    window: int = 0
    whole: bool = False
    revision: str = ""
    adapters: tuple[Adapter, ...] = ()
    distilled: bool = False
    modular: bool = False
    workflows: tuple[str, str] | None = None
    wants_image: bool = False
    dense: str = ""
    by_hand: str = ""
    script: str = ""

    def makes(self, frames: int) -> bool:
        """Whether the VAE makes exactly so many; to windows and chunks the pipelines round up by themselves."""
        step = self.token[0]
        if self.window or self.chunk:
            return True
        return frames % step == 1 % step or (self.whole and frames % step == 0)

    def windows(self, frames: int) -> tuple[int, int]:
        """Frames of a window, and how many there are."""
        return (self.window, -(-frames // self.window)) if self.window else (frames, 1)

    def frames_of_tokens(self, frames: int) -> int:
        """Tokens along the frames of a video."""
        if self.chunk is None:
            return -(-(frames - 1) // self.token[0]) + 1
        return chunked(frames, *self.chunk)


def chunked(frames: int, pixels: int, latents: int) -> int:
    """Latents of a video that is encoded in chunks; the number of frames is raised to the next that fits."""
    return -(-(frames - latents) // pixels) * latents + 2


def _call(height: int, width: int, frames: int | None, steps: int, guidance: float | None) -> Call:
    call = Call(height=height, width=width)
    if frames is not None:
        call["num_frames"] = frames
    call["num_inference_steps"] = steps
    if guidance is not None:
        call["guidance_scale"] = guidance
    return call


def _image(hub: str, call: Call, **more: Any) -> Family:
    return Family(hub, call, output="image", **{"token": (1, 16, 16), **more})


_LIGHTNING, _SEKO = "lightx2v/Wan2.2-Lightning", "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
_LTX2_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
_H3: dict[str, Any] = {
    "image_hub": "MiniMaxAI/MiniMax-H3",
    "fps": 24,
    "token": (4, 32, 32),
    "chunk": (17, 5),
    "modular": True,
    "workflows": ("t2va", "fl2va"),
}
_SQUARE = _call(1024, 1024, None, 50, None)

FAMILIES: dict[str, Family] = {
    "tiny": Family("", fps=8, dtype="float32", token=(1, 4, 4), multiple=16),
    "tiny-twin": Family("", fps=8, dtype="float32", token=(1, 4, 4), multiple=16),
    "wan2.1-1.3b": Family(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _call(480, 832, 81, 50, 5.0), flow_shift=3.0, fps=16, float32_vae=True
    ),
    "wan2.1-14b": Family(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        _call(720, 1280, 81, 50, 5.0),
        image_hub="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        flow_shift=5.0,
        fps=16,
        float32_vae=True,
    ),
    "wan2.2-a14b": Family(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        _call(720, 1280, 81, 40, 4.0),
        image_hub="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        fps=16,
        float32_vae=True,
    ),
    "wan2.2-5b": Family(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        _call(704, 1280, 121, 50, 5.0),
        image_hub="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        image_class="WanImageToVideoPipeline",
        fps=24,
        float32_vae=True,
        token=(4, 32, 32),
    ),
    "wan2.2-lightning": Family(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        _call(720, 1280, 81, 4, 1.0),
        float32_vae=True,
        adapters=(
            Adapter(_LIGHTNING, f"{_SEKO}/high_noise_model.safetensors"),
            Adapter(_LIGHTNING, f"{_SEKO}/low_noise_model.safetensors", second=True),
        ),
        distilled=True,
    ),
    "fastwan2.2-5b": Family(
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
        _call(704, 1280, 121, 3, 1.0),
        text_class="WanPipeline",
        fps=24,
        float32_vae=True,
        token=(4, 32, 32),
        distilled=True,
    ),
    "wan-animate-2": Family(
        "Wan-AI/Wan2.2-Animate-2-14B-Diffusers",
        _call(800, 640, 81, 40, None),
        fps=24,
        modular=True,
        dense="its attention is FlexAttention alone, but for the pass over the driving video",
        by_hand="a driving video beside the image",
        script="wan_animate2.py",
    ),
    "skyreels-v2-df": Family(
        "Skywork/SkyReels-V2-DF-14B-720P-Diffusers",
        _call(544, 960, 97, 50, 6.0),
        flow_shift=8.0,
        fps=24,
        float32_vae=True,
    ),
    "minimax-h3": Family("MiniMaxAI/MiniMax-H3", _call(768, 1344, 124, 50, None), **_H3),
    "minimax-h3-turbo": Family(
        "MiniMaxAI/MiniMax-H3",
        _call(768, 1344, 124, 9, None),  # points of the schedule: one more than passes
        adapters=(Adapter("lightx2v/Minimax-h3-Turbo", "minimax_h3_fl2v_turbo_8step_v1.0_comfyui_bf16.safetensors"),),
        distilled=True,
        **_H3,
    ),
    "hunyuan-video": Family(
        "hunyuanvideo-community/HunyuanVideo",
        _call(720, 1280, 129, 50, 6.0),
        image_hub="hunyuanvideo-community/HunyuanVideo-I2V",
        fps=24,
    ),
    "hunyuan-video-1.5": Family(
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
        _call(480, 832, 121, 50, None),
        image_hub="hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v",
        fps=24,
    ),
    "framepack": Family(
        "lllyasviel/FramePackI2V_HY",
        _call(720, 1280, 129, 50, 6.0),
        fps=30,
        window=33,
        by_hand="an image, and a transformer and an image encoder from checkpoints of their own",
        script="framepack.py",
    ),
    "cogvideox1.5-5b": Family(
        "THUDM/CogVideoX1.5-5B",
        _call(768, 1360, 81, 50, 6.0),
        image_hub="THUDM/CogVideoX1.5-5B-I2V",
        fps=16,
        token=(8, 16, 16),
        whole=True,
    ),
    "ltx-video": Family(
        "Lightricks/LTX-Video",
        _call(480, 704, 161, 50, 3.0),
        image_hub="Lightricks/LTX-Video",
        image_class="LTXImageToVideoPipeline",
        fps=24,
        token=(8, 32, 32),
    ),
    "ltx-condition": Family(
        "Lightricks/LTX-Video-0.9.5",
        _call(512, 704, 161, 50, 3.0),
        image_hub="Lightricks/LTX-Video-0.9.5",
        image_class="LTXConditionPipeline",
        text_class="LTXConditionPipeline",
        fps=24,
        token=(8, 32, 32),
    ),
    "ltx-distilled": Family(
        "Lightricks/LTX-Video-0.9.8-13B-distilled",
        {
            **_call(512, 768, 161, 8, 1.0),
            "timesteps": [1000, 993, 987, 981, 975, 909, 725, 0.03],
            "decode_timestep": 0.05,
            "decode_noise_scale": 0.025,
            "image_cond_noise_scale": 0.0,
            "guidance_rescale": 0.7,
        },
        image_hub="Lightricks/LTX-Video-0.9.8-13B-distilled",
        image_class="LTXConditionPipeline",
        text_class="LTXConditionPipeline",
        fps=24,
        token=(8, 32, 32),
        distilled=True,
    ),
    "ltx2": Family(
        "Lightricks/LTX-2",
        _call(512, 768, 121, 30, 3.0),
        image_hub="Lightricks/LTX-2",
        image_class="LTX2ImageToVideoPipeline",
        fps=24,
        token=(8, 32, 32),
        script="ltx2_condition.py",
    ),
    "ltx2-distilled": Family(
        "rootonchair/LTX-2-19b-distilled",
        {**_call(512, 768, 121, 8, 1.0), "sigmas": list(_LTX2_SIGMAS)},
        image_hub="rootonchair/LTX-2-19b-distilled",
        image_class="LTX2ImageToVideoPipeline",
        fps=24,
        token=(8, 32, 32),
        distilled=True,
    ),
    "ltx2.5": Family(
        "Lightricks/LTX-2.5-Diffusers",
        {**_call(512, 768, 121, 8, 1.0), "audio_guidance_scale": 1.0, "sigmas": list(_LTX2_SIGMAS)},
        fps=24,
        token=(8, 32, 32),
        distilled=True,
    ),
    "mochi": Family("genmo/mochi-1-preview", _call(480, 848, 85, 64, 4.5), fps=30, token=(6, 16, 16)),
    "cosmos1-7b": Family(
        "nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
        _call(704, 1280, 121, 36, 7.0),
        image_hub="nvidia/Cosmos-1.0-Diffusion-7B-Video2World",
        fps=30,
        token=(8, 16, 16),
    ),
    "cosmos2-2b": Family(
        "nvidia/Cosmos-Predict2-2B-Video2World",
        _call(704, 1280, 93, 35, 7.0),
        image_hub="nvidia/Cosmos-Predict2-2B-Video2World",
        wants_image=True,
    ),
    "cosmos2-2b-image": _image("nvidia/Cosmos-Predict2-2B-Text2Image", _call(768, 1360, None, 35, 7.0)),
    "cosmos2.5-2b": Family(
        "nvidia/Cosmos-Predict2.5-2B",
        _call(704, 1280, 93, 36, 7.0),
        image_hub="nvidia/Cosmos-Predict2.5-2B",
        revision="diffusers/base/post-trained",
    ),
    "cosmos3-nano": Family(
        "nvidia/Cosmos3-Nano",
        _call(720, 1280, 189, 35, 6.0),
        image_hub="nvidia/Cosmos3-Nano",
        fps=24,
        token=(4, 32, 32),
        multiple=16,
    ),
    "kandinsky5-lite": Family(
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers", _call(512, 768, 121, 50, 5.0), fps=24
    ),
    "kandinsky5-lite-distilled": Family(
        "kandinskylab/Kandinsky-5.0-T2V-Lite-distilled16steps-5s-Diffusers",
        _call(512, 768, 121, 16, 1.0),
        fps=24,
        distilled=True,
    ),
    "kandinsky6-pro-distilled": Family(
        "kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",
        _call(480, 864, 121, 16, 1.0),
        image_hub="kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",
        fps=24,
        distilled=True,
    ),
    "flux": Family("black-forest-labs/FLUX.1-dev", _call(1024, 1024, None, 28, 3.5), output="image", token=(1, 16, 16)),
    "flux-schnell": _image(
        "black-forest-labs/FLUX.1-schnell",
        {**_call(1024, 1024, None, 4, 0.0), "max_sequence_length": 256},
        distilled=True,
    ),
    "flux2": _image(
        "black-forest-labs/FLUX.2-dev",
        _call(1024, 1024, None, 50, 4.0),
        image_hub="black-forest-labs/FLUX.2-dev",
    ),
    "flux2-klein-4b": _image(
        "black-forest-labs/FLUX.2-klein-4B",
        _call(1024, 1024, None, 4, 1.0),
        image_hub="black-forest-labs/FLUX.2-klein-4B",
        distilled=True,
    ),
    "flux2-klein-9b-kv": _image(
        "black-forest-labs/FLUX.2-klein-9b-kv",
        _call(1024, 1024, None, 4, None),
        image_hub="black-forest-labs/FLUX.2-klein-9b-kv",
        image_class="Flux2KleinKVPipeline",
        text_class="Flux2KleinKVPipeline",
        distilled=True,
    ),
    "flux3-klein": _image(
        "black-forest-labs/flux-3-image-klein",
        _call(1024, 1024, None, 16, None),
        image_hub="black-forest-labs/flux-3-image-klein",
        modular=True,
        distilled=True,
    ),
    "flux3-klein-base": _image(
        "black-forest-labs/flux-3-image-klein-base",
        _SQUARE,
        image_hub="black-forest-labs/flux-3-image-klein-base",
        modular=True,
    ),
    "sd3.5": Family(
        "stabilityai/stable-diffusion-3.5-large", _call(1024, 1024, None, 28, 4.5), output="image", token=(1, 16, 16)
    ),
    "qwen-image": Family(
        "Qwen/Qwen-Image",
        {**_call(1024, 1024, None, 50, None), "true_cfg_scale": 4.0},
        output="image",
        token=(1, 16, 16),
    ),
    "qwen-image-edit": _image(
        "Qwen/Qwen-Image-Edit",
        {**_SQUARE, "true_cfg_scale": 4.0},
        image_hub="Qwen/Qwen-Image-Edit",
        wants_image=True,
    ),
    "qwen-image-2.1": _image(
        "Qwen/Qwen-Image-2.1",
        {**_call(1024, 1024, None, 40, None), "true_cfg_scale": 1.0},
        image_hub="Qwen/Qwen-Image-2.1",
        multiple=32,
    ),
    "z-image-turbo": _image("Tongyi-MAI/Z-Image-Turbo", _call(1024, 1024, None, 8, 0.0), distilled=True),
    "hunyuan-image": _image(
        "hunyuanvideo-community/HunyuanImage-2.1-Diffusers", _call(2048, 2048, None, 50, None), token=(1, 32, 32)
    ),
    "hunyuan-image-distilled": _image(
        "hunyuanvideo-community/HunyuanImage-2.1-Distilled-Diffusers",
        _call(2048, 2048, None, 8, None),
        token=(1, 32, 32),
        distilled=True,
    ),
    "omnigen": _image("Shitao/OmniGen-v1-diffusers", _call(1024, 1024, None, 50, 2.5)),
    "bria-fibo2": _image("briaai/Fibo-2.0-dev", _call(1024, 1024, None, 30, 5.0), image_hub="briaai/Fibo-2.0-dev"),
    "ideogram4": _image("ideogram-ai/ideogram-v4", _call(2048, 2048, None, 48, None)),
    "joyimage-edit-plus": _image(
        "jdopensource/JoyAI-Image-Edit-Plus-Diffusers",
        _call(1024, 1024, None, 30, 4.0),
        image_hub="jdopensource/JoyAI-Image-Edit-Plus-Diffusers",
        wants_image=True,
    ),
    "prx": _image("Photoroom/prx-512-t2i-sft", _call(512, 512, None, 28, 4.0)),
    "nucleus-moe": _image("NucleusAI/NucleusMoE-Image", _call(1024, 1024, None, 50, 4.0)),
}

# Known, and of no use here: name -> why.
LEFT_OUT: dict[str, str] = {
    "lumina-next": "each of its heads has a mask of its own, with which it stays dense",
    "dreamlite": "it is a UNet, whose self-attention sees 1024 tokens of an image of 1024 pixels squared",
}


def suggested(name: str, known: Iterable[str] = FAMILIES) -> str:
    """What a name that is not among the known ones may have been meant for, and the command that lists all."""
    names = list(known)
    alike = get_close_matches(name.lower(), names, n=_MEANT) + [one for one in names if name and name.lower() in one]
    meant = list(dict.fromkeys(alike))[:_MEANT]
    asked = f"did you mean {', '.join(meant)}? " if meant else ""
    return f"{asked}diffsparse models lists all"
