"""NVFP4 and NF4 from their definitions, in float64 numpy; no code of the package."""

import numpy as np
from scipy.stats import norm


def minifloat(code, exponent_bits, mantissa_bits, bias):
    """The value of a code: sign, exponent, mantissa; exponent 0 is subnormal."""
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
    exponent = code >> mantissa_bits & 2**exponent_bits - 1
    mantissa = (code & 2**mantissa_bits - 1) / 2**mantissa_bits
    return sign * (mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))


E2M1 = np.array([minifloat(c, 2, 1, 1) for c in range(16)])
E4M3 = np.array([minifloat(c, 4, 3, 7) for c in range(0x7F)])


def nearest(x, table):
    """Code of the nearest entry, of two the even one, and how far from a tie x is."""
    distance = np.abs(x - table)
    order = np.lexsort((np.arange(len(table)) % 2, distance))
    return order[0], distance[order[1]] - distance[order[0]]


def quantized(row, largest=None):
    """(values, smallest margin) of one row in NVFP4 with s of its largest value; margins relative to the step."""
    s = np.float64(np.float32(np.abs(row).max() if largest is None else largest) / np.float32(6 * 448))
    out, margin = np.zeros_like(row), np.inf
    if s < np.finfo(np.float32).tiny:
        return out, margin
    for start in range(0, len(row), 16):
        block = row[start : start + 16] / s
        code, slack = nearest(min(np.abs(block).max() / 6, 448), E4M3)
        beta = E4M3[code]
        margin = min(margin, slack / max(beta, 2**-9))
        for j, x in enumerate(block):
            if beta:
                c, slack = nearest(min(abs(x) / beta, 6), E2M1[:8])
                margin = min(margin, slack)
                out[start + j] = np.copysign(s * beta * E2M1[c], x)
    return out, margin


def dequantized(codes, blocks, scale):
    """ŵ from the bytes: codes uint8 [N, K/2], blocks uint8 [N, K/16], scale [N]."""
    values = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).reshape(len(codes), -1)
    return values * np.repeat(E4M3[blocks], 16, 1) * scale[:, None]


def nf4_levels():
    """QLoRA's construction: quantiles of a Gaussian, eight above 0 and seven below, as shares of the largest."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    return np.sort(np.concatenate([above, below, [0]])) / above.max()
