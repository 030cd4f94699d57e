"""Wan-Animate 2, a character moved by a video: plain Diffusers; most of it stays dense, and the report says why."""

import torch
import typer
from diffusers import ComponentsManager, ModularPipeline
from diffusers.utils import export_to_video, load_image, load_video

import diffsparse
from diffsparse import Digest


def main(
    image: str,
    driving_video: str,
    prompt: str = "A silver tabby kitten in a dark blue uniform, on a plain white background.",
    model: str = "Wan-AI/Wan2.2-Animate-2-14B-Diffusers",
    sparsity: float = 0.8,
    height: int = 800,
    width: int = 640,
    frames: int = 81,
    steps: int = 40,
    out: str = "wan_animate2.mp4",
) -> None:
    cuda, manager = torch.cuda.is_available(), ComponentsManager()
    pipe = ModularPipeline.from_pretrained(model, components_manager=manager)
    pipe.load_components(torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        manager.enable_auto_cpu_offload(device="cuda")
    moves, fps = load_video(driving_video, return_fps=True)
    given = {"image": load_image(image), "driving_video": moves, "driving_video_fps": fps, "prompt": prompt}
    size = {"height": height, "width": width, "segment_frame_length": frames}
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        videos = pipe(**given, **size, num_inference_steps=steps, output="videos")
    print(sparse.report())
    export_to_video(videos[0], out, fps=24)


if __name__ == "__main__":
    typer.run(main)
