"""What is known of models agrees with the pipelines of Diffusers; distilled ones are less sparse; refusals are told."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from PIL import Image

import diffsparse
from diffsparse import Digest
from diffsparse.cli import main
from diffsparse.errors import ConfigError, InputFileError
from diffsparse_pipelines import families, preflight
from diffsparse_pipelines.commands import models
from diffsparse_pipelines.families import FAMILIES
from diffsparse_pipelines.generation import call_arguments, generation, parameters
from diffsparse_pipelines.known import LEFT_OUT
from support import walk
from support.recipes import transformer
from support.tiny_transformers import CASES

# class, or blocks, and which defaults are not its own: those of examples in the documentation of Diffusers
PIPELINES: dict[str, tuple[str, set[str]]] = {
    "wan2.2-lightning": ("WanPipeline", {"height", "width", "num_inference_steps", "guidance_scale"}),
    "fastwan2.2-5b": ("WanPipeline", {"height", "width", "num_frames", "num_inference_steps", "guidance_scale"}),
    "wan-animate-2": ("WanAnimate2Blocks", {"num_frames"}),
    "skyreels-v2-df": ("SkyReelsV2DiffusionForcingPipeline", set()),
    "minimax-h3": ("MiniMaxH3Blocks", set()),
    "minimax-h3-turbo": ("MiniMaxH3Blocks", {"num_inference_steps"}),
    "framepack": ("HunyuanVideoFramepackPipeline", set()),
    "ltx-condition": ("LTXConditionPipeline", set()),
    "ltx-distilled": (
        "LTXConditionPipeline",
        {
            *("width", "num_inference_steps", "guidance_scale", "decode_timestep"),
            *("image_cond_noise_scale", "guidance_rescale"),
        },
    ),
    "ltx2": ("LTX2Pipeline", set()),
    "ltx2-distilled": ("LTX2Pipeline", {"num_inference_steps", "guidance_scale"}),
    "ltx2.5": ("LTX2Pipeline", {"num_inference_steps", "guidance_scale", "audio_guidance_scale"}),
    "cosmos1-7b": ("CosmosTextToWorldPipeline", set()),
    "cosmos2-2b": ("Cosmos2VideoToWorldPipeline", set()),
    "cosmos2-2b-image": ("Cosmos2TextToImagePipeline", set()),
    "cosmos2.5-2b": ("Cosmos2_5_PredictBasePipeline", set()),
    "cosmos3-nano": ("Cosmos3OmniPipeline", set()),
    "kandinsky5-lite": ("Kandinsky5T2VPipeline", set()),
    "kandinsky5-lite-distilled": ("Kandinsky5T2VPipeline", {"num_inference_steps", "guidance_scale"}),
    "kandinsky6-pro-distilled": (
        "Kandinsky6TI2VAPipeline",
        {"height", "width", "num_inference_steps", "guidance_scale"},
    ),
    "flux-schnell": ("FluxPipeline", {"num_inference_steps", "guidance_scale", "max_sequence_length"}),
    "flux2": ("Flux2Pipeline", set()),
    "flux2-klein-4b": ("Flux2KleinPipeline", {"num_inference_steps", "guidance_scale"}),
    "flux2-klein-9b-kv": ("Flux2KleinKVPipeline", set()),
    "flux3-klein": ("Flux3DistilledAutoBlocks", set()),
    "flux3-klein-base": ("Flux3AutoBlocks", set()),
    "qwen-image-edit": ("QwenImageEditPipeline", set()),
    "qwen-image-2.1": ("QwenImage21Pipeline", set()),
    "z-image-turbo": ("ZImagePipeline", {"num_inference_steps", "guidance_scale"}),
    "hunyuan-image": ("HunyuanImagePipeline", set()),
    "hunyuan-image-distilled": ("HunyuanImagePipeline", {"num_inference_steps"}),
    "omnigen": ("OmniGenPipeline", set()),
    "bria-fibo2": ("BriaFibo2Pipeline", set()),
    "ideogram4": ("Ideogram4Pipeline", set()),
    "joyimage-edit-plus": ("JoyImageEditPlusPipeline", set()),
    "prx": ("PRXPipeline", set()),
    "nucleus-moe": ("NucleusMoEImagePipeline", set()),
}


def defaults_of(name: str) -> dict[str, Any]:
    cls = getattr(diffusers, name)
    if issubclass(cls, ModularPipelineBlocks):
        return {each.name: each.default for each in cls().inputs}
    return {key: each.default for key, each in inspect.signature(cls.__call__).parameters.items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_defaults_are_those_of_the_pipeline(name: str) -> None:
    """Sizes that are None there follow from the checkpoint."""
    pipeline, own = PIPELINES[name]
    if not hasattr(diffusers, pipeline):
        pytest.skip(f"Diffusers {diffusers.__version__} has no {pipeline}")
    theirs, ours = defaults_of(pipeline), dict(FAMILIES[name].defaults)
    differ = {key for key in ours if theirs.get(key) is not None and theirs[key] != ours[key]}
    given = {key for key in own if key in theirs}
    assert differ == given
    known = set(theirs) | {"num_frames"}
    assert set(ours) <= known
    if FAMILIES[name].image_hub == FAMILIES[name].hub and not FAMILIES[name].image_class:
        assert {"image", "images"} & set(theirs)


def test_all_models_but_the_first_ones_are_held_against_their_pipelines() -> None:
    first = {"wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b", "wan2.2-5b", "hunyuan-video", "hunyuan-video-1.5"}
    first |= {"cogvideox1.5-5b", "ltx-video", "mochi", "flux", "sd3.5", "qwen-image", "tiny", "tiny-twin"}
    assert set(FAMILIES) == first | set(PIPELINES)
    for family in FAMILIES.values():
        for cls in (family.image_class, family.text_class):
            assert not cls or hasattr(diffusers, cls) or cls in {pipeline for pipeline, _ in PIPELINES.values()}


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("minimax-h3", {}, (37, 24, 42)),
        ("minimax-h3", {"num_frames": 125}, (42, 24, 42)),
        ("wan2.2-lightning", {}, (21, 45, 80)),
        ("cosmos1-7b", {}, (16, 44, 80)),
        ("cosmos3-nano", {}, (48, 23, 40)),
        ("ltx2", {}, (16, 16, 24)),
        ("hunyuan-image", {}, (1, 64, 64)),
        ("z-image-turbo", {"height": 512}, (1, 32, 64)),
        ("prx", {}, (1, 32, 32)),
        ("skyreels-v2-df", {}, (25, 34, 60)),
    ],
)
def test_grids(name: str, size: Any, grid: tuple[int, int, int]) -> None:
    assert families.grid(name, size) == grid


@pytest.mark.parametrize(
    ("name", "frames", "near"),
    [
        ("wan2.1-1.3b", 80, 81),
        ("hunyuan-video", 130, 129),
        ("ltx-video", 160, 161),
        ("ltx2", 124, 121),
        ("mochi", 84, 85),
        ("cosmos1-7b", 120, 121),
        ("cogvideox1.5-5b", 84, 81),
        ("skyreels-v2-df", 2, 1),
    ],
)
def test_frames_that_the_vae_cannot_make_are_refused(name: str, frames: int, near: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"--frames of '{name}' wants a multiple of .* one more, such as {near}; got"
    ):
        families.check_size(name, {"num_frames": frames})
    families.check_size(name, {"num_frames": near})


def test_frames_that_pipelines_take_are_taken() -> None:
    """Their defaults, one frame, windows and chunks of any number; CogVideoX also makes whole multiples."""
    for name, family in FAMILIES.items():
        if family.output == "video":
            families.check_size(name, {"num_frames": families.defaults(name)["num_frames"]})
            families.check_size(name, {"num_frames": 1})
    for name, frames in (("cogvideox1.5-5b", 80), ("framepack", 130), ("minimax-h3", 125), ("tiny", 6)):
        families.check_size(name, {"num_frames": frames})


def test_counts_of_frames_are_those_of_the_vae_of_cogvideox() -> None:
    """Latents in pairs, as CogVideoX 1.5 pads them: what is left of them is of no other count."""
    widths = (8, 8, 8, 8)
    vae: Any = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=widths, latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    with torch.no_grad():
        made = {vae.decode(torch.randn(1, 4, cells, 2, 2)).sample.shape[2] for cells in (1, 2, 3, 4, 5)}
    family = FAMILIES["cogvideox1.5-5b"]
    assert made == {frames for frames in range(1, 18) if family.makes(frames)}


# --- few steps ------------------------------------------------------------------------------------------------------


def test_distilled_models_are_less_sparse_in_few_steps() -> None:
    assert families.few_steps("flux-schnell", 4) == (1, 0.6)
    assert families.few_steps("fastwan2.2-5b", 3) == (1, 0.6)
    assert families.few_steps("z-image-turbo", 8) == (2, 0.7)
    assert families.few_steps("flux3-klein", 16) is None
    assert families.few_steps("flux-schnell", None) is None
    assert families.few_steps("flux", 4) is None
    assert families.few_steps("somebody/model", 4) is None


def distil(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded twin counts as distilled."""
    monkeypatch.setitem(families.FAMILIES, "tiny-twin", replace(FAMILIES["tiny-twin"], distilled=True))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "Digest(sparsity=0.7,"),
        (["--strategy", "tangent"], "Tangent(sparsity=0.7,"),
        (["--sparsity", "0.5"], "Digest(sparsity=0.5,"),
        (["--speed", "fast"], "taylor-seer:interval=4:order=1:warm_up=0.33/Tangent(sparsity=0.7,"),
        (["--steps", "4"], "Digest(sparsity=0.6,"),
        (["--steps", "10"], "Digest(sparsity=0.8,"),
    ],
)
def test_generate_takes_it_unless_told(
    more: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distil(monkeypatch)
    asked = [] if "--steps" in more else ["--steps", "8"]
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "tiny-twin", *asked, *more, "--block", "16", "--out", str(tmp_path / "a.gif")])
    assert not ended.value.code
    assert f"\n{told}" in capsys.readouterr().out


