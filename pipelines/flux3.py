"""Flux 3 Klein, text to image: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import ComponentsManager, ModularPipeline

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A hummingbird hovers in front of a red flower.",
    model: str = "black-forest-labs/flux-3-image-klein",
    sparsity: float = 0.8,
    height: int = 1024,
    width: int = 1024,
    steps: int = 16,
    out: str = "flux3.png",
) -> None:
    cuda, manager = torch.cuda.is_available(), ComponentsManager()
    pipe = ModularPipeline.from_pretrained(model, components_manager=manager)
    pipe.load_components(torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        manager.enable_auto_cpu_offload(device="cuda")
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        images = pipe(prompt=prompt, height=height, width=width, num_inference_steps=steps, output="images")
    print(sparse.report())
    images[0].save(out)


if __name__ == "__main__":
    typer.run(main)
