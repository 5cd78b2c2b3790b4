"""OrbitQuant (arXiv 2607.02461) in float64 numpy, from its equations; no code is shared with the package.

A row of unit norm, rotated, has coordinates of density f(z) ∝ (1 − z²)^((K − 3) / 2) on [−1, 1]. Rows of W and tokens
are divided by their norms, permuted, sign-flipped, rotated by the widest Hadamard blocks that divide K and rounded to
the Lloyd–Max codebook of f; the product is multiplied by both norms.
"""

from itertools import pairwise

import numpy as np
from scipy.integrate import quad
from scipy.special import betainc, gammaln
from scipy.stats import norm


def peak(k):
    """f(0)."""
    return np.exp(gammaln(k / 2) - gammaln((k - 1) / 2)) / np.sqrt(np.pi)


def density(z, k):
    """f, normalized: Γ(K/2) / (√π Γ((K − 1)/2)) (1 − z²)^((K − 3)/2)."""
    return peak(k) * np.exp((k - 3) / 2 * np.log1p(-np.minimum(z * z, 1 - 1e-300)))


def moment(power, low, high, k):
    """∫ zᵖ f(z) dz from `low` to `high`, cut where f is below 1e-40 of its peak."""
    edge = min(1.0, 14 / np.sqrt(k))
    low, high = min(low, edge), min(high, edge)
    return quad(lambda z: z**power * density(z, k), low, high, epsabs=1e-16, epsrel=1e-12, limit=200)[0]


def between(cuts, k):
    """∫ f(z) dz and ∫ z f(z) dz between neighbouring cuts in [0, 1], from their antiderivatives."""
    mass = betainc(1 / 2, (k - 1) / 2, cuts**2) / 2
    first = peak(k) * (1 - cuts**2) ** ((k - 1) / 2) / (1 - k)
    return np.diff(mass), np.diff(first)


def thresholds(positive):
    return np.concatenate([[0], (positive[1:] + positive[:-1]) / 2, [1.0]])


def lloyd_max(bits, k, tolerance=1e-6):
    """The 2ᵇ⁻¹ positive centroids of the symmetric codebook, by Lloyd's iteration."""
    n = 2 ** (bits - 1)
    # Where a fine codebook ends up: the quantiles of the cube root of a Gaussian density.
    positive = np.sqrt(3 / k) * norm.ppf(0.5 + (np.arange(n) + 0.5) / (2 * n))
    while True:
        cuts = thresholds(positive)
        mass, first = between(cuts, k)
        new = first / mass
        if np.abs(new - positive).max() < tolerance / np.sqrt(k):
            return new
        positive = new


def distortion(positive, k):
    """K · E(z − ẑ)², relative to a unit coordinate, for the symmetric codebook ±positive."""
    cuts = thresholds(np.sort(positive))
    total = 0.0
    for c, (a, b) in zip(np.sort(positive), pairwise(cuts), strict=True):
        total += moment(2, a, b, k) - 2 * c * moment(1, a, b, k) + c * c * moment(0, a, b, k)
    return 2 * k * total


def rotation(signs, permutation):
    """Π [K, K] with v = x Π: permute, flip, block Hadamard of the largest power of two that divides K."""
    k = len(signs)
    block = 1
    while k % (2 * block) == 0:
        block *= 2
    h = np.array([[1.0]])
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    permute = np.zeros((k, k))
    permute[permutation, np.arange(k)] = 1
    return permute @ np.diag(signs) @ np.kron(np.eye(k // block), h / np.sqrt(block))


def quantize_rows(a, codebook):
    """(â, margin): rows normalized, each coordinate to the nearest of `codebook`, rescaled; margin times √K."""
    length = np.linalg.norm(a, axis=1, keepdims=True)
    unit = np.divide(a, length, out=np.zeros_like(a), where=length > 0)
    distance = np.abs(unit[..., None] - codebook)
    two = np.sort(distance, axis=-1)[..., :2]
    margin = (two[..., 1] - two[..., 0]) / 2 * np.sqrt(a.shape[1])
    return length * codebook[distance.argmin(-1)], margin


def linear(x, w, bias, signs, permutation, activation_codebook, weight_codebook):
    """y = x̂ Ŵᵀ + b, and the margins of the tokens' and the weights' decisions; a codebook of None leaves 16 bit."""
    pi = rotation(signs, permutation)
    v, m_x = x @ pi, np.full(x.shape, 1.0)
    if activation_codebook is not None:
        v, m_x = quantize_rows(v, activation_codebook)
    u, m_w = quantize_rows(w @ pi, weight_codebook)
    return v @ u.T + bias, m_x, m_w