def test_dense_has_no_sparsity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distil(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "generate",
                "--model",
                "tiny-twin",
                "--steps",
                "4",
                "--strategy",
                "dense",
                "--out",
                str(tmp_path / "a.gif"),
            ]
        )
    assert not ended.value.code


# --- listing and refusals -------------------------------------------------------------------------------------------


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["models", "--json"])
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert set(rows) == set(FAMILIES)
    turbo = rows["z-image-turbo"]
    assert (turbo["steps"], turbo["dense_first"], turbo["sparsity"], turbo["size"]) == (8, 2, 0.7, "1024x1024")
    assert rows["wan2.2-lightning"]["adapters"][1].endswith("low_noise_model.safetensors")
    assert "pipelines/wan_animate2.py" in rows["wan-animate-2"]["by_hand"]
    assert (rows["qwen-image-edit"]["image"], turbo["architecture"]) == ("required", True)
    assert not rows["hunyuan-video-1.5"]["architecture"]
    with pytest.raises(SystemExit) as ended:
        main(["models", "--model", "ltx2"])
    assert not ended.value.code
    assert "Lightricks/LTX-2" in capsys.readouterr().out.replace("\n", "")


def test_what_stays_dense_has_no_sparsity(capsys: pytest.CaptureFixture[str]) -> None:
    dense = [name for name, family in FAMILIES.items() if family.hub and transformer(name) in walk.EXCEPTIONS]
    assert dense == [name for name, family in FAMILIES.items() if family.dense] == ["wan-animate-2"]
    row = models.row("wan-animate-2")
    assert (row["sparsity"], row["dense_first"]) == (None, None)
    with pytest.raises(SystemExit):
        main(["models", "--model", "wan-animate-2"])
    printed = capsys.readouterr().out
    assert "stays dense" in printed
    assert "only by its script" in printed


