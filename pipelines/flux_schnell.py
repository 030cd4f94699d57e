"""Flux schnell, text to image: plain Diffusers, and less sparsity for few steps."""

import torch
import typer
from diffusers import FluxPipeline

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A hummingbird hovers in front of a red flower.",
    model: str = "black-forest-labs/FLUX.1-schnell",
    sparsity: float = 0.6,
    height: int = 1024,
    width: int = 1024,
    steps: int = 4,
    out: str = "flux_schnell.png",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = FluxPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        made = pipe(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=0.0,
            max_sequence_length=256,
        ).images[0]
    print(sparse.report())
    made.save(out)


if __name__ == "__main__":
    typer.run(main)
