"""The decision of every table is the argmin over its entries; its distortion is the one stated."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from dirotq.dirotq_core.codebooks import WEIGHT_FORMATS
from dirotq.kernels import rotate_quantize

FORMATS = sorted(WEIGHT_FORMATS)


def distance(oracle, name, x):
    """|x − chosen entry| and the smallest |x − entry| over the oracle's table."""
    codes = WEIGHT_FORMATS[name].encode(torch.from_numpy(x)).numpy()
    table = oracle.TABLES[name]
    x = x.astype(np.float64)
    return np.abs(x - table[codes]), np.abs(x[:, None] - table).min(1)


@pytest.mark.parametrize("name", FORMATS)
def test_tables_decode_as_the_format_says(oracle, name):
    decoded = WEIGHT_FORMATS[name].decode(torch.arange(len(oracle.TABLES[name]), dtype=torch.uint8), torch.float64)
    np.testing.assert_array_equal(decoded.numpy(), oracle.TABLES[name])


@pytest.mark.parametrize("name", FORMATS)
def test_decision_is_the_nearest_entry_on_a_dense_grid(oracle, name):
    chosen, best = distance(oracle, name, np.arange(-130 * 256, 130 * 256 + 1, dtype=np.float32) / 256)
    np.testing.assert_array_equal(chosen, best)


@settings(deadline=None, max_examples=300)
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False), name=st.sampled_from(FORMATS))
def test_decision_is_the_nearest_entry_of_any_float(oracle, x, name):
    chosen, best = distance(oracle, name, np.array([x], dtype=np.float32))
    np.testing.assert_array_equal(chosen, best)


@settings(deadline=None, max_examples=100)
@given(
    row=st.lists(st.floats(-1e4, 1e4, width=32), min_size=64, max_size=64),
    factor=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_activation_decision_is_the_nearest_entry(oracle, row, factor):
    x = torch.tensor([row], dtype=torch.float32) * factor
    codes, scale, _ = rotate_quantize(x, None, None, 1, "codebook")
    s = float(np.sqrt(np.mean(oracle.array(x) ** 2)) / 36)
    if s < 1e-15:  # squares near the end of float32: the row may count as zero, or its mean as one step of that
        step = 2.0**-149
        assert float(scale) <= np.sqrt(s**2 + step / 36**2) * (1 + 1e-3)
        return
    assert float(scale) == pytest.approx(s, rel=1e-5)
    units = oracle.array(x)[0] / float(scale)
    chosen = np.abs(units - oracle.array(codes)[0])
    best = np.abs(units[:, None] - oracle.CODEBOOK).min(1)
    assert np.isin(oracle.array(codes), oracle.CODEBOOK).all()
    assert (chosen <= best + 1e-4 * (1 + np.abs(units))).all()


def test_distortion_on_a_unit_gaussian(oracle):
    """0.00962 by quadrature between the thresholds that the package's own decisions show."""
    fmt = WEIGHT_FORMATS["codebook"]
    grid = np.linspace(-8, 8, 1_600_001)
    rounded = fmt.decode(fmt.encode(torch.from_numpy(grid * fmt.rms)), torch.float64).numpy() / fmt.rms
    measured = np.trapezoid((grid - rounded) ** 2 * norm.pdf(grid), grid)
    thresholds = [0, *(oracle.POSITIVE[1:] + oracle.POSITIVE[:-1]) / 72, 10]
    exact = 2 * sum(
        quad(lambda x, m=m: (x - m / 36) ** 2 * norm.pdf(x), a, b)[0]
        for m, a, b in zip(oracle.POSITIVE, thresholds[:-1], thresholds[1:], strict=True)
    )
    assert exact == pytest.approx(0.00962, abs=1e-5)
    assert measured == pytest.approx(exact, abs=1e-8)


def test_every_entry_is_exact_in_int8_and_e4m3(oracle):
    table = torch.from_numpy(oracle.CODEBOOK)
    assert torch.equal(table.to(torch.int8).double(), table)
    assert torch.equal(table.to(torch.float8_e4m3fn).double(), table)
