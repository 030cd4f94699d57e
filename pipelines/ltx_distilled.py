"""LTX-Video distilled, text to video: plain Diffusers, and less sparsity for few steps."""

import torch
import typer
from diffusers import LTXConditionPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest

LEVELS = [1000, 993, 987, 981, 975, 909, 725, 0.03]  # those that it was distilled to


def main(
    prompt: str = "A fox trots across a snowy clearing at dusk.",
    model: str = "Lightricks/LTX-Video-0.9.8-13B-distilled",
    sparsity: float = 0.7,
    height: int = 512,
    width: int = 768,
    frames: int = 161,
    out: str = "ltx_distilled.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = LTXConditionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    pipe.vae.enable_tiling()
    if cuda:
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        size = {"height": height, "width": width, "num_frames": frames}
        video = pipe(
            prompt=prompt, **size, timesteps=LEVELS, guidance_scale=1.0, decode_timestep=0.05, decode_noise_scale=0.025
        ).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=24)


if __name__ == "__main__":
    typer.run(main)
