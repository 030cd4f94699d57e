"""NucleusMoE, text to image: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import NucleusMoEImagePipeline

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A market street after rain.",
    model: str = "NucleusAI/NucleusMoE-Image",
    sparsity: float = 0.8,
    height: int = 1024,
    width: int = 1024,
    steps: int = 50,
    out: str = "nucleus_moe.png",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = NucleusMoEImagePipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        made = pipe(prompt=prompt, height=height, width=width, num_inference_steps=steps).images[0]
    print(sparse.report())
    made.save(out)


if __name__ == "__main__":
    typer.run(main)
