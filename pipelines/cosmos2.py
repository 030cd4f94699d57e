"""Cosmos 2, image to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import Cosmos2VideoToWorldPipeline
from diffusers.utils import export_to_video, load_image

import diffsparse
from diffsparse import Digest


def main(
    image: str,
    prompt: str = "The machine starts to move.",
    model: str = "nvidia/Cosmos-Predict2-2B-Video2World",
    sparsity: float = 0.8,
    height: int = 704,
    width: int = 1280,
    frames: int = 93,
    steps: int = 35,
    out: str = "cosmos2.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = Cosmos2VideoToWorldPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(image=load_image(image), prompt=prompt, **size, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=16)


if __name__ == "__main__":
    typer.run(main)
