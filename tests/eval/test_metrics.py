"""Metrics against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffsparse_eval import metrics
from diffsparse_pipelines.tables import mean_and_interval, spread


def frames(seed: int, shape: tuple[int, ...] = (3, 16, 20, 3)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def test_psnr_is_the_formula() -> None:
    a, b = frames(0), frames(1)
    want = -10 * math.log10(((a.astype(np.float64) - b) ** 2).mean())
    assert metrics.psnr_db(a, b) == pytest.approx(want, abs=1e-4)
    each = [-10 * math.log10(((x.astype(np.float64) - y) ** 2).mean()) for x, y in zip(a, b, strict=True)]
    assert metrics.psnr_db_min(a, b) == pytest.approx(min(each), abs=1e-4)


def test_identical_frames_are_infinitely_near() -> None:
    assert metrics.psnr_db(frames(0), frames(0)) == math.inf
    assert metrics.psnr_db_min(frames(0), frames(0)) == math.inf
    assert metrics.ssim(frames(0), frames(0)) == pytest.approx(1)


def test_psnr_falls_and_ssim_falls_with_noise() -> None:
    a, noise = frames(0) / 2 + 0.25, frames(1) - 0.5
    values = [(metrics.psnr_db(a, a + s * noise), metrics.ssim(a, a + s * noise)) for s in (0.05, 0.1, 0.3)]
    assert values == sorted(values, reverse=True)


def test_ssim_of_small_frames_is_unknown() -> None:
    assert metrics.ssim(frames(0, (2, 6, 9, 3)), frames(1, (2, 6, 9, 3))) is None


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match="same dimensions"):
        metrics.psnr_db(frames(0), frames(0)[:2])


def test_latent_cosine() -> None:
    a = torch.randn(1, 4, 3, 2)
    assert metrics.latent_cosine(a, 3 * a) == pytest.approx(1)
    assert metrics.latent_cosine(a, -a) == pytest.approx(-1)
    assert metrics.latent_cosine(None, a) is None


def test_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 4.0, 5.0]
    mean, half = mean_and_interval(values)
    assert mean == pytest.approx(16 / 5)
    assert half == pytest.approx(2.776445 * np.std(values, ddof=1) / math.sqrt(5), rel=1e-5)


def test_fewer_than_five_values_have_no_interval() -> None:
    assert mean_and_interval([5.0]) == (5.0, None)
    assert mean_and_interval([1.0, 2.0, 3.0, 4.0]) == (2.5, None)
    assert spread([42.0, 40.0, 43.04], ".1f") == "42.0 (40.0 to 43.0)"
    assert spread([42.0], ".1f") == "42.0"
    assert spread([0.999, 0.9991], ".2f") == "1.00"  # a range that does not show
    assert spread([0.1, 0.2, 0.3, 0.4], "+.1f") == "+0.2 (+0.1 to +0.4)"
    assert spread([1.0, 2.0, 4.0, 4.0, 5.0], ".1f") == "3.2 ± 2.0"
    assert spread([1.0] * 5, ".1f") == "1.0"