def test_the_table_says_whose_times_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["models"])
    lines = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["model"] == "timed"
    assert (lines["hunyuan-video"], lines["hunyuan-video-1.5"]) == ("yes", "no")
    assert set(FAMILIES) <= set(lines), "a name is broken"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wan-animate-2", "a driving video beside the image, which no option gives: pipelines/wan_animate2.py"),
        ("qwen-image-edit", "wants an input image: generate --image FILE"),
        ("dreamlite", "is left out: it is a UNet"),
    ],
)
def test_what_cannot_be_generated_is_told_before_anything_is_loaded(
    name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", name, "--prompt", "x"])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    with pytest.raises(ConfigError):
        families.load(name)


def test_scripts_that_are_named_are_there() -> None:
    folder = Path(__file__).parents[2] / "pipelines"
    assert all((folder / family.script).is_file() for family in FAMILIES.values() if family.script)
    assert not set(LEFT_OUT) & set(FAMILIES)
    assert all(family.script for family in FAMILIES.values() if family.by_hand)


# --- loading and calling --------------------------------------------------------------------------------------------


class Loaded:
    """What a checkpoint was loaded with."""

    def __init__(self, *named: object, **options: object) -> None:
        self.named, self.options, self.adapters = named, options, list[tuple[str, dict[str, object]]]()

    def load_lora_weights(self, hub: str, **options: object) -> None:
        self.adapters.append((hub, options))

    def to(self, device: str) -> None:
        self.device = device


@pytest.mark.parametrize(
    ("name", "image", "cls", "options"),
    [
        ("cosmos2.5-2b", False, "DiffusionPipeline", {"revision": "diffusers/base/post-trained"}),
        ("fastwan2.2-5b", False, "WanPipeline", {}),
        ("ltx2", True, "LTX2ImageToVideoPipeline", {}),
        ("ltx2", False, "DiffusionPipeline", {}),
    ],
)
def test_checkpoints_are_loaded_as_the_row_says(
    name: str, image: bool, cls: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffsparse_pipelines.loading.from_pretrained", Loaded)
    pipe: Any = families.load(name, device="cpu", with_image=image)
    assert pipe.named[0] is getattr(diffusers, cls)
    assert {key: value for key, value in pipe.options.items() if key != "vae"} == options


def test_adapters_go_to_both_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsparse_pipelines.loading.from_pretrained", Loaded)
    pipe: Any = families.load("wan2.2-lightning", device="cpu")
    (hub, first), (_, second) = pipe.adapters
    assert hub == "lightx2v/Wan2.2-Lightning"
    assert "load_into_transformer_2" not in first
    assert second["load_into_transformer_2"]


class Steps(ModularPipelineBlocks):
    """The smallest blocks: a transformer, run in a loop."""

    model_name = "steps"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("transformer", diffusers.WanTransformer3DModel),
            ComponentSpec("scheduler", diffusers.FlowMatchEulerDiscreteScheduler),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(name="prompt", required=True),
            InputParam(name="num_inference_steps", default=7),
            InputParam(name="height", default=64),
            InputParam(name="width", default=64),
            InputParam(name="generator"),
            InputParam(name="output_type", default="pil"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("videos")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> Any:
        block = self.get_block_state(state)
        edges = block.height // 8, block.width // 8
        latents = torch.randn(1, 4, 3, *edges, generator=block.generator)
        words = torch.randn(1, 6, 16, generator=block.generator)
        components.scheduler.set_timesteps(block.num_inference_steps)
        for time in components.scheduler.timesteps:
            made = components.transformer(latents, time[None], words, return_dict=False)[0]
            latents = components.scheduler.step(made, time, latents, return_dict=False)[0]
        frames = latents[:, :3].permute(0, 2, 3, 4, 1).sigmoid().numpy()
        block.videos = frames if block.output_type == "np" else None
        self.set_block_state(state, block)
        return components, state


def modular_pipeline() -> ModularPipeline:
    torch.manual_seed(0)
    pipe = Steps().init_pipeline()
    transformer = diffusers.WanTransformer3DModel(**CASES["WanTransformer3DModel"].config).eval()
    pipe.update_components(transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    return pipe


def test_a_pipeline_of_blocks_is_called_like_any_other() -> None:
    pipe = modular_pipeline()
    assert parameters(pipe)["num_inference_steps"] == 7
    assert preflight.argument(pipe, {}, "num_inference_steps") == 7
    call = call_arguments(pipe, {"height": 64, "num_frames": 81, "width": 96}, {"prompt": "x"})
    assert call == {"height": 64, "width": 96, "prompt": "x"}
    with pytest.raises(ConfigError, match="takes no guidance_scale"):
        call_arguments(pipe, {}, {"guidance_scale": 2.0})
    dense = generation(pipe, call, 0)
    assert dense.frames.shape == (3, 8, 12, 3)
    with diffsparse.apply(pipe, Digest(0.5, 16)) as sparse:
        made = generation(pipe, call, 0)
        assert "sparse" in str(sparse.report())
    assert not np.array_equal(made.frames, dense.frames)
    assert np.array_equal(generation(pipe, call, 0).frames, dense.frames)


def test_tokens_of_a_pipeline_of_blocks_are_counted_by_its_chunks() -> None:
    if not hasattr(diffusers, "MiniMaxH3Blocks"):
        pytest.skip(f"Diffusers {diffusers.__version__} has no MiniMax-H3")
    from support.new_pipelines import h3_text

    pipe, call = h3_text()
    assert preflight.tokens(pipe, call) == (37 * 2 * 3, 0)
    assert preflight.preflight(pipe, call, Digest(0.8, 16), diffsparse.Schedule()) is not None


class Blocks:
    """Stands in for a pipeline of blocks that is loaded."""

    null_component_names: tuple[str, ...] = ()
    pretrained_component_names = ("transformer", "vae")

    def __init__(self, source: str, **options: object) -> None:
        self.source, self.options = source, options

    @classmethod
    def from_pretrained(cls, source: str, **options: object) -> Blocks:
        return cls(source, **options)

    def load_components(self, **options: object) -> None:
        self.dtype = options["torch_dtype"]

    def to(self, device: str) -> None:
        self.device = device


def test_blocks_are_loaded_with_the_workflow_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "ModularPipeline", Blocks)
    for image, workflow in ((False, "t2va"), (True, "fl2va")):
        pipe: Any = families.load("minimax-h3", device="cpu", with_image=image)
        assert pipe.options == {"workflow": workflow}
        assert pipe.dtype is torch.float32
    assert families.load("flux3-klein", device="cpu").options == {}  # type: ignore[attr-defined]
    monkeypatch.setattr(Blocks, "null_component_names", ("vae",))
    with pytest.raises(InputFileError, match="its vae can't be read"):
        families.load("flux3-klein", device="cpu")


def test_blocks_have_no_offload_of_their_own() -> None:
    with pytest.raises(ConfigError, match="give its blocks a ComponentsManager"):
        families._place(modular_pipeline(), "cuda", "model")


def test_an_image_goes_to_pipelines_that_take_several_and_chosen_steps_drop_noise_levels() -> None:
    class Several:
        def __call__(self, images: Any = None, num_inference_steps: int = 8, sigmas: Any = None) -> None: ...

    pipe: Any = Several()
    image = Image.new("RGB", (8, 8))
    assert call_arguments(pipe, {"sigmas": [1.0]}, {"image": image}) == {"sigmas": [1.0], "images": [image]}
    assert call_arguments(pipe, {"sigmas": [1.0]}, {"num_inference_steps": 4}) == {"num_inference_steps": 4}
