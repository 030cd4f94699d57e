"""The embedded model: exact parts, data, training that resumes, gates that can fail."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsparse_pipelines import tiny
from diffsparse_pipelines.tiny.captions import CAPTIONS, COLOURS, Caption, sample
from diffsparse_pipelines.tiny.variants import TEXT_LENGTH, VARIANTS, Variant
from training import build, data, gates, sheet, train

FLIPPED = {"left": "right", "right": "left", "up": "down", "down": "up"}
SMALL = Variant(heads=1, ffn=64, frames=9, pixels=32, layers=2, head_dim=64)


@pytest.fixture(scope="module")
def twin() -> Any:
    pipe = tiny.load("twin")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def real_clips(count: int, seed: int = 0) -> tuple[list[Caption], torch.Tensor]:
    captions = sample(count, seed)
    return captions, data.render(captions, 17, 64, torch.Generator().manual_seed(seed))


def test_the_vae_is_exact_both_ways(twin: Any) -> None:
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = twin.vae.encode(video).latent_dist.mode()
        again = twin.vae.decode(latents).sample
    torch.testing.assert_close(latents / build.LATENT_STD, build.latents(video), atol=2e-4, rtol=0)
    torch.testing.assert_close(again, video, atol=2e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_trained_small_and_of_the_declared_sizes(variant: str) -> None:
    pipe, sizes = tiny.load(variant), VARIANTS[variant]
    assert pipe.transformer.config.num_layers == sizes.layers
    assert pipe.transformer.config.num_attention_heads == sizes.heads
    assert not pipe.transformer.training
    total = sum(file.stat().st_size for file in tiny.folder(variant).rglob("*.safetensors"))
    assert total < (16 if variant == "default" else 5) * 2**20
    untrained = build.transformer(sizes)
    names = dict(untrained.named_parameters())
    moved = [n for n, p in pipe.transformer.named_parameters() if not torch.allclose(p, names[n], atol=1e-2)]
    assert len(moved) > 0.5 * len(names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_clip_has_the_asked_size(variant: str) -> None:
    pipe, call = tiny.load(variant), tiny.defaults(variant)
    pipe.set_progress_bar_config(disable=True)
    clip = sheet.generate(pipe, tiny.prompts(1)[0], 0, **{**call, "num_inference_steps": 1, "num_frames": 5})
    assert clip.shape == (5, 3, call["height"], call["width"])
    assert clip.isfinite().all()


def test_an_unknown_variant() -> None:
    with pytest.raises(LookupError, match="default, twin; got 'huge'"):
        tiny.load("huge")


def test_prompts_are_seeded_and_of_the_known_kind() -> None:
    assert tiny.prompts(5) == tiny.prompts(5)
    assert tiny.prompts(5) != tiny.prompts(5, seed=1)
    assert len(set(tiny.prompts(144))) == 144
    assert set(tiny.prompts(144)) == set(map(str, CAPTIONS))


def test_the_tokenizer_knows_every_word(twin: Any) -> None:
    ids = twin.tokenizer(list(map(str, CAPTIONS))).input_ids
    assert not any(twin.tokenizer.unk_token_id in row for row in ids)
    assert max(map(len, ids)) <= TEXT_LENGTH


def test_pieces_of_a_clip_are_computed_as_in_the_whole() -> None:
    """On all tokens, the training forward is the stock forward."""
    model = build.transformer(SMALL)
    latents, t, text = torch.randn(2, 12, 9, 16, 16), torch.rand(2), torch.randn(2, 5, build.TEXT_DIM)
    whole = range(9), range(8), range(8)
    tokens = train.choose(train.patches(latents), whole)
    with torch.no_grad():
        want = model(latents, t * 1000, text, return_dict=False)[0]
        got = train.Denoiser(model)(tokens, t, text, train.rotary_at(model, SMALL, whole))
    torch.testing.assert_close(got, train.choose(train.patches(want), whole), atol=1e-5, rtol=1e-5)


def test_pieces_stay_inside_the_clip() -> None:
    rng = random.Random(0)
    for variant, pieces in train.PIECES.items():
        for piece in pieces * 20:
            for axis, length in zip(piece.pick(VARIANTS[variant].grid, rng), VARIANTS[variant].grid, strict=True):
                assert 0 <= axis[0] <= axis[-1] < length


def trained(out: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setitem(train.VARIANTS, "twin", SMALL)
    trainer = train.Trainer(train.Recipe(variant="twin", steps=4), out)
    for _ in trainer.run(log_steps=1):
        if trainer.step >= steps:
            break
    trainer.save()
    return trainer.averaged()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_training_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole", 4, monkeypatch)
    trained(tmp_path / "parts", 2, monkeypatch)
    parts = trained(tmp_path / "parts", 4, monkeypatch)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_training_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train.VARIANTS, "twin", SMALL)
    trainer = train.Trainer(train.Recipe(variant="twin", steps=30, warm_up=5), tmp_path)
    losses = [sum(row["loss"].values()) / len(row["loss"]) for row in trainer.run(log_steps=5)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_judge_passes_real_clips_and_no_others() -> None:
    captions, video = real_clips(24)
    clips = (video + 1) / 2
    for caption, clip in zip(captions, clips, strict=True):
        frames = clip.permute(1, 0, 2, 3)
        assert gates.judge(frames, caption).passed, caption
        assert not gates.judge(frames, dataclasses.replace(caption, direction=FLIPPED[caption.direction])).passed
        other = next(colour for colour in COLOURS if colour != caption.colour)
        assert not gates.judge(frames, dataclasses.replace(caption, colour=other)).passed
        assert not gates.judge(frames[:1].expand(17, -1, -1, -1), caption).right_way
        assert not gates.judge(torch.rand(17, 3, 64, 64), caption).passed


def test_random_weights_fail_the_gates(twin: Any) -> None:
    options = {**tiny.defaults("twin"), "num_inference_steps": 5}
    pipe = tiny.load("twin")
    pipe.set_progress_bar_config(disable=True)
    gates.random_weights(pipe, "twin")
    assert not gates.structure(pipe, options, 1).passed
    assert not any(verdict.passed for verdict in gates.visual(pipe, options, 2))


def test_the_training_script_starts_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.train", "--variant", "twin", "--steps", "1"]
    command += ["--threads", "1", "--out", str(tmp_path / "run"), "--export", str(tmp_path / "pipe")]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 1
    assert (tmp_path / "pipe" / "model_index.json").is_file()
    wrong = subprocess.run([*command[:3], "--out", str(tmp_path)], check=False, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "say how long" in wrong.stderr
