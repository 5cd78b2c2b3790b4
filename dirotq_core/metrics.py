"""Image and signal metrics of the reports."""

from __future__ import annotations

import numpy as np


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images [H, W, C]; infinite for equal ones."""
    _check(image, reference)
    error = np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(image: np.ndarray, reference: np.ndarray, window: int = 7) -> float:
    """Mean structural similarity of uint8 images [H, W, C] (Wang et al. 2004), uniform windows of 7 × 7."""
    _check(image, reference)
    if min(image.shape[:2]) < window:
        raise ValueError(f"images of {image.shape[:2]} are smaller than the window of {window}")
    x, y = image.astype(np.float64), reference.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _mean(x, window), _mean(y, window)
    # Unbiased (co)variances, as the common implementations have them.
    unbiased = window**2 / (window**2 - 1)
    vx = unbiased * (_mean(x * x, window) - mx * mx)
    vy = unbiased * (_mean(y * y, window) - my * my)
    cov = unbiased * (_mean(x * y, window) - mx * my)
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(similarity.mean())


def _mean(x: np.ndarray, window: int) -> np.ndarray:
    """Means of all window × window patches that lie inside [H, W, C]."""
    sums = np.pad(x, ((1, 0), (1, 0), (0, 0))).cumsum(0).cumsum(1)
    w = window
    return (sums[w:, w:] - sums[:-w, w:] - sums[w:, :-w] + sums[:-w, :-w]) / w**2


def _check(image: np.ndarray, reference: np.ndarray) -> None:
    if image.shape != reference.shape:
        raise ValueError(f"images must have one shape, got {image.shape} and {reference.shape}")
