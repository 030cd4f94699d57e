"""LTX-Video, an image to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import LTXConditionPipeline
from diffusers.utils import export_to_video, load_image

import diffsparse
from diffsparse import Digest


def main(
    image: str,
    prompt: str = "The camera moves slowly forward.",
    model: str = "Lightricks/LTX-Video-0.9.5",
    sparsity: float = 0.8,
    height: int = 512,
    width: int = 704,
    frames: int = 161,
    steps: int = 50,
    out: str = "ltx_condition.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = LTXConditionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(image=load_image(image), prompt=prompt, **size, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=24)


if __name__ == "__main__":
    typer.run(main)
