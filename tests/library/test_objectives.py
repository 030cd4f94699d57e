"""Objectives order what they should order, and models are really loaded and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as t
from PIL import Image
from scipy.ndimage import gaussian_filter

from diffsparse.errors import ConfigError, InputFileError, UnknownNameError
from diffsparse.guidance.objectives import CHECKPOINTS, PLAIN, Clip, objective
from support.tiny_pipelines import clip_tokenizer


def picture(frames: int = 4, size: int = 48) -> np.ndarray:
    """A soft-edged disc that moves evenly over a textured ground, float32 [F, H, W, C]."""
    y, x = np.mgrid[:size, :size] / size
    ground = 0.4 + 0.2 * np.random.default_rng(0).random((size, size, 3))
    discs = [(np.hypot(x - 0.3 - 0.05 * f, y - 0.5) < 0.2)[..., None] for f in range(frames)]
    return np.stack([np.where(disc, (0.9, 0.2, 0.1), ground) for disc in discs]).astype(np.float32)


def blurred(clip: np.ndarray) -> np.ndarray:
    return np.stack([gaussian_filter(frame, (1.5, 1.5, 0)) for frame in clip])


def grey(clip: np.ndarray) -> np.ndarray:
    return np.repeat(clip.mean(-1, keepdims=True), 3, -1)


def flickering(clip: np.ndarray) -> np.ndarray:
    return (clip * np.where(np.arange(len(clip)) % 2, 0.8, 1.0)[:, None, None, None]).astype(np.float32)


WORSE: dict[str, Any] = {
    "sharpness": blurred,
    "colourfulness": grey,
    "contrast": lambda clip: 0.5 + 0.5 * (clip - 0.5),
    "steadiness": flickering,
}


@pytest.mark.parametrize("name", PLAIN)
def test_better_scores_higher(name: str) -> None:
    good = picture()
    better, worse = objective(name)([good, WORSE[name](good)], ["a", "b"])
    assert better > worse + 1e-3


def test_against_the_definitions() -> None:
    clip = picture(3)
    (colour,) = objective("colourfulness")([clip], [""])
    want = []
    for frame in clip.astype(np.float64):
        rg, yb = frame[..., 0] - frame[..., 1], (frame[..., 0] + frame[..., 1]) / 2 - frame[..., 2]
        want.append(np.sqrt(rg.std() ** 2 + yb.std() ** 2) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2))
    assert colour == pytest.approx(np.mean(want))
    (steady,) = objective("steadiness")([clip], [""])
    assert steady == pytest.approx(1 - np.abs(clip[2] - 2 * clip[1] + clip[0]).mean(), abs=1e-6)
    assert objective("contrast")([np.zeros((1, 8, 8, 3), np.float32)], [""]) == [0.0]


def test_steadiness_wants_a_video() -> None:
    with pytest.raises(ConfigError, match="at least 3 frames; got 1"):
        objective("steadiness")([picture(1)], ["a"])


def test_the_look_of_a_picture(tmp_path: Path) -> None:
    clip = picture(1)
    Image.fromarray((clip[0] * 255).round().astype(np.uint8)).save(tmp_path / "look.png")
    look = objective(f"look:{tmp_path / 'look.png'}")
    same, tinted, other = look([clip, np.clip(clip + np.array([0.1, 0, 0]), 0, 1), 1 - clip], ["", "", ""])
    assert same == pytest.approx(0, abs=0.5)
    assert same > tinted > other
    one_colour = np.full((1, 8, 8, 3), 0.5, np.float32)
    assert np.isfinite(look([one_colour], [""])).all()
    with pytest.raises(InputFileError, match="reference look"):
        objective("look:none.png")


def test_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no objective is called 'sharpnes'; known: sharpness"):
        objective("sharpnes")
    with pytest.raises(UnknownNameError, match="can't import the objective os:nothing"):
        objective("os:nothing")
    with pytest.raises(UnknownNameError, match="math:pi is no objective; wanted a function"):
        objective("math:pi")
    with pytest.raises(UnknownNameError, match="call is no objective"):  # takes names alone
        objective("support.tiny_pipelines:call")
    assert objective("operator:add")([1.0], [2.0]) == [1.0, 2.0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP model of small random weights, saved as transformers does."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = t.CLIPConfig(
        text_config={"vocab_size": 514, **sizes, **ends},
        vision_config={"image_size": 32, "patch_size": 8, **sizes},
        projection_dim=8,
    )
    t.CLIPModel(config).save_pretrained(folder)
    pictures = t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    t.CLIPProcessor(pictures, clip_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_models(name: str, checkpoint: str) -> None:
    score = objective(f"{name}:{checkpoint}")
    assert isinstance(score, Clip)
    clips, prompts = [picture(1), picture(12), 1 - picture(1)], ["a disc", "a red disc", "a disc"]
    found = score(clips, prompts)
    model, processor = t.CLIPModel.from_pretrained(checkpoint), t.CLIPProcessor.from_pretrained(checkpoint)
    shown = list((clips[0] * 255).round().astype(np.uint8))
    out = model(**processor(text=["a disc"], images=shown, return_tensors="pt", padding=True))
    cosine = float((out.image_embeds @ out.text_embeds.T).mean().detach())
    scale = float(model.logit_scale.exp().detach()) if name == "pickscore" else 1.0
    assert found[0] == pytest.approx(cosine * scale, rel=1e-4)
    assert len(set(found)) == 3
    assert score(clips[:1], [" ".join(["long"] * 99)]), "long prompts are cut"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="can't load the objective 'clip' from"):
        objective(f"clip:{tmp_path}")
