"""FramePack, image to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import HunyuanVideoFramepackPipeline as Pipeline
from diffusers import HunyuanVideoFramepackTransformer3DModel as Transformer
from diffusers.utils import export_to_video, load_image
from transformers import SiglipImageProcessor, SiglipVisionModel

import diffsparse
from diffsparse import Digest


def main(
    image: str,
    prompt: str = "A penguin dances in the snow.",
    model: str = "hunyuanvideo-community/HunyuanVideo",
    framepack: str = "lllyasviel/FramePackI2V_HY",
    eye: str = "lllyasviel/flux_redux_bfl",
    sparsity: float = 0.8,
    frames: int = 129,
    steps: int = 50,
    out: str = "framepack.mp4",
) -> None:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    seen = {"image_encoder": SiglipVisionModel.from_pretrained(eye, subfolder="image_encoder", dtype=dtype)}
    seen["feature_extractor"] = SiglipImageProcessor.from_pretrained(eye, subfolder="feature_extractor")
    transformer = Transformer.from_pretrained(framepack, torch_dtype=dtype)
    pipe = Pipeline.from_pretrained(model, transformer=transformer, **seen, torch_dtype=dtype)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    with diffsparse.apply(pipe, Digest(sparsity=sparsity)) as sparse:
        video = pipe(load_image(image), prompt=prompt, num_frames=frames, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=30)


if __name__ == "__main__":
    typer.run(main)
