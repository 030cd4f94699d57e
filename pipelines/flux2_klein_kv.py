"""Flux 2 Klein with kept keys, an image edited by words: plain Diffusers, and less sparsity for few steps."""

import torch
import typer
from diffusers import Flux2KleinKVPipeline
from diffusers.utils import load_image

import diffsparse
from diffsparse import Digest


def main(
    image: str,
    prompt: str = "The same scene in deep snow.",
    model: str = "black-forest-labs/FLUX.2-klein-9b-kv",
    sparsity: float = 0.6,
    height: int = 1024,
    width: int = 1024,
    steps: int = 4,
    out: str = "flux2_klein_kv.png",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = Flux2KleinKVPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        made = pipe(
            image=load_image(image), prompt=prompt, height=height, width=width, num_inference_steps=steps
        ).images[0]
    print(sparse.report())
    made.save(out)


if __name__ == "__main__":
    typer.run(main)
