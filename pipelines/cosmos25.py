"""Cosmos 2.5, text to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import Cosmos2_5_PredictBasePipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A bus crosses a snowy street at night.",
    model: str = "nvidia/Cosmos-Predict2.5-2B",
    revision: str = "diffusers/base/post-trained",
    sparsity: float = 0.8,
    height: int = 704,
    width: int = 1280,
    frames: int = 93,
    steps: int = 36,
    out: str = "cosmos25.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = Cosmos2_5_PredictBasePipeline.from_pretrained(
        model, revision=revision, torch_dtype=torch.bfloat16 if cuda else torch.float32
    )
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(prompt=prompt, **size, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=16)


if __name__ == "__main__":
    typer.run(main)
