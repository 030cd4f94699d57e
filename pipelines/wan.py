"""Wan 2.1 and 2.2, text to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A red tram climbs a steep street between colourful houses.",
    model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    sparsity: float = 0.8,
    height: int = 480,
    width: int = 832,
    frames: int = 81,
    steps: int = 50,
    out: str = "wan.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(model, vae=vae, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        video = pipe(prompt, height=height, width=width, num_frames=frames, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=16)


if __name__ == "__main__":
    typer.run(main)
