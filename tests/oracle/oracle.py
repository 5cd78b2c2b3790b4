"""DiRotQ in float64 numpy, written from the equations and sharing no code with the package.

Slow and literal on purpose: every function is an equation of arXiv 2605.16732 (subspace), of
arXiv 2210.17323 (GPTQ) or of the docstrings of `kernels/ops.py`.
"""

import numpy as np

POSITIVE = np.array([4, 13, 22, 32, 44, 56, 72, 96])
#: code -> lattice value; bit 3 is the sign, bits 0-2 the magnitude.
CODEBOOK = np.array([(-1 if code & 8 else 1) * POSITIVE[code & 7] for code in range(16)], dtype=np.float64)
#: code -> value of a two's complement nibble.
INT4 = np.array([code - 16 if code >= 8 else code for code in range(16)], dtype=np.float64)
TABLES = {
    "codebook": CODEBOOK,
    "codebook_g64": CODEBOOK,
    "int4_g64": INT4,
    "uint4_g64": np.arange(-7, 9, dtype=np.float64),
    "lloyd4": CODEBOOK,
    "lloyd3": np.array([6, 18, 32, 52, -6, -18, -32, -52], dtype=np.float64),
    "lloyd2": np.array([36, 120, -36, -120], dtype=np.float64),
}
GROUP = 64


def array(tensor):
    """A torch tensor of any dtype as float64 numpy."""
    return tensor.detach().double().numpy()


def bf16(x):
    """Nearest number of 8 significand bits, ties to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 256), exponent - 8)


def bf16_margin(x):
    """How far x is from a tie between two bfloat16 numbers, in units of their distance (0 .. 0.5)."""
    scaled = np.frexp(x)[0] * 256
    return np.abs(scaled - np.floor(scaled) - 0.5)


# --- rotations and subspaces ---


def hadamard(n):
    i = np.arange(n)
    parity = np.array([[bin(a & b).count("1") % 2 for b in i] for a in i])
    return (1 - 2 * parity) / np.sqrt(n)


def hadamard_block(k):
    """The largest power of two that divides K, at most 128."""
    block = 1
    while block < 128 and k % (2 * block) == 0:
        block *= 2
    return block


def sign_rotation(signs):
    """D H [K, K] with H block-diagonal."""
    k, block = len(signs), hadamard_block(len(signs))
    h = np.zeros((k, k))
    for start in range(0, k, block):
        h[start : start + block, start : start + block] = hadamard(block)
    return np.diag(signs) @ h


def principal(x, r):
    """Top-r right singular vectors of the data x [M, K]: the PCA basis without forming a covariance."""
    return np.linalg.svd(x, full_matrices=False)[2][:r].T


def residual_product(c, g, u):
    """tr(P C) tr(P G) with P = I - U U^T, for orthonormal U."""
    p = np.eye(len(c)) - u @ u.T
    return np.trace(p @ c) * np.trace(p @ g)


def joint_step(c, g, u):
    """U <- top-r eigenvectors of C / tr(P C) + G / tr(P G)."""
    p = np.eye(len(c)) - u @ u.T
    values, vectors = np.linalg.eigh(c / np.trace(p @ c) + g / np.trace(p @ g))
    return vectors[:, np.argsort(-values)[: u.shape[1]]]


def split(x, site):
    """(v, z, margin) of x [M, K] for the stored tensors of a site, by its kind.

    z is rounded to bfloat16; margin [M] is how far the token's most uncertain z was from a tie.
    """
    v = x / site["smooth"] if "smooth" in site else x
    exact = v @ site["basis"] if "basis" in site else np.zeros((len(x), 0))
    z, margin = bf16(exact), bf16_margin(exact).min(1, initial=0.5)
    if "rotation" in site:
        v = x @ site["rotation"]
    elif "signs" in site:
        v = (x - z @ site["basis"].T if "basis" in site else x) @ sign_rotation(site["signs"])
    return v, z, margin


# --- rounding ---


def nearest(table, value):
    """(code, margin): argmin over the 16 entries, and how far `value` is from the decision threshold."""
    distance = np.abs(np.asarray(value)[..., None] - table)
    two = np.sort(distance, axis=-1)[..., :2]
    return distance.argmin(-1), (two[..., 1] - two[..., 0]) / 2


def column_scales(scale, k):
    """[N, G] -> [N, K]."""
    return np.repeat(scale, k // scale.shape[1], axis=1)


def safe_divide(a, b):
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def gptq(w, h, scale, table, chosen=None, damping=0.01):
    """GPTQ column by column in act order with an explicit inverse of the remaining Hessian at every step.

    Returns codes and margins (table units). With `chosen` codes, errors are propagated from those, so that
    every decision of another implementation can be judged on its own.
    """
    n, k = w.shape
    h = h + damping * np.mean(np.diag(h)) * np.eye(k)
    s, w = column_scales(scale, k), w.copy()
    codes, margins = np.zeros((n, k), int), np.zeros((n, k))
    remaining = list(np.argsort(-np.diag(h), kind="stable"))
    while remaining:
        inverse = np.linalg.inv(h[np.ix_(remaining, remaining)])
        q = remaining[0]
        codes[:, q], margins[:, q] = nearest(table, safe_divide(w[:, q], s[:, q]))
        taken = codes[:, q] if chosen is None else chosen[:, q]
        error = (w[:, q] - table[taken] * s[:, q]) / inverse[0, 0]
        w[:, remaining] -= np.outer(error, inverse[0])
        remaining = remaining[1:]
    return codes, margins


# --- activations: each returns v-hat and, per element, the distance to the nearest decision in code units ---


def tie_distance(x):
    """Distance of x from the next half-integer, where rounding to an integer flips."""
    return np.abs(x - np.floor(x) - 0.5)


def residual_rms(x, site):
    """rms of v [M, 1] by the energies of x and x U, the residual's counting as 2^-14 of x's at least."""
    energy = np.sum(x**2, axis=1, keepdims=True)
    if "basis" in site:
        explained = np.sum((x @ site["basis"]) ** 2, axis=1, keepdims=True)
        energy = np.maximum(energy - explained, energy / 2**14)
    return np.sqrt(energy / x.shape[1])


def activation_codebook(v, rms):
    s = rms / 36
    codes, margin = nearest(CODEBOOK, safe_divide(v, s + 0 * v))
    return s * CODEBOOK[codes], margin


def saturation(v):
    """The largest |v| / rms in range: 7, or that of a single spike spread over 128 columns."""
    return max(7, np.sqrt(v.shape[1] / 128))


def activation_int8(v, rms):
    s = saturation(v) * rms / 127
    units = safe_divide(v, s + 0 * v)
    return s * np.clip(np.round(units), -127, 127), tie_distance(units)


def activation_int4(v, rms):
    """Per 64 columns the integers m in 1..17 and o nearest to the group's span: a = m q + o, q in 0..15."""
    s = saturation(v) * rms[:, :, None] / 127
    groups = v.reshape(len(v), -1, GROUP)
    units = safe_divide(groups, s + 0 * groups)
    low, high = np.maximum(units.min(2, keepdims=True), -128), np.minimum(units.max(2, keepdims=True), 127)
    step, centre = (high - low) / 15, (high + low) / 2
    m = np.clip(np.floor(step + 0.5), 1, 17)
    o = np.minimum(np.maximum(np.floor(centre - 7.5 * m + 0.5), -128), 127 - 15 * m)
    q = (units - o) / m
    margin = np.minimum.reduce([tie_distance(q), tie_distance(step) + 0 * q, tie_distance(centre - 7.5 * m) + 0 * q])
    return (s * (m * np.clip(np.round(q), 0, 15) + o)).reshape(v.shape), margin.reshape(v.shape)


