"""Wan 2.2 Lightning, text to video: plain Diffusers, and less sparsity for few steps."""

import torch
import typer
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A red tram climbs a steep street.",
    model: str = "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    lora: str = "lightx2v/Wan2.2-Lightning",
    folder: str = "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1",
    sparsity: float = 0.6,
    height: int = 720,
    width: int = 1280,
    frames: int = 81,
    steps: int = 4,
    out: str = "wan_lightning.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(model, vae=vae, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    pipe.load_lora_weights(lora, weight_name=f"{folder}/high_noise_model.safetensors")
    pipe.load_lora_weights(lora, weight_name=f"{folder}/low_noise_model.safetensors", load_into_transformer_2=True)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(prompt=prompt, **size, num_inference_steps=steps, guidance_scale=1.0).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=16)


if __name__ == "__main__":
    typer.run(main)
