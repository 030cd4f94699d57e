"""Distances between two videos, on raw frames before any video codec."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from diffsparse_eval.rows import Fidelity

if TYPE_CHECKING:
    import torch


NONE: Fidelity = {"psnr_db": None, "psnr_db_min": None, "ssim": None, "latent_cosine": None}


def psnr_db(reference: np.ndarray, frames: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all frames together; infinite if they are identical.

    Args:
        reference: frames [F, H, W, C] in [0, 1] of the dense run.
        frames: those to compare, of the same shape.

    Raises:
        ValueError: shapes differ.
    """
    from skimage.metrics import peak_signal_noise_ratio

    if reference.shape == frames.shape and np.array_equal(reference, frames):
        return math.inf
    return float(peak_signal_noise_ratio(reference, frames, data_range=1.0))


def psnr_db_min(reference: np.ndarray, frames: np.ndarray) -> float:
    """The lowest `psnr_db` of one frame.

    Args:
        reference: frames [F, H, W, C] in [0, 1] of the dense run.
        frames: those to compare, of the same shape.
    """
    return min(psnr_db(a, b) for a, b in zip(reference, frames, strict=True))


def ssim(reference: np.ndarray, frames: np.ndarray) -> float | None:
    """Structural similarity, mean over frames; None below 7 pixels.

    Args:
        reference: frames [F, H, W, C] in [0, 1] of the dense run.
        frames: those to compare, of the same shape.
    """
    from skimage.metrics import structural_similarity

    if min(reference.shape[1:3]) < 7:
        return None
    pairs = zip(reference, frames, strict=True)
    return float(np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=-1) for a, b in pairs]))


def latent_cosine(reference: torch.Tensor | None, latents: torch.Tensor | None) -> float | None:
    """Cosine similarity of two latents, computed in float64; None if a pipeline does not expose them.

    Args:
        reference: latents of the dense run, of any shape.
        latents: those to compare, of the same shape.
    """
    if reference is None or latents is None:
        return None
    a, b = reference.flatten().double(), latents.flatten().double()
    return float((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
