"""Twin-Log Quantization (LRQ-DiT, arXiv 2508.03485) in float64 numpy, weight by weight; no code of the package."""

import itertools
import math

import numpy as np


def quantize(weight, eta, positive, negative, bits):
    """(ŵ, margin) of one weight: a step of log2(|w| + η) above log2 η, and how far the rounding was from a tie."""
    steps = 2 ** (bits - 1) - 1 if weight >= 0 else 2 ** (bits - 1)
    top = positive if weight >= 0 else negative
    if top == 0:
        return 0.0, 0.5
    zero = math.log2(eta)
    scale = (math.log2(top + eta) - zero) / steps
    exact = (math.log2(abs(weight) + eta) - zero) / scale
    index = min(round(exact), steps)
    magnitude = 2 ** (zero + index * scale) - eta
    margin = 0.5 if exact > steps else abs(exact - math.floor(exact) - 0.5)
    return math.copysign(magnitude, weight), margin


def quantize_row(row, share, quantile, bits):
    """Ŵ of one row for one point of the grid, and the smallest margin."""
    largest = np.abs(row).max()
    tops = [np.quantile(side, quantile) if len(side) else 0.0 for side in (row[row > 0], -row[row < 0])]
    pairs = [quantize(w, share * largest if largest else 1.0, *tops, bits) for w in row]
    return np.array([p[0] for p in pairs]), min(p[1] for p in pairs)


def best(row, shares, quantiles, bits):
    """The least squared error over the grid of η and one quantile for each sign."""

    def error(share, up, down):
        positive, negative = (quantize_row(row, share, q, bits)[0] for q in (up, down))
        return np.sum((np.where(row >= 0, positive, negative) - row) ** 2)

    return min(error(*point) for point in itertools.product(shares, quantiles, quantiles))


def dequantize(code, eta, positive, negative, bits):
    """ŵ of a code: W_f = 2^(s (q + z)) with s z = log2 η, less η, of the code's sign."""
    up = code < 2 ** (bits - 1)
    steps = 2 ** (bits - 1) - 1 if up else 2 ** (bits - 1)
    zero = math.log2(eta)
    scale = (math.log2((positive if up else negative) + eta) - zero) / steps
    magnitude = 2 ** (zero + scale * (code if up else 2**bits - code)) - eta
    return magnitude if up else -magnitude
