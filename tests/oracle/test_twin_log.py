"""Twin-Log Quantization against its equations in float64."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.dirotq_core.twin_log import ETAS, QUANTILES, round_twin_log, twin_log_encode, twin_log_levels

BITS = (2, 3, 4)


def _load():
    spec = importlib.util.spec_from_file_location("dirotq_twin_log", Path(__file__).with_name("twin_log.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ORACLE = _load()


def rows(seed, n=4, k=96):
    rng = np.random.default_rng(seed)
    return rng.standard_t(4, (n, k)) * 0.03 * np.array([1, 0.1, 3, 1])[:n, None]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("share", [1.0, 0.125, 2.0**-8])
@pytest.mark.parametrize("quantile", [1.0, 0.98])
def test_one_point_of_the_grid(bits, share, quantile):
    """In float64 every weight is the oracle's, unless its rounding is a tie."""
    w = torch.from_numpy(rows(bits))
    eta = share * w.abs().amax(1, keepdim=True)
    tops = [
        torch.tensor([[np.quantile(side, quantile)] for side in sides])
        for sides in ([r[r > 0] for r in w.numpy()], [-r[r < 0] for r in w.numpy()])
    ]
    got = twin_log_levels(eta, *tops, bits).gather(1, twin_log_encode(w, eta, *tops, bits).long())
    for ours, row in zip(got.numpy(), w.numpy(), strict=True):
        expected, margin = ORACLE.quantize_row(row, share, quantile, bits)
        assert margin > 1e-9
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("bits", BITS)
def test_the_search_finds_the_grid_s_best(bits):
    w = rows(7)
    got = round_twin_log(torch.from_numpy(w), bits)
    errors = ((got.dequantize().double().numpy() - w) ** 2).sum(1)
    best = [ORACLE.best(row.astype(np.float32).astype(np.float64), ETAS, QUANTILES, bits) for row in w]
    np.testing.assert_allclose(errors, best, rtol=1e-4)


@settings(deadline=None, max_examples=100)
@given(
    row=st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=40),
    bits=st.sampled_from(BITS),
)
def test_levels_are_ordered_and_share_zero(row, bits):
    got = round_twin_log(torch.tensor([row]), bits)
    half = 2 ** (bits - 1)
    levels = got.levels[0]
    assert levels.isfinite().all() and levels[0] == 0
    assert (levels[:half].diff() >= 0).all() and (levels[half:].diff() >= 0).all() and (levels[half:] <= 0).all()
    assert int(got.codes.max()) < 2 * half
    signs = got.dequantize()[0] * torch.tensor(row)
    assert (signs >= 0).all()


def test_zero_rows_and_rows_of_one_sign():
    w = torch.stack([torch.zeros(64), torch.linspace(0.1, 1, 64), -torch.linspace(0.1, 1, 64)])
    got = round_twin_log(w, 3).dequantize()
    assert (got[0] == 0).all()
    assert (got[1:] - w[1:]).abs().max() < 0.25
    assert (got[1:] * w[1:] >= 0).all()


def test_more_bits_are_closer_than_uniform_ones_on_long_tails():
    """Its reason to be: at 3 bits below half the error of one uniform grid of max|w|, on Student's t of 4 degrees."""
    w = torch.from_numpy(rows(3, n=4, k=4096)).float()
    errors = {b: float((round_twin_log(w, b).dequantize() - w).square().sum() / w.square().sum()) for b in BITS}
    assert errors[4] < errors[3] < errors[2]
    step = w.abs().amax(1, keepdim=True) / 3
    uniform = float(((w / step).round() * step - w).square().sum() / w.square().sum())
    assert errors[3] < uniform / 2


def test_bits_out_of_range():
    with pytest.raises(ValueError, match="codes of 5 bits"):
        round_twin_log(torch.ones(1, 8), 5)
