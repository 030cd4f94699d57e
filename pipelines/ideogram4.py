"""Ideogram 4, text to image: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import Ideogram4Pipeline

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A shop sign that says OPEN in brass letters.",
    model: str = "ideogram-ai/ideogram-v4",
    sparsity: float = 0.8,
    height: int = 2048,
    width: int = 2048,
    steps: int = 48,
    out: str = "ideogram4.png",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = Ideogram4Pipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        made = pipe(prompt=prompt, height=height, width=width, num_inference_steps=steps).images[0]
    print(sparse.report())
    made.save(out)


if __name__ == "__main__":
    typer.run(main)
