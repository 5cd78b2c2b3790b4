"""The equations of the ops in float64 and NumPy, written from their definition; shares no code with the package."""

import math

import numpy as np

MAGNITUDES = np.array([4, 13, 22, 32, 44, 56, 72, 96])


def bf16(values):
    """Round float64 to bfloat16, ties to even."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def hadamard(n):
    """Normalized Sylvester Hadamard matrix by its recursion."""
    if n == 1:
        return np.ones((1, 1))
    half = hadamard(n // 2)
    return np.block([[half, half], [half, -half]]) / math.sqrt(2)


def rotate(x, z, basis, signs, block):
    """v = (x − z Uᵀ) D H for a given z."""
    v = x - z @ basis.T if basis is not None else x.copy()
    if signs is None:
        return v
    h = hadamard(block)
    v = v * signs
    return np.concatenate([part @ h for part in np.split(v, v.shape[1] // block, axis=1)], axis=1)


def _divide(v, scale):
    return np.divide(v, scale[:, None], out=np.zeros_like(v), where=scale[:, None] > 0)


def factor(mode, k):
    return 1 / 36 if mode == "codebook" else max(7, math.sqrt(k / 128)) / 127


def row_scale(x, basis, mode):
    """A fixed multiple of rms(v), ‖v‖² = ‖x‖² − ‖x U‖² but at least 2⁻¹⁴ ‖x‖²."""
    energy = np.sum(x**2, axis=1)
    if basis is not None:
        energy = np.maximum(energy - np.sum((x @ basis) ** 2, axis=1), energy * 2.0**-14)
    return factor(mode, x.shape[1]) * np.sqrt(energy / x.shape[1])


def codebook(v, scale):
    """Nearest entry of ±MAGNITUDES to v / s; also how far each decision is from a tie."""
    units = _divide(v, scale)
    distance = np.abs(np.abs(units)[..., None] - MAGNITUDES)
    nearest = np.argmin(distance, axis=-1)  # the first of two equals: the smaller magnitude
    two = np.sort(distance, axis=-1)[..., :2]
    codes = np.where(units >= 0, 1, -1) * MAGNITUDES[nearest]
    margin = np.minimum(two[..., 1] - two[..., 0], np.where(units == 0, np.inf, np.abs(units)))
    return codes, margin


def int8(v, scale):
    units = _divide(v, scale)
    codes = np.clip(np.floor(units + 0.5), -127, 127)
    return codes, np.abs(units + 0.5 - np.rint(units + 0.5))


def int4(v, scale):
    """Asymmetric 4 bit per 64 columns with integer step and offset on the int8 grid."""
    units = _divide(v, scale)
    codes, margin = np.empty_like(v), np.empty_like(v)
    for m in range(v.shape[0]):
        for g in range(0, v.shape[1], 64):
            group = units[m, g : g + 64]
            lo, hi = max(group.min(), -128), min(group.max(), 127)
            raw_step = (hi - lo) / 15 + 0.5
            step = min(max(math.floor(raw_step), 1), 17)
            raw_offset = (lo + hi) / 2 - 7.5 * step + 0.5
            offset = min(max(math.floor(raw_offset), -128), 127 - 15 * step)
            raw_q = (group - offset) / step + 0.5
            codes[m, g : g + 64] = step * np.clip(np.floor(raw_q), 0, 15) + offset
            # A step or an offset near a tie can move the whole group.
            whole = min(abs(raw_step - round(raw_step)), abs(raw_offset - round(raw_offset)))
            margin[m, g : g + 64] = np.minimum(np.abs(raw_q - np.rint(raw_q)), whole)
    return codes, margin


PROLOGUES = {"codebook": codebook, "int4": int4, "int8": int8}


def unpack(packed, table):
    """Lattice values [N, K]: column 2j in the low nibble, 2j + 1 in the high."""
    n, half = packed.shape
    values = np.empty((n, 2 * half))
    for j in range(half):
        for row in range(n):
            values[row, 2 * j] = table[int(packed[row, j]) % 16]
            values[row, 2 * j + 1] = table[int(packed[row, j]) // 16]
    return values


def linear_a8(codes, scale, z, packed, weight_scale, low_rank, bias, table):
    y = scale[:, None] * weight_scale[None, :] * (codes @ unpack(packed, table).T)
    return y + (0 if z is None else z @ low_rank.T) + (0 if bias is None else bias)


def gelu(y):
    """Hendrycks and Gimpel's tanh form (arXiv 1606.08415)."""
    return y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))


def grouped_weight(packed, weight_scale, table):
    """Unrounded W4A16 weight; weight_scale [N, 1] or [N, K/64]."""
    values = unpack(packed, table)
    return values * np.repeat(weight_scale, values.shape[1] // weight_scale.shape[1], axis=1)
