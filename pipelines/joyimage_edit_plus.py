"""JoyImageEdit Plus, images edited by words: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import JoyImageEditPlusPipeline
from diffusers.utils import load_image

import diffsparse
from diffsparse import Digest


def main(
    image: str,
    prompt: str = "The same scene in autumn.",
    model: str = "jdopensource/JoyAI-Image-Edit-Plus-Diffusers",
    sparsity: float = 0.8,
    height: int = 1024,
    width: int = 1024,
    steps: int = 30,
    out: str = "joyimage_edit_plus.png",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = JoyImageEditPlusPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        made = pipe(
            images=[load_image(image)], prompt=prompt, height=height, width=width, num_inference_steps=steps
        ).images[0]
    print(sparse.report())
    made.save(out)


if __name__ == "__main__":
    typer.run(main)
