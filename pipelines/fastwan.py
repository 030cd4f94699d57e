"""FastWan 2.2, text to video: plain Diffusers, and less sparsity for few steps."""

import torch
import typer
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A red tram climbs a steep street.",
    model: str = "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
    sparsity: float = 0.6,
    height: int = 704,
    width: int = 1280,
    frames: int = 121,
    steps: int = 3,
    out: str = "fastwan.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(model, vae=vae, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(prompt=prompt, **size, num_inference_steps=steps, guidance_scale=1.0).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=24)


if __name__ == "__main__":
    typer.run(main)
