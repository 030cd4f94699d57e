"""LTX-2, first and last frame to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import LTX2ConditionPipeline
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.utils import export_to_video, load_image

import diffsparse
from diffsparse import Digest


def main(
    first: str,
    last: str,
    prompt: str = "A small bird takes off from the ground.",
    model: str = "Lightricks/LTX-2",
    sparsity: float = 0.8,
    height: int = 512,
    width: int = 768,
    frames: int = 121,
    steps: int = 30,
    out: str = "ltx2_condition.mp4",
) -> None:
    cuda = torch.cuda.is_available()
    pipe = LTX2ConditionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    given = [LTX2VideoCondition(load_image(first), index=0), LTX2VideoCondition(load_image(last), index=-1)]
    size = {"height": height, "width": width, "num_frames": frames}
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        made = pipe(conditions=given, prompt=prompt, **size, num_inference_steps=steps)
    print(sparse.report())
    export_to_video(made.frames[0], out, fps=24)  # the sound is in made.audio


if __name__ == "__main__":
    typer.run(main)