def activation_asymmetric(v, bits):
    """Per 64 columns, 2^b levels from min to max."""
    groups = v.reshape(len(v), -1, GROUP)
    low = groups.min(2, keepdims=True)
    step = (groups.max(2, keepdims=True) - low) / (2**bits - 1)
    q = safe_divide(groups - low, step + 0 * groups)
    return (low + step * np.round(q)).reshape(v.shape), tie_distance(q).reshape(v.shape)


def activation_symmetric(v, bits):
    """Per 64 columns, integers with max|v| at 2^(b-1) - 1."""
    groups = v.reshape(len(v), -1, GROUP)
    step = np.abs(groups).max(2, keepdims=True) / (2 ** (bits - 1) - 1)
    q = safe_divide(groups, step + 0 * groups)
    return (step * np.round(q)).reshape(v.shape), tie_distance(q).reshape(v.shape)


ACTIVATIONS = {
    "codebook": activation_codebook,
    "int4": activation_int4,
    "int8": activation_int8,
    "asym_g64": lambda v, rms: activation_asymmetric(v, 4),
    "asym_g64_8": lambda v, rms: activation_asymmetric(v, 8),
    "sym_g64": lambda v, rms: activation_symmetric(v, 4),
    "sym_g64_8": lambda v, rms: activation_symmetric(v, 8),
    None: lambda v, rms: (v, np.full(v.shape, 0.5)),
}


# --- the packed linear ---


def unpack(packed):
    """Codes [N, K] of bytes [N, K/2]: column 2j in the low nibble, 2j + 1 in the high."""
    codes = np.zeros((packed.shape[0], 2 * packed.shape[1]), int)
    for j in range(packed.shape[1]):
        codes[:, 2 * j] = packed[:, j] % 16
        codes[:, 2 * j + 1] = packed[:, j] // 16
    return codes


def dequantized(packed, scale, table):
    values = table[unpack(packed)]
    return values * column_scales(scale.reshape(len(values), -1), values.shape[1])


def forward(x, site, linear, table, activation):
    """y = v-hat W-hat^T + z L^T + b from stored tensors, and which tokens have a close decision."""
    v, z, z_margin = split(x, site)
    v_hat, margin = ACTIVATIONS[activation](v, residual_rms(x, site))
    y = v_hat @ dequantized(linear["weight"], linear["weight_scale"], table).T
    if "low_rank" in linear:
        y = y + z @ linear["low_rank"].T
    return y + linear.get("bias", 0), (margin.min(1) < 1e-4) | (z_margin < 1e-4)
