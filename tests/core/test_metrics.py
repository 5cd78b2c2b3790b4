import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import uniform_filter

from dirotq.dirotq_core.metrics import psnr, ssim


def image(seed, shape=(24, 17, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def noisy(x, sigma, seed=1):
    noise = np.random.default_rng(seed).normal(0, sigma, x.shape)
    return np.clip(x + noise, 0, 255).astype(np.uint8)


def ssim_by_filters(x, y, window=7):
    """Wang et al. 2004 with scipy's uniform filter, windows inside the image only."""
    edge, n = window // 2, window**2
    total = []
    for c in range(x.shape[2]):
        a, b = x[..., c].astype(float), y[..., c].astype(float)
        mean = lambda q: uniform_filter(q, window)[edge:-edge, edge:-edge]  # noqa: E731
        ma, mb = mean(a), mean(b)
        va, vb, cov = (mean(q) * n / (n - 1) for q in (a * a, b * b, a * b))
        va, vb, cov = va - ma**2 * n / (n - 1), vb - mb**2 * n / (n - 1), cov - ma * mb * n / (n - 1)
        c1, c2 = 2.55**2, 7.65**2
        total.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(total)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), sigma=st.floats(0.5, 100))
def test_against_their_definitions(seed, sigma):
    x = image(seed)
    y = noisy(x, sigma)
    error = np.mean([(float(a) - float(b)) ** 2 for a, b in zip(x.flat, y.flat, strict=True)])
    assert psnr(x, y) == pytest.approx(20 * np.log10(255 / np.sqrt(error)), rel=1e-9)
    assert ssim(x, y) == pytest.approx(ssim_by_filters(x, y), abs=1e-9)
    assert psnr(x, y) == psnr(y, x)
    assert ssim(x, y) == pytest.approx(ssim(y, x), abs=1e-12)


def test_known_values():
    black, grey = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert psnr(black, grey) == 0
    assert psnr(black, np.ones_like(black)) == pytest.approx(48.1308, abs=1e-4)
    assert ssim(black, grey) == pytest.approx(6.5025 / (255**2 + 6.5025), rel=1e-9)


def test_equal_images():
    assert psnr(image(0), image(0)) == float("inf")
    assert ssim(image(0), image(0)) == 1


def test_more_noise_is_worse():
    x = np.repeat(np.repeat(image(3, (6, 6, 3)), 8, 0), 8, 1)
    scores = [(psnr(x, noisy(x, s)), ssim(x, noisy(x, s))) for s in (2, 8, 32, 90)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match=r"\(24, 17, 3\) and \(24, 16, 3\)"):
        metric(image(0), image(0, (24, 16, 3)))


def test_ssim_of_an_image_below_the_window():
    with pytest.raises(ValueError, match=r"\(6, 17\).*window of 7"):
        ssim(image(0, (6, 17, 3)), image(1, (6, 17, 3)))
    assert -1 <= ssim(image(0, (7, 7, 3)), image(1, (7, 7, 3))) <= 1
