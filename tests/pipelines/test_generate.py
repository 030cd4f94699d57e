"""Families, call arguments, media, and the generate command on stock pipelines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffsparse import Schedule
from diffsparse.cli import main
from diffsparse.errors import ConfigError, DiffsparseError, InputFileError, UnknownNameError
from diffsparse.guidance.objectives import objective
from diffsparse_pipelines import families, media, values
from diffsparse_pipelines.commands.options import SparsityOptions
from diffsparse_pipelines.families import FAMILIES
from diffsparse_pipelines.generation import call_arguments, generation
from support.tiny_pipelines import BUILDERS


def test_names_resolve_to_hub_ids_folders_or_errors(tmp_path: Path) -> None:
    assert families.resolve("wan2.1-1.3b")[0] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert families.resolve("wan2.1-14b", with_image=True)[0] == "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
    assert families.resolve("somebody/model")[0] == "somebody/model"
    assert families.resolve(str(tmp_path))[0] == str(tmp_path)
    for wrong in ("wan", "./nothing", "a/b/c"):
        with pytest.raises(UnknownNameError, match="diffsparse models lists all"):
            families.resolve(wrong)


def test_known_models_are_complete() -> None:
    for name, family in FAMILIES.items():
        if not name.startswith("tiny"):
            assert family.hub.count("/") == 1
            assert {"height", "width", "num_inference_steps"} <= family.defaults.keys()
            assert ("num_frames" in family.defaults) == (family.output == "video")


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("wan2.1-14b", {}, (21, 45, 80)),
        ("wan2.1-1.3b", {}, (21, 30, 52)),
        ("wan2.2-5b", {}, (31, 22, 40)),
        ("hunyuan-video", {}, (33, 45, 80)),
        ("cogvideox1.5-5b", {}, (11, 48, 85)),
        ("ltx-video", {}, (21, 15, 22)),
        ("mochi", {}, (15, 30, 53)),
        ("flux", {"height": 4096, "width": 4096}, (1, 256, 256)),
        ("tiny", {"num_frames": 9}, (9, 16, 16)),
        ("tiny-twin", {}, (9, 8, 8)),
    ],
)
def test_grids_of_known_models(name: str, size: dict[str, int], grid: tuple[int, int, int]) -> None:
    assert families.grid(name, size) == grid


def test_a_simulation_of_the_papers_windows(capsys: pytest.CaptureFixture[str]) -> None:
    """The command's rows, as JSON and as a table, for two strides at once."""
    windows = ["--grid", "30x48x80", "--window", "18x24x24", "--stride", "1x1x1,16x8x8"]
    asked = ["simulate", *windows, "--q-tile", "4x8x8", "--kv-tile", "2x8x8", "--share", "0.607"]
    main_ok([*asked, "--json"])
    slides, jumps = json.loads(capsys.readouterr().out)["rows"]
    assert slides["end_to_end_tile_bound"] == pytest.approx(1.73, abs=0.02)
    assert jumps["end_to_end_tile_bound"] == pytest.approx(2.23, abs=0.02)
    assert jumps["stride"] == [16, 8, 8]
    main_ok([*asked, "--dense", "0.3"])
    assert "1.63" in capsys.readouterr().out
    main_ok(["simulate", "--model", "hunyuan-video", "--sparsity", "0.9"])
    printed = capsys.readouterr().out
    assert "33x45x80 tokens" in printed
    assert "end to end" not in printed


