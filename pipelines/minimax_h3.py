"""MiniMax-H3, text to video and sound: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import ComponentsManager, ModularPipeline
from diffusers.utils import export_to_video

import diffsparse
from diffsparse import Digest


def main(
    prompt: str = "A red fox trots through a snowy pine forest, snow crunches under its feet.",
    model: str = "MiniMaxAI/MiniMax-H3",
    lora: str = "",  # "lightx2v/Minimax-h3-Turbo" wants 9 steps, and a sparsity of 0.7
    file: str = "minimax_h3_fl2v_turbo_8step_v1.0_comfyui_bf16.safetensors",
    sparsity: float = 0.8,
    height: int = 768,
    width: int = 1344,
    frames: int = 124,
    steps: int = 50,
    out: str = "minimax_h3.mp4",
) -> None:
    cuda, manager = torch.cuda.is_available(), ComponentsManager()
    pipe = ModularPipeline.from_pretrained(model, components_manager=manager, workflow="t2va")
    pipe.load_components(torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if lora:
        pipe.load_lora_weights(lora, weight_name=file)
    if cuda:
        manager.enable_auto_cpu_offload(device="cuda")
    size = {"height": height, "width": width, "num_frames": frames}
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        videos = pipe(prompt=prompt, **size, num_inference_steps=steps, output="videos")  # or "audio"
    print(sparse.report())
    export_to_video(videos[0], out, fps=24)


if __name__ == "__main__":
    typer.run(main)
