"""What commands write: checked before they work, whole on a full disk, and told on Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffsparse import PARO
from diffsparse.errors import OutputFileError
from diffsparse.files import locked
from diffsparse_pipelines import families, generation, media
from diffsparse_pipelines.hunting import Session
from support.stops import full_disk, interrupted, status

TWIN = ["--model", "tiny-twin", "--steps", "2"]
GENERATE = ["generate", *TWIN, "--strategy", "dense"]
CALIBRATE = ["calibrate", *TWIN, "--block", "16", "--groups", "2", "--prompts", "1"]
HUNT = ["hunt", *TWIN, "--objective", "contrast", "--prompts", "1", "--k", "1", "--rounds", "1", "--pool", "0.*"]
NOISE = np.random.default_rng(0).random((9, 32, 32, 3)).astype(np.float32)


def names(path: Path) -> list[str]:
    """Files of a folder, without its locks."""
    return sorted(p.name for p in path.iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_full_disk_keeps_the_old_file(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"a{suffix}"
    media.save(NOISE[:1], out)
    before = out.read_bytes()
    with full_disk(2000):
        assert status([*GENERATE, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: can't write {out}: ")
    assert said.endswith("what was there before is kept\n")
    assert said.count("\n") == 1
    assert out.read_bytes() == before
    assert names(tmp_path) == [out.name]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_video_that_is_cut_without_a_word(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an encoder left unfinished and said nothing about is seen when it is read back."""
    real = subprocess.run

    def run(command: list[str], **knobs: Any) -> Any:
        done = real(command, **knobs)
        if "libx264" in command:
            os.truncate(command[-1], int(share * os.path.getsize(command[-1])))
        return done

    media.save(NOISE, tmp_path / "a.mp4")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OutputFileError, match=r"can't write .*a.mp4: .*; what was there before is kept"):
        media.save(NOISE[:5], tmp_path / "a.mp4")
    assert len(media.read(tmp_path / "a.mp4")) == 9
    assert names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_frames_are_counted(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = np.repeat(NOISE[:1], 9, 0)
    counted: list[tuple[int, int]] = []
    monkeypatch.setattr(media, "_check", lambda found, wanted: counted.append((found, wanted)))
    for frames, fps in ((NOISE, 16), (still, 16), (NOISE[:1], 24), (NOISE[:2], 1), (NOISE[:4], 60)):
        media.save(frames, tmp_path / f"a{suffix}", fps)
    assert counted == [(9, 9), (9, 9), (1, 1), (2, 2), (4, 4)]
    monkeypatch.undo()
    with pytest.raises(OSError, match="8 of 9 frames could be read back"):
        media._check(8, 9)


def test_an_image_of_one_frame_may_be_a_video(tmp_path: Path) -> None:
    """Pipelines round the number of frames: work that is done is written, whatever it has become."""
    assert len(media.read(media.save(NOISE[:1], tmp_path / "a.mp4"))) == 1
    assert media.read(media.save(NOISE, tmp_path / "a.jpg")).shape[0] == 1


WRONG = {
    "a folder": ([*GENERATE, "--out", "folder.mp4"], "a folder has that name"),
    "a long name": ([*GENERATE, "--out", f"{'x' * 300}.mp4"], "name too long"),
    "no permission": ([*GENERATE, "--out", "/proc/a.mp4"], "can't write to the folder /proc"),
    "a strange suffix": ([*GENERATE, "--out", "a.webm"], "wanted a name that ends in"),
    "a strange suffix of a strange model": (
        ["generate", "--model", ".", "--prompt", "x", "--out", "a.doc"],
        "can't write",
    ),
    "one file twice": (
        [*GENERATE, "--heads", "0.0", "--out", "a.png", "--compare", "./a.png"],
        "--out and --compare are one file",
    ),
    "an input": (
        ["generate", "--model", "wan2.1-14b", "--prompt", "x", "--image", "in.png", "--out", "link.png"],
        "--image and --out are one file",
    ),
    "a folder for the sheet": (
        [*GENERATE, "--heads", "0.0", "--compare", "folder.png", "--out", "a.mp4"],
        "a folder has that name",
    ),
    "a folder for a plan": ([*CALIBRATE, "--overwrite", "--out", "folder.safetensors"], "a folder has that name"),
    "a plan's long name": ([*CALIBRATE, "--out", f"{'x' * 240}.safetensors"], "name too long"),
    "a folder beside a preset": ([*HUNT, "--out", "folder.json"], "folder.png: a folder has that name"),
    "the look that is hunted": (
        ["hunt", "--objective", "look:in.png", "--out", "in.json"],
        "--objective and --out, which writes in.png are one file",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_outputs_are_checked_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    for folder in ("folder.mp4", "folder.png", "folder.safetensors"):
        Path(folder).mkdir()
    Image.new("RGB", (8, 8)).save("in.png")
    Path("link.png").symlink_to("in.png")
    before = Path("in.png").read_bytes()
    monkeypatch.setattr(families, "load", lambda *_, **__: pytest.fail("nothing is loaded for that"))
    assert status(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert Path("in.png").read_bytes() == before
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["in.png", "link.png"]


def test_a_stopped_generation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "generation", interrupted(generation.generation, 0))
    assert status([*GENERATE, "--out", str(tmp_path / "a.mp4")]) == 130
    assert capsys.readouterr().err == "stopped: nothing was written\n"
    assert names(tmp_path) == []


def test_a_stopped_search_goes_on_under_its_own_seed_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plan.safetensors"
    monkeypatch.setattr(generation, "generation", interrupted(generation.generation, 1))
    assert status([*CALIBRATE, "--out", str(out)]) == 130
    said = capsys.readouterr().err
    assert said == f"stopped: 1 of 2 runs are kept in {out}.partial; the same command goes on with the next\n"
    monkeypatch.undo()
    assert status([*CALIBRATE, "--seeds", "1", "--out", str(out)]) == 2
    assert "is of a search with other settings; delete it" in capsys.readouterr().err
    with locked(f"{out}.partial"):
        assert status([*CALIBRATE, "--out", str(out)]) == 2
    assert "another process is writing it" in capsys.readouterr().err
    with full_disk(1000):
        assert status([*CALIBRATE, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "File too large, make room; what was there before is kept" in said
    assert said.count("\n") == 1
    runs: list[int] = []
    real = generation.generation
    monkeypatch.setattr(generation, "generation", lambda *a, **k: runs.append(1) or real(*a, **k))
    assert status([*CALIBRATE, "--out", str(out)]) == 0
    assert len(runs) == 1
    assert PARO.load(out).plan.settings["groups"] == 2
    assert names(tmp_path) == [out.name]


def test_a_stopped_hunt(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "heads.json"
    real = Session.render
    monkeypatch.setattr(Session, "estimate", lambda *_: None)
    monkeypatch.setattr(Session, "render", interrupted(real, 2))
    assert status([*HUNT, "--held-out", "1", "--out", str(out)]) == 130
    kept = json.loads((tmp_path / "heads.json.partial").read_text())
    assert sum(len(scores) for scores in kept["rounds"].values()) == 2
    said = capsys.readouterr().err
    assert said == f"stopped: 1 of 2 trials are kept in {out}.partial; the same command goes on with the next\n"
    monkeypatch.setattr(Session, "render", interrupted(real, 3))
    assert status([*HUNT, "--held-out", "1", "--out", str(out)]) == 130
    assert capsys.readouterr().err == f"stopped: the heads are in {out}; the same command goes on with the check\n"
    monkeypatch.setattr(Session, "render", real)
    assert status([*HUNT, "--held-out", "1", "--out", str(out)]) == 0
    assert names(tmp_path) == ["heads.json", "heads.md", "heads.png"]
