"""Objectives of a hunt: scores of videos or images, higher is better, most of them without a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import numpy as np

from diffsparse.errors import ConfigError, DiffsparseError, InputFileError, UnknownNameError, closest
from diffsparse.files import first_line, read_image

if TYPE_CHECKING:
    import torch
    from transformers import CLIPModel, CLIPProcessor

Frames = np.ndarray  # float32 [F, H, W, C] in [0, 1]; an image has one frame
_MOST = 8  # frames of a video that a model is shown, evenly spread


class Objective(Protocol):
    """A function that scores clips: any callable with these arguments is one."""

    def __call__(self, clips: Sequence[Frames], prompts: Sequence[str]) -> Sequence[float]:
        """Score each clip; higher is better.

        Args:
            clips: float32 [F, H, W, C] in [0, 1] each; an image has one frame.
            prompts: one for each clip.

        Returns:
            One finite number for each clip.
        """


def objective(text: str, device: torch.device | str = "cpu") -> Objective:
    """An objective by name.

    Args:
        text: "sharpness", "colourfulness", "contrast", "steadiness"; "look:IMAGE", similarity to the colours of a
            picture; "clip", "pickscore", "hps", each with an optional checkpoint after a colon; or "module:function".
        device: where a model runs.

    Raises:
        UnknownNameError: no such objective.
        InputFileError: a picture or model that can't be loaded.
    """
    name, _, rest = text.partition(":")
    if name in PLAIN and not rest:
        return partial(_each, PLAIN[name])
    if name == "look":
        return partial(_each, Look.of(rest))
    if name in CHECKPOINTS:
        return Clip.load(name, rest, device)
    if rest:
        return _imported(name, rest)
    known = [*PLAIN, "look:IMAGE", *CHECKPOINTS, "module:function"]
    raise UnknownNameError(f"no objective is called {text!r}; known: {closest(text, known)}")


def _each(score: Callable[[Frames], float], clips: Sequence[Frames], prompts: Sequence[str]) -> list[float]:
    return [score(clip) for clip in clips]


@dataclass(frozen=True)
class Foreign:
    """A function of the user's as an objective; what it raises becomes a one-line error.

    Attributes:
        function: takes clips and prompts, and gives one score for each clip.
        name: for the error.
    """

    function: Objective
    name: str

    def __call__(self, clips: Sequence[Frames], prompts: Sequence[str]) -> Sequence[float]:
        """Its scores.

        Raises:
            ConfigError: it failed.
        """
        try:
            return self.function(clips, prompts)
        except DiffsparseError:
            raise
        except Exception as error:
            raise ConfigError(
                f"objective {self.name} failed on {len(clips)} clips: {type(error).__name__}: {error}; {_WANTED}"
            ) from error


_WANTED = "wanted a function (clips, prompts) -> scores, one number for each clip, float32 [F, H, W, C] in [0, 1]"


def _imported(module: str, name: str) -> Objective:
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # importing runs the user's code
        raise UnknownNameError(
            f"can't import the objective {module}:{name}: {type(error).__name__}: {error}; {_WANTED}"
        ) from error
    try:
        inspect.signature(found).bind([], [])
    except (TypeError, ValueError):  # not callable, other arguments, or no signature
        raise UnknownNameError(f"{module}:{name} is no objective; {_WANTED}") from None
    return Foreign(found, f"{module}:{name}")


# --- without a model ------------------------------------------------------------------------------------------------


def sharpness(clip: Frames) -> float:
    """1 - the blur metric of Crete et al. 2007 (0: all blur), mean over frames; clip [F, H, W, C] in [0, 1]."""
    from skimage.measure import blur_effect

    return float(np.mean([1 - blur_effect(frame, channel_axis=-1) for frame in clip]))


def colourfulness(clip: Frames) -> float:
    """Spread and strength of the opponent colours (Hasler and Suesstrunk 2003), mean over frames of [F, H, W, C]."""
    red, green, blue = np.moveaxis(clip.astype(np.float64), -1, 0)
    opponents = np.stack((red - green, (red + green) / 2 - blue)).reshape(2, len(clip), -1)
    spread, strength = (np.hypot(*part) for part in (opponents.std(-1), opponents.mean(-1)))
    return float(np.mean(spread + 0.3 * strength))


def contrast(clip: Frames) -> float:
    """Standard deviation of the luminance within a frame, mean over frames [F, H, W, C] in [0, 1]."""
    from skimage.color import rgb2gray

    return float(np.mean([rgb2gray(frame).std() for frame in clip]))


def steadiness(clip: Frames) -> float:
    """1 - mean magnitude of the second difference in time: flicker and jitter lower it, even motion hardly does.

    Raises:
        ConfigError: fewer than three frames.
    """
    if len(clip) < 3:
        raise ConfigError(f"objective 'steadiness' wants a video of at least 3 frames; got {len(clip)}")
    return float(1 - np.abs(np.diff(clip.astype(np.float64), n=2, axis=0)).mean())


PLAIN: dict[str, Callable[[Frames], float]] = {
    "sharpness": sharpness,
    "colourfulness": colourfulness,
    "contrast": contrast,
    "steadiness": steadiness,
}


@dataclass(frozen=True)
class Look:
    """Similarity to the colours of a picture: minus the 2-Wasserstein distance of Gaussians over CIELAB pixels.

    Attributes:
        mean: of the picture's pixels in CIELAB, [3].
        spread: their covariance, [3, 3].
    """

    mean: np.ndarray  # [3]
    spread: np.ndarray  # [3, 3]

    @classmethod
    def of(cls, path: str) -> Look:
        """The colours of an image file.

        Raises:
            InputFileError: it can't be read.
        """
        image = read_image(path, "the reference look", "wanted look:IMAGE, such as look:photo.jpg")
        pixels = np.asarray(image, dtype=np.float64) / 255
        return cls(*_lab_moments(pixels[None]))

    def __call__(self, clip: Frames) -> float:
        """Minus the distance, in units of CIELAB."""
        from scipy.linalg import sqrtm

        mean, spread = _lab_moments(clip)
        root = np.real(sqrtm(self.spread))
        cross = np.real(sqrtm(root @ spread @ root))
        squared = np.sum((mean - self.mean) ** 2) + np.trace(spread + self.spread - 2 * cross)
        return -float(np.sqrt(max(squared, 0.0)))


def _lab_moments(clip: Frames) -> tuple[np.ndarray, np.ndarray]:
    from skimage.color import rgb2lab

    pixels = rgb2lab(np.clip(clip, 0, 1)).reshape(-1, 3)
    return pixels.mean(0), np.cov(pixels.T) + 1e-6 * np.eye(3)  # one colour has no spread: keep the root real


# --- with a model ---------------------------------------------------------------------------------------------------

# name -> (checkpoint, its processor, whether the score is the logit or the plain cosine)
CHECKPOINTS: dict[str, tuple[str, str, bool]] = {
    "clip": ("openai/clip-vit-large-patch14", "", False),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", True),
    "hps": ("adams-story/HPSv2-hf", "", False),
}


@dataclass(frozen=True)
class Clip:
    """Agreement of pictures and prompt in a CLIP model, mean over frames: CLIP score, PickScore, HPSv2.

    Attributes:
        model: of transformers.
        processor: of transformers, too.
        logit: the cosine times the model's learned scale, as PickScore is quoted.
    """

    model: CLIPModel
    processor: CLIPProcessor
    logit: bool = False

    @classmethod
    def load(cls, name: str, checkpoint: str = "", device: torch.device | str = "cpu") -> Clip:
        """Load a model by its name in `CHECKPOINTS`, from another folder or hub id if one is given.

        Args:
            name: "clip", "pickscore" or "hps".
            checkpoint: a folder or hub id in place of the usual one.
            device: where the model runs.

        Raises:
            InputFileError: it can't be loaded.
        """
        from transformers import CLIPModel, CLIPProcessor

        known, processor, logit = CHECKPOINTS[name]
        try:
            model = CLIPModel.from_pretrained(checkpoint or known).eval().to(device)
            return cls(model, CLIPProcessor.from_pretrained(checkpoint or processor or known), logit)
        except (OSError, ValueError) as error:
            source = checkpoint or known
            raise InputFileError(
                f"can't load the objective {name!r} from {source!r}: {first_line(error)} Wanted a CLIP model in the "
                f"format of transformers: {name}:FOLDER, or a connection to the hub"
            ) from error

    def __call__(self, clips: Sequence[Frames], prompts: Sequence[str]) -> list[float]:
        """One score for each clip and its prompt."""
        return [self._score(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]

    def _score(self, clip: Frames, prompt: str) -> float:
        import torch

        shown = clip[np.unique(np.linspace(0, len(clip) - 1, min(_MOST, len(clip))).round().astype(int))]
        pictures = list((np.clip(shown, 0, 1) * 255).round().astype(np.uint8))
        text = {"padding": True, "truncation": True, "return_tensors": "pt"}
        inputs = self.processor(text=[prompt], images=pictures, **text).to(self.model.device)
        with torch.no_grad():
            logits = self.model(**inputs).logits_per_image.float()  # [frames, 1]
            scale = 1.0 if self.logit else self.model.logit_scale.float().exp()
        return float((logits / scale).mean())
