"""FramePack, image to video: plain Diffusers, and the three lines that make it sparse."""

import torch
import typer
from diffusers import HunyuanVideoFramepackPipeline as Pipeline
from diffusers import HunyuanVideoFramepackTransformer3DModel as Transformer
from diffusers.utils import export_to_video, load_image
from transformers import SiglipImageProcessor, SiglipVisionModel

import diffsparse
from diffsparse import AdaSpa


def main(
    image: str,
    prompt: str = "A penguin dances in the snow.",
    model: str = "hunyuanvideo-community/HunyuanVideo",
    framepack: str = "lllyasviel/FramePackI2V_HY",
    eye: str = "lllyasviel/flux_redux_bfl",
    sparsity: float = 0.8,
    height: int = 720,
    width: int = 1280,
    frames: int = 129,
    steps: int = 50,
    out: str = "framepack.mp4",
) -> None:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    parts = {"transformer": Transformer.from_pretrained(framepack, torch_dtype=dtype)}
    parts["image_encoder"] = SiglipVisionModel.from_pretrained(eye, subfolder="image_encoder", dtype=dtype)
    parts["feature_extractor"] = SiglipImageProcessor.from_pretrained(eye, subfolder="feature_extractor")
    pipe = Pipeline.from_pretrained(model, **parts, torch_dtype=dtype)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    size = {"height": height, "width": width, "num_frames": frames}
    with diffsparse.apply(pipe, AdaSpa(sparsity=sparsity)) as sparse:
        video = pipe(load_image(image), prompt=prompt, **size, num_inference_steps=steps).frames[0]
    print(sparse.report())
    export_to_video(video, out, fps=30)


if __name__ == "__main__":
    typer.run(main)
