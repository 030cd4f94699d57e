"""`diffsparse hunt`, `generate --heads` and `evaluate --heads` on the embedded twin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import diffsparse
from diffsparse import Preset
from diffsparse.cli import main
from diffsparse.errors import ConfigError
from diffsparse_pipelines import tiny
from diffsparse_pipelines.commands.hunt import HuntOptions
from diffsparse_pipelines.generation import generation, generations
from diffsparse_pipelines.hunting import Session, compared
from diffsparse_pipelines.tiny.captions import CAPTIONS
from support.tiny_pipelines import BUILDERS
from training.data import render
from training.gates import agreement

SMALL = ["--model", "tiny-twin", "--steps", "2"]
HUNT = ["hunt", *SMALL, "--objective", "contrast", "--prompts", "2", "--k", "1", "--rounds", "2", "--pool", "1-2.*"]


def call(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code, arguments


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hunt") / "heads.json"
    call([*HUNT, "--held-out", "3", "--out", str(out)])
    return out


def test_a_hunt_ends_with_a_preset_a_check_and_a_sheet(found: Path) -> None:
    preset = Preset.load(found)
    assert len(preset.heads) == 2
    assert set(preset.heads) <= {"1.0", "1.1", "2.0", "2.1"}
    about = preset.about
    assert about["search"] == "HeadHunter"
    assert about["objective"] == "contrast"
    held = about["held_out"]
    on, off = (np.array(held["scores"][side]) for side in ("on", "off"))
    assert held["gain"] == pytest.approx((on - off).mean())
    assert held["gain_range"] == pytest.approx([(on - off).min(), (on - off).max()])
    with Image.open(found.with_suffix(".png")) as sheet:
        assert sheet.height == 2 * 3 * (96 + 26)
    assert {p.name for p in found.parent.iterdir()} == {"heads.json", "heads.md", "heads.png"}
    text = found.with_suffix(".md").read_text()
    assert "tiny-twin: hunt for `contrast` over 4 heads, 2 rounds for 1 each, 2 images a trial, 2 steps" in text
    assert f"| unseen | 3 | {held['off']:.4f} | {held['on']:.4f} | {held['gain']:+.4f} (" in text


def test_five_pairs_have_an_interval_and_four_a_range() -> None:
    off, on = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([1.5, 2.1, 3.7, 4.0, 5.2])
    half = stats.sem(on - off) * stats.t.ppf(0.975, 4)
    found = compared(off.tolist(), on.tolist())
    assert found["gain_95"] == pytest.approx([(on - off).mean() - half, (on - off).mean() + half])
    assert "gain_range" not in found
    few = compared(off[:4].tolist(), on[:4].tolist())
    assert few["gain_range"] == pytest.approx([0.0, 0.7])
    assert "gain_95" not in few


def test_prompts_of_the_check_are_unseen(found: Path) -> None:
    seen = tiny.prompts(2)
    held = Preset.load(found).about["held_out"]["prompts"]
    assert not set(seen) & set(held)
    assert len(held) == 3


def test_an_interrupted_hunt_goes_on(found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "again.json"
    real, runs = Session.render, []

    def stops(self: Any, *arguments: Any) -> Any:
        runs.append(1)
        if len(runs) == 5:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Session, "render", stops)
    call([*HUNT, "--held-out", "0", "--out", str(out)], code=130)
    assert not out.exists()
    monkeypatch.setattr(Session, "render", real)
    call([*HUNT, "--held-out", "0", "--out", str(out)])
    assert Preset.load(out) == Preset.load(found)
    assert Preset.load(out).about["score"] == Preset.load(found).about["score"]


def test_a_hunt_that_was_stopped_in_its_check_goes_on_with_it(
    found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, preset = tmp_path / "heads.json", Preset.load(found)
    preset.about.pop("held_out")
    preset.save(out)
    call([*HUNT, "--head-scale", "2", "--out", str(out)], code=2)
    assert "is of a hunt with other settings" in capsys.readouterr().err
    monkeypatch.setattr(Session, "hunt", None)
    call([*HUNT, "--held-out", "3", "--out", str(out)])
    assert Preset.load(out).about == Preset.load(found).about


def test_a_preset_is_not_overwritten(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call([*HUNT, "--out", str(found)], code=2)
    assert "exists; choose another --out or use --overwrite" in capsys.readouterr().err


def test_the_estimate_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a.json")
    size = [*HUNT[:2], "tiny-twin", *HUNT[5:]]
    call([*size, "--proxy", "--estimate", "--out", out])
    printed = capsys.readouterr().out
    assert "proxy hunt (not the paper's) for 2 x 1 heads out of 4: 7 trials x 2 images = 14 generations" in printed
    assert "of 4 steps, about" in printed
    assert not list(tmp_path.iterdir())


def test_prompts_of_the_hunt_in_the_check_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.txt"
    file.write_text(f"{tiny.prompts(1)[0]}\nsomething else\n")
    call([*HUNT, "--held-out", str(file), "--out", str(tmp_path / "a.json")], code=2)
    assert "--held-out holds prompts of the hunt" in capsys.readouterr().err


def test_images_go_round_the_prompts() -> None:
    seen, unseen = HuntOptions("contrast", "2", images=5, held_out="2").pairs("tiny")
    first, second = tiny.prompts(2)
    assert seen == [(first, 0), (second, 1), (first, 2), (second, 3), (first, 4)]
    assert [seed for _, seed in unseen] == [5, 6]
    assert HuntOptions("contrast", "2", held_out="0").pairs("tiny") == (seen[:2], [])
    seen, unseen = HuntOptions("contrast", "1", "in watercolours", held_out="1").pairs("tiny")
    assert (seen[0][0], unseen[0][0]) == (f"in watercolours, {first}", f"in watercolours, {second}")


def test_batches_are_halved_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tiny.load("twin"), "tiny-twin", {**tiny.defaults("twin"), "num_inference_steps": 2})
    pairs = [(prompt, i) for i, prompt in enumerate(tiny.prompts(4))]
    alone = session.render(session.arguments, pairs)
    sizes: list[int] = []

    def tight(pipe: Any, arguments: Any, part: Sequence[Any], *_: Any) -> Any:
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError
        return generations(pipe, arguments, part)

    monkeypatch.setattr("diffsparse_pipelines.generation.generations", tight)
    session.batch = 4
    together = session.render(session.arguments, pairs)
    assert sizes == [4, 2, 2]
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_a_batch_is_drawn_as_its_samples_are(name: str) -> None:
    """Guidance included: the samples of a batch are no halves of a pair."""
    pipe, kwargs = BUILDERS[name]()
    options = {key: value for key, value in kwargs.items() if key != "prompt"}
    with diffsparse.guide(pipe, "1.0"):
        both = generations(pipe, options, [("a", 0), ("b", 1)])
        each = [generation(pipe, {**options, "prompt": p}, s).frames for p, s in (("a", 0), ("b", 1))]
    for a, b in zip(both, each, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_generate_with_heads(found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, sheet = tmp_path / "a.png", tmp_path / "sheet.png"
    heads = ["--heads", str(found), "--head-strength", "0.5", "--head-scale", "2"]
    call(["generate", *SMALL, "--strategy", "dense", *heads, "--out", str(out), "--compare", str(sheet)])
    printed = capsys.readouterr().out
    assert f"{', '.join(Preset.load(found).heads)}: identity, strength 0.5, scale 2" in printed
    assert "extra passes       2" in printed
    with Image.open(sheet) as picture:
        assert picture.height == 2 * (96 + 26)
    call(["generate", *SMALL, "--strategy", "dense", "--out", str(tmp_path / "b.png")])
    assert out.read_bytes() != (tmp_path / "b.png").read_bytes()


def test_evaluate_with_heads(found: Path, tmp_path: Path) -> None:
    options = ["--strategy", "random", "--sparsity", "0.5", "--block", "16", "--prompts", "1"]
    call(["evaluate", *SMALL, *options, "--heads", str(found), "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["strategy"] for row in rows] == ["dense", "random", "dense+heads", "random+heads"]
    assert rows[2]["density"] == 1.0
    assert rows[2]["psnr_db"] is not None
    assert rows[3]["sparse_density"] == pytest.approx(0.5, abs=0.05)
    assert (tmp_path / "sheet.png").exists()


def test_a_preset_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Preset(("0.0",), models={"transformer": "FluxTransformer2DModel:0"}).save(tmp_path / "a.json")
    call(["generate", *SMALL, "--heads", str(tmp_path / "a.json"), "--out", str(tmp_path / "b.png")], code=2)
    assert "made for FluxTransformer2DModel:0; got WanTransformer3DModel" in capsys.readouterr().err


def test_agreement_knows_real_clips() -> None:
    captions = [CAPTIONS[i] for i in (0, 40, 100)]
    texts = [str(caption) for caption in captions]
    video = (render(captions, 9, 32, torch.Generator().manual_seed(0)) + 1) / 2
    clips = [clip.permute(1, 2, 3, 0).numpy() for clip in video]
    assert min(agreement(clips, texts)) > 0.95
    assert max(agreement(clips, [texts[1], texts[2], texts[0]])) < 0.7
    assert agreement([np.zeros((9, 32, 32, 3), np.float32)], texts[:1]) == [0.0]
    with pytest.raises(ConfigError, match="wants captions of the tiny model"):
        agreement(clips[:1], ["a cat"])
