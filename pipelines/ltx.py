"""LTX-Video, text to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A fox trots across a snowy clearing at dusk.",
    model: str = "Lightricks/LTX-Video",
    sparsity: float = 0.8,
    height: int = 480,
    width: int = 704,
    frames: int = 161,
    steps: int = 50,
    out: str = "ltx.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = LTXPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        video = pipe(prompt, height=height, width=width, num_frames=frames, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=24)


if __name__ == "__main__":
    typer.run(main)
