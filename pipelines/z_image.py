"""Z-Image Turbo, text to image: plain Diffusers, and less sparsity for few steps."""

import torch
import typer
from diffusers import ZImagePipeline

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A lighthouse in a storm at night.",
    model: str = "Tongyi-MAI/Z-Image-Turbo",
    sparsity: float = 0.7,
    height: int = 1024,
    width: int = 1024,
    steps: int = 8,
    out: str = "z_image.png",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = ZImagePipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        made = pipe(prompt=prompt, height=height, width=width, num_inference_steps=steps, guidance_scale=0.0).images[0]
    print(sparse.report())
    made.save(out)


if __name__ == "__main__":
    typer.run(main)
