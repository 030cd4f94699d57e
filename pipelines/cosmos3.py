"""Cosmos 3, text to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A robot arm folds a towel.",
    model: str = "nvidia/Cosmos3-Nano",
    sparsity: float = 0.8,
    height: int = 720,
    width: int = 1280,
    frames: int = 189,
    steps: int = 35,
    out: str = "cosmos3.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = Cosmos3OmniPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    config = {**pipe.scheduler.config, "flow_shift": 10.0, "use_karras_sigmas": False}
    pipe.scheduler = UniPCMultistepScheduler.from_config(config)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(prompt=prompt, **size, num_inference_steps=steps).video
    print(sparse.report())
    export_to_video(video, out, fps=24)


if __name__ == "__main__":
    typer.run(main)
