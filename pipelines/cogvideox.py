"""CogVideoX 1.5, text to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A potter shapes a bowl on a turning wheel.",
    model: str = "THUDM/CogVideoX1.5-5B",
    sparsity: float = 0.8,
    height: int = 768,
    width: int = 1360,
    frames: int = 81,
    steps: int = 50,
    out: str = "cogvideox.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = CogVideoXPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    pipe.vae.enable_tiling()
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        video = pipe(prompt, height=height, width=width, num_frames=frames, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=16)


if __name__ == "__main__":
    typer.run(main)
