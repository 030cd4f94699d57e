"""Qwen-Image-Edit, an image edited by words: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import QwenImageEditPipeline
from diffusers.utils import load_image

import diffsparse
from diffsparse import Digest


def main(
    image: str,
    prompt: str = "The same scene at night.",
    model: str = "Qwen/Qwen-Image-Edit",
    sparsity: float = 0.8,
    steps: int = 50,
    out: str = "qwen_image_edit.png",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = QwenImageEditPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        made = pipe(image=load_image(image), prompt=prompt, num_inference_steps=steps, negative_prompt=" ").images[0]
    print(sparse.report())
    made.save(out)


if __name__ == "__main__":
    typer.run(main)
