"""Kandinsky 6, text to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import Kandinsky6TI2VAPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A cat and a dog bake a cake.",
    model: str = "kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",
    sparsity: float = 0.8,
    height: int = 480,
    width: int = 864,
    frames: int = 121,
    steps: int = 16,
    out: str = "kandinsky6.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = Kandinsky6TI2VAPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(prompt=prompt, **size, num_inference_steps=steps, guidance_scale=1.0, sample_audio=False).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=24)


if __name__ == "__main__":
    typer.run(main)
