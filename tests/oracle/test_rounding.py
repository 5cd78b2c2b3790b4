"""GPTQ, nearest rounding and the scale search against the textbook."""

import numpy as np
import pytest
import torch

from dirotq.dirotq_core.codebooks import SCALE_FACTORS, WEIGHT_FORMATS
from dirotq.dirotq_core.rounding import round_gptq, round_nearest

FORMATS = sorted(WEIGHT_FORMATS)
SEARCHED = [n for n in FORMATS if WEIGHT_FORMATS[n].searched]
SIZES = [(1, 64), (33, 128), (7, 192)]


def problem(activations, n, k):
    w = np.random.default_rng(n + k).standard_normal((n, k)) * 0.03
    x = activations(4 * k, k, seed=k)
    return torch.from_numpy(w).float(), torch.from_numpy(x.T @ x / len(x))


def scaled_error(oracle, w, scale, name, importance):
    """Σ_k h_k (w_k − ŵ_k)² per row and group."""
    table, k = oracle.TABLES[name], w.shape[1]
    s = oracle.column_scales(scale, k)
    rounded = table[oracle.nearest(table, oracle.safe_divide(w, s))[0]] * s
    return ((w - rounded) ** 2 * importance).reshape(len(w), scale.shape[1], -1).sum(-1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_gptq_codes(oracle, activations, name, n, k):
    """Every code is the oracle's, unless its value is within 1e-4 of the table's range of a threshold."""
    w, h = problem(activations, n, k)
    got = round_gptq(w, WEIGHT_FORMATS[name], h)
    assert got.fallback is None
    chosen = got.codes.numpy().astype(int)
    table = oracle.TABLES[name]
    codes, margins = oracle.gptq(oracle.array(w), h.numpy(), oracle.array(got.scale), table, chosen)
    close = margins < 1e-4 * np.abs(table).max()
    np.testing.assert_array_equal(codes[~close], chosen[~close])
    assert close.sum() <= max(1, 0.01 * close.size)


@pytest.mark.parametrize("k", [70, 96, 130])
def test_gptq_of_widths_that_fill_no_block(oracle, activations, k):
    w, h = problem(activations, 9, k)
    got = round_gptq(w, WEIGHT_FORMATS["codebook"], h)
    chosen = got.codes.numpy().astype(int)
    codes, margins = oracle.gptq(oracle.array(w), h.numpy(), oracle.array(got.scale), oracle.CODEBOOK, chosen)
    far = margins > 1e-2
    np.testing.assert_array_equal(codes[far], chosen[far])


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_error_equals_the_oracle_s_and_beats_nearest(oracle, activations, name):
    w, h = problem(activations, 24, 128)
    fmt, table, w64 = WEIGHT_FORMATS[name], oracle.TABLES[name], oracle.array(w)

    def loss(codes, scale):
        e = table[codes] * oracle.column_scales(scale, 128) - w64
        return np.trace(e @ h.numpy() @ e.T)

    got, plain = round_gptq(w, fmt, h), round_nearest(w, fmt, h.diagonal())
    scale = oracle.array(got.scale)
    free = loss(oracle.gptq(w64, h.numpy(), scale, table)[0], scale)
    ours = loss(got.codes.numpy().astype(int), scale)
    assert ours == pytest.approx(free, rel=1e-2)
    assert ours < 0.9 * loss(plain.codes.numpy().astype(int), oracle.array(plain.scale))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_nearest_codes(oracle, activations, name, n, k):
    w, _ = problem(activations, n, k)
    got = round_nearest(w, WEIGHT_FORMATS[name])
    table, s = oracle.TABLES[name], oracle.column_scales(oracle.array(got.scale), k)
    codes, margins = oracle.nearest(table, oracle.array(w) / s)
    far = margins > 1e-5
    np.testing.assert_array_equal(got.codes.numpy()[far], codes[far])


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scale_is_the_best_of_its_grid(oracle, activations, name, weighted):
    w, h = problem(activations, 17, 192)
    fmt = WEIGHT_FORMATS[name]
    importance = h.diagonal() ** 2 if weighted else None
    got = oracle.array(fmt.search_scales(w, importance))
    w64, weight = oracle.array(w), h.diagonal().numpy() ** 2 if weighted else np.ones(192)
    groups = 3 if fmt.grouped else 1
    start = np.sqrt((w64.reshape(17, groups, -1) ** 2).mean(-1)) / fmt.rms
    errors = [scaled_error(oracle, w64, start * f, name, weight) for f in SCALE_FACTORS]
    # Grouped scales are stored, hence searched, in bfloat16.
    rounding = 2.0**-8 if fmt.grouped else 1e-5
    assert np.abs(got[..., None] / (start[..., None] * np.array(SCALE_FACTORS)) - 1).min(-1).max() < rounding
    best = np.min(errors, axis=0)
    np.testing.assert_allclose(scaled_error(oracle, w64, got, name, weight), best, rtol=0.05 if fmt.grouped else 1e-3)