@pytest.mark.parametrize("windows", [["--sparsity", "0.7"], ["--window", "5x4x4", "--stride", "1x2x2"]])
def test_windows_on_the_command_line(windows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clip.gif"
    model = ["--model", "tiny-twin", "--steps", "3", "--block", "16", "--strict"]
    main_ok(["generate", *model, "--strategy", "gna", *windows, "--out", str(out)])
    assert "sparse" in capsys.readouterr().out
    assert out.is_file()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_saved_folder_is_loaded_and_sparse_generation_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, call = BUILDERS[name]()
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / ("a.png" if name == "flux" else "a.gif")
    size = ["--height", "32", "--width", "32", "--steps", "4"]
    size += ["--frames", "9"] if name == "wan" else []
    main_ok(["generate", "--model", str(tmp_path / "model"), "--prompt", "x", "--out", str(out), "--block", "8", *size])
    printed = capsys.readouterr().out
    assert "sparse" in printed
    assert "dense steps 1 of 4" in printed
    with Image.open(out) as picture:
        assert getattr(picture, "n_frames", 1) == (9 if name == "wan" else 1)
    assert call


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code, arguments


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_the_embedded_model_writes_all_formats(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"clip{suffix}"
    main_ok(["generate", "--model", "tiny-twin", "--steps", "3", "--block", "16", "--out", str(out)])
    frames = media.read(out)
    assert frames.shape[0] == (1 if suffix == ".png" else 9)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_generation_is_seeded_and_gives_latents() -> None:
    pipe, call = BUILDERS["wan"]()
    first, again, other = (generation(pipe, call, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)
    assert first.frames.shape == (9, 32, 32, 3)
    assert first.latents is not None
    assert first.seconds > 0


def test_options_that_a_pipeline_does_not_take() -> None:
    pipe, _ = BUILDERS["flux"]()
    with pytest.raises(ConfigError, match="FluxPipeline takes no num_frames; leave it out"):
        call_arguments(pipe, {}, {"num_frames": 5})
    assert call_arguments(pipe, {"num_frames": 5, "height": 8}, {"height": 16}) == {"height": 16}


def test_a_call_that_a_pipeline_refuses() -> None:
    pipe, call = BUILDERS["wan"]()
    with pytest.raises(ConfigError, match=r"WanPipeline refused the call: `height` and `width` have to be divisible"):
        generation(pipe, {**call, "height": 33}, 0)


def test_tiling_is_refused_where_there_is_no_vae() -> None:
    class Bare:
        vae = None

    with pytest.raises(ConfigError, match="leave out --vae-tiling"):
        families._tile(Bare())
    pipe, _ = BUILDERS["wan"]()
    families._tile(pipe)
    assert pipe.vae.use_tiling


@pytest.mark.parametrize("shape", [(5, 32, 48, 3), (3, 33, 47, 3)], ids=["even", "odd"])
def test_a_video_survives_its_codec(shape: tuple[int, ...], tmp_path: Path) -> None:
    y, x = np.mgrid[: shape[1], : shape[2]] / 48
    frames = np.stack([np.stack([x, y, np.full_like(x, f / shape[0])], -1) for f in range(shape[0])])
    media.save(frames.astype(np.float32), tmp_path / "a.mp4", fps=8)
    read = media.read(tmp_path / "a.mp4")
    factor = -(-256 // min(shape[1:3]))
    assert read.shape[0] == shape[0]
    small = read[:, factor // 2 :: factor, factor // 2 :: factor][:, : shape[1], : shape[2]]
    assert np.abs(small - frames).mean() < 0.05


def test_frames_out_of_range_are_clipped() -> None:
    frames = np.array([[[[-1.0, 0.5, 2.0]]]])
    assert media.to_bytes(frames).tolist() == [[[[0, 128, 255]]]]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    for read in (media.read_image, media.read):
        with pytest.raises(InputFileError, match="can't read"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("spoil", ["bomb", "chunk"])
def test_broken_images(spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL raises errors of its own kinds for a picture beyond all sizes, and for one that is broken inside."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    if spoil == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    else:
        data = (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").write_bytes(data[:36] + b"\x08" + data[37:])  # the length of its second chunk
    for read in (media.read_image, lambda path: objective(f"look:{path}")):
        with pytest.raises(InputFileError, match="can't read"):
            read(tmp_path / "a.png")


def test_sheets_have_a_row_for_each_entry(tmp_path: Path) -> None:
    rows = {name: np.random.default_rng(0).random((4, 16, 16, 3)) for name in ("dense", "sparse")}
    with Image.open(media.sheet(rows, tmp_path / "s.png")) as picture:
        assert picture.height == 2 * (96 + 26)


def test_options_become_a_schedule() -> None:
    assert SparsityOptions(dense_first="3", dense_last="0.1", dense_layers="0,-1").schedule == Schedule(3, 0.1, (0, -1))
    assert values.amounts("1, 0.5", "--x") == (1, 0.5)
    with pytest.raises(DiffsparseError):
        values.amount("x", "--x")


def test_dtypes() -> None:
    family = FAMILIES["wan2.1-1.3b"]
    assert families._dtype("auto", family, "cpu") == torch.float32
    assert families._dtype("auto", family, "cuda") == torch.bfloat16
    assert families._dtype("float16", family, "cpu") == torch.float16


def test_flow_shift_and_float32_vae_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known name loads through its own path, here from a folder in the place of the hub."""
    from dataclasses import replace

    pipe, _ = BUILDERS["wan"]()
    pipe.save_pretrained(tmp_path)
    family: Any = replace(FAMILIES["wan2.1-14b"], hub=str(tmp_path))
    monkeypatch.setitem(families.FAMILIES, "wan2.1-14b", family)
    loaded = families.load("wan2.1-14b", dtype="bfloat16", device="cpu", vae_tiling=True)
    assert loaded.scheduler.config.flow_shift == 5.0
    assert loaded.vae.dtype == torch.float32
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded.vae.use_tiling


TWIN = ["generate", "--model", "tiny-twin", "--steps", "12", "--block", "16"]


@pytest.mark.parametrize(
    ("chosen", "counts", "named"),
    [
        (["--speed", "fast"], "6 executed (2 dense, 4 sparse)", "taylor-seer:interval=4:order=1:warm_up=0.33"),
        (["--strategy", "taylor-seer:interval=3/tangent"], "6 executed (3 dense, 3 sparse)", "taylor-seer:interval=3"),
    ],
)
def test_a_step_cache_by_speed_or_by_name(
    chosen: list[str], counts: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*TWIN, *chosen, "--sparsity", "0.7", "--out", str(tmp_path / "out.png")])
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert f"{named}/Tangent(sparsity=0.7, block=16" in said
    assert "of the steps' attention left by the step cache" in said
    assert f"steps 12: {counts}, 6 skipped" in said
    assert f"dense steps 1-{counts[12]} of 12" in said
    answered, calls = map(int, re.search(r"step cache TaylorSeer answered (\d+) of (\d+) calls", said).groups())
    assert answered == calls / 2


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (["--speed", "quick"], "--speed wants one of quality, balanced, fast; got 'quick'"),
        (["--speed", "fast", "--strategy", "adaspa"], "leave --strategy adaspa out"),
        (["--speed", "fast", "--strategy", "digest"], "leave --strategy digest out"),
        (["--speed", "fast", "--window", "4x4x4"], "--speed fast takes no --window"),
        (["--strategy", "taylor-seer:steps=2/digest"], "step cache 'taylor-seer' has no 'steps'; it has"),
        (["--strategy", "taylor-seer:interval/digest"], "wanted knob=value, as in taylor-seer:interval=2"),
        (["--strategy", "mag/digest"], "`mag_ratios` must be provided"),
    ],
)
def test_a_step_cache_that_does_not_fit(
    chosen: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*TWIN, *chosen, "--out", str(tmp_path / "out.png")])
    assert ended.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
