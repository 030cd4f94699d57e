"""Mochi 1, text to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import MochiPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A jellyfish pulses upward through deep blue water.",
    model: str = "genmo/mochi-1-preview",
    sparsity: float = 0.8,
    height: int = 480,
    width: int = 848,
    frames: int = 85,
    steps: int = 64,
    out: str = "mochi.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = MochiPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    pipe.vae.enable_tiling()
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        video = pipe(prompt, height=height, width=width, num_frames=frames, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=30)


if __name__ == "__main__":
    typer.run(main)
