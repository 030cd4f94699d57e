"""How far two videos are apart. Always on raw frames, before any video codec."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# What each column of a result means, printed with every report.
DEFINITIONS = {
    "psnr_db": "peak signal-to-noise ratio to the dense video in dB, over all frames at once; null: identical",
    "psnr_db_min": "the lowest PSNR of a single frame, in dB; null: all frames identical",
    "ssim": "structural similarity to the dense video (7x7 window), mean over frames; null: frames under 7 pixels",
    "latent_cosine": "cosine similarity of the last step's latents",
    "density": "share of attention blocks computed, over all self-attention calls (dense steps count as 1)",
    "work": "attention computed, in dense passes: density, and what searches compute beside it (a mass pass is a half)",
    "sparse_density": "share of attention blocks computed, over the calls that ran sparse",
    "dense_seconds": "wall time of the untouched pipeline call, same prompt and seed, same process",
    "seconds": "wall time of the call with the strategy on, its dense steps and searches included",
    "speedup": "dense_seconds / seconds",
    "attention_share": "share of the dense call's wall time that is spent in self-attention",
    "attention_speedup": "time inside self-attention, dense over sparse, dense steps and searches included",
    "recall": "softmax mass inside the chosen blocks when they were chosen",
}


def psnr_db(reference: np.ndarray, frames: np.ndarray) -> float:
    """Peak signal-to-noise ratio of frames [F, H, W, C] in [0, 1], in dB; infinite if they are identical.

    Raises:
        ValueError: shapes differ.
    """
    from skimage.metrics import peak_signal_noise_ratio

    if reference.shape == frames.shape and np.array_equal(reference, frames):
        return math.inf
    return float(peak_signal_noise_ratio(reference, frames, data_range=1.0))


def psnr_db_min(reference: np.ndarray, frames: np.ndarray) -> float:
    """The lowest `psnr_db` of one frame."""
    return min(psnr_db(a, b) for a, b in zip(reference, frames, strict=True))


def ssim(reference: np.ndarray, frames: np.ndarray) -> float | None:
    """Structural similarity of frames [F, H, W, C] in [0, 1], mean over frames; None below 7 pixels."""
    from skimage.metrics import structural_similarity

    if min(reference.shape[1:3]) < 7:
        return None
    pairs = zip(reference, frames, strict=True)
    return float(np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=-1) for a, b in pairs]))


def latent_cosine(reference: torch.Tensor | None, latents: torch.Tensor | None) -> float | None:
    """Cosine similarity of two latents of any one shape, in float64; None where a pipeline shows none."""
    if reference is None or latents is None:
        return None
    a, b = reference.flatten().double(), latents.flatten().double()
    return float((a @ b / (a.norm() * b.norm())).clamp(-1, 1))


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval (Student's t); None for fewer than two values."""
    from scipy.stats import sem, t

    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(sem(values) * t.ppf(0.975, len(values) - 1))
