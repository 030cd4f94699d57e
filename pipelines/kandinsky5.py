"""Kandinsky 5, text to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import Kandinsky5T2VPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A cat watches rain through a window.",
    model: str = "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
    sparsity: float = 0.8,
    height: int = 512,
    width: int = 768,
    frames: int = 121,
    steps: int = 50,
    out: str = "kandinsky5.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = Kandinsky5T2VPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(prompt=prompt, **size, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=24)


if __name__ == "__main__":
    typer.run(main)
