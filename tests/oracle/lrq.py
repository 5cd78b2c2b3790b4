"""The rest of LRQ-DiT (arXiv 2508.03485) in float64 numpy, with explicit matrices; no code of the package."""

import numpy as np


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def step(column, signs):
    """E D H E of one block."""
    swap = np.eye(len(signs))
    swap[[0, column]] = swap[[column, 0]]
    return swap @ np.diag(signs) @ hadamard(len(signs)) @ swap


def product(columns, signs):
    """One block's rotation; columns that are none end nothing and do nothing."""
    rotation = np.eye(len(signs))
    for column in columns:
        if column < len(signs):
            rotation = rotation @ step(column, signs)
    return rotation


def block_diagonal(blocks):
    n = len(blocks[0])
    out = np.zeros((n * len(blocks),) * 2)
    for i, b in enumerate(blocks):
        out[i * n : (i + 1) * n, i * n : (i + 1) * n] = b
    return out


def rotation(steps, permutation, signs):
    """R̂₁ P R̂₂ [K, K]."""
    blocks = np.split(signs, steps.shape[1])
    first, second = (block_diagonal([product(c, d) for c, d in zip(s, blocks, strict=True)]) for s in steps)
    return first @ np.eye(len(signs))[:, permutation] @ second


def greedy(tokens, signs, most):
    """The columns of one block's steps: the largest (rms) each time, as many as leave the largest smallest."""
    taken, sizes, x = [], [np.sqrt((tokens**2).mean(0)).max()], tokens
    for _ in range(most):
        column = int(np.sqrt((x**2).mean(0)).argmax())
        x = x @ step(column, signs)
        taken.append(column)
        sizes.append(np.sqrt((x**2).mean(0)).max())
    return taken[: int(np.argmin(sizes))]


def zigzag(sizes, blocks):
    """Columns of each block: dealt by size, forwards and backwards."""
    hands = [[] for _ in range(blocks)]
    for i, column in enumerate(sorted(range(len(sizes)), key=lambda c: -sizes[c])):
        turn, seat = divmod(i, blocks)
        hands[seat if turn % 2 == 0 else blocks - 1 - seat].append(column)
    return [c for hand in hands for c in hand]


def quantize_tokens(x, bits):
    """Uniform, per token: x_q = round((x − min) / s), s = (max − min) / (2ᵇ − 1); and the smallest margin to a tie."""
    low = x.min(1, keepdims=True)
    s = (x.max(1, keepdims=True) - low) / (2**bits - 1)
    exact = (x - low) / np.where(s > 0, s, 1)
    return np.floor(exact + 0.5) * s + low, np.abs(exact - np.floor(exact) - 0.5)
