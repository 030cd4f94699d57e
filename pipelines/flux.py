"""Flux, text to image: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import FluxPipeline

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A hummingbird hovers in front of a red flower.",
    model: str = "black-forest-labs/FLUX.1-dev",
    sparsity: float = 0.8,
    height: int = 1024,
    width: int = 1024,
    steps: int = 28,
    out: str = "flux.png",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = FluxPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        image = pipe(prompt, height=height, width=width, num_inference_steps=steps).images[0]
    print(sparse.report())
    image.save(out)


if __name__ == "__main__":
    typer.run(main)
