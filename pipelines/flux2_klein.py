"""Flux 2 Klein, text to image: plain Diffusers, and less sparsity for few steps."""

import torch
import typer
from diffusers import Flux2KleinPipeline

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A heron stands in a misty marsh.",
    model: str = "black-forest-labs/FLUX.2-klein-4B",
    sparsity: float = 0.6,
    height: int = 1024,
    width: int = 1024,
    steps: int = 4,
    out: str = "flux2_klein.png",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = Flux2KleinPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        made = pipe(prompt=prompt, height=height, width=width, num_inference_steps=steps, guidance_scale=1.0).images[0]
    print(sparse.report())
    made.save(out)


if __name__ == "__main__":
    typer.run(main)
