"""SkyReels V2 with diffusion forcing, text to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import AutoencoderKLWan, SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A cat in sunglasses surfs a small wave.",
    model: str = "Skywork/SkyReels-V2-DF-14B-720P-Diffusers",
    sparsity: float = 0.8,
    height: int = 544,
    width: int = 960,
    frames: int = 97,
    steps: int = 50,
    out: str = "skyreels_v2.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(
        model, vae=vae, torch_dtype=torch.bfloat16 if cuda else torch.float32
    )
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=8.0)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(prompt=prompt, **size, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=24)


if __name__ == "__main__":
    typer.run(main)
