"""RobuQ (arXiv 2509.23582) in float64 numpy; no code of the package."""

import itertools
import math

import numpy as np
from scipy.integrate import quad


def ternary(w):
    """(γ · {−1, 0, 1}, smallest margin of each row): γ the mean magnitude of a row, round(w / γ) kept in −1..1."""
    gamma = np.abs(w).mean(1, keepdims=True)
    scaled = np.abs(w) / np.where(gamma > 0, gamma, 1)
    return gamma * np.where(scaled > 0.5, np.sign(w), 0), np.abs(scaled - 0.5)


def uniform(v, bits, step):
    """(v̂, margins): 2ᵇ levels (i + ½) · step · rms of each token, symmetric, without zero."""
    size = step * np.sqrt((v**2).mean(1, keepdims=True))
    scaled = np.abs(v) / np.where(size > 0, size, 1)
    index = np.minimum(np.floor(scaled), 2 ** (bits - 1) - 1)
    margin = np.minimum(np.abs(scaled - np.round(scaled)), scaled)
    return np.where(v < 0, -1, 1) * (index + 0.5) * size, np.where(size > 0, margin, 1)


def distortion(bits, step):
    """Mean squared error of those levels on a unit Gaussian."""
    half = 2 ** (bits - 1)
    edges = [*(i * step for i in range(half)), np.inf]

    def error(x, level):
        return (x - level) ** 2 * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    return 2 * sum(quad(error, a, b, args=((i + 0.5) * step,))[0] for i, (a, b) in enumerate(itertools.pairwise(edges)))


def linear(x, signs, hadamard, basis, w_hat, low_rank, bias, bits, step):
    """(y, margins of the tokens)."""
    v = x * signs @ hadamard
    v_hat, margins = (v, np.ones(v.shape)) if bits == 16 else uniform(v, bits, step)
    return v_hat @ w_hat.T + (x @ basis) @ low_rank.T + bias, margins.min(1)


def best_allocation(costs, layers, average):
    """The least sum of costs over every choice within the budget; None if there is none."""
    sums = [
        sum(site[b] for site, b in zip(costs, bits, strict=True))
        for bits in itertools.product(*costs)
        if sum(n * b for n, b in zip(layers, bits, strict=True)) <= average * sum(layers) + 1e-9
    ]
    return min(sums) if sums else None
