"""Twin-Log Quantization against its equations in float64."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.dirotq_core import twin_log
from dirotq.dirotq_core.twin_log import ETAS, QUANTILES, TwinLog, twin_log_encode, twin_log_levels

BITS = (2, 3, 4)


def _load():
    spec = importlib.util.spec_from_file_location("dirotq_twin_log", Path(__file__).with_name("twin_log.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ORACLE = _load()


def rounded(w, bits):
    """Ŵ of a row or more, and what is stored."""
    fmt = TwinLog(bits)
    got = fmt.nearest(w, None)
    codes = fmt.unpack(fmt.pack(got.codes), w.shape[1]) if w.shape[1] % 8 == 0 else got.codes
    return fmt.values(codes, got.scales), got


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
def test_the_search_finds_the_grid_s_best(bits, monkeypatch):
    w = rows(7)
    errors = ((rounded(torch.from_numpy(w), bits)[0].double().numpy() - w) ** 2).sum(1)
    best = [ORACLE.best(row.astype(np.float32).astype(np.float64), ETAS[::2], QUANTILES[::3], bits) for row in w]
    assert (errors <= np.array(best) * 1.0001).all()
    monkeypatch.setattr(twin_log, "ETAS", ETAS[::2])
    monkeypatch.setattr(twin_log, "QUANTILES", QUANTILES[::3])
    errors = ((rounded(torch.from_numpy(w), bits)[0].double().numpy() - w) ** 2).sum(1)
    np.testing.assert_allclose(errors, best, rtol=1e-4)


@settings(deadline=None, max_examples=100)
@given(
    row=st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=40),
    bits=st.sampled_from(BITS),
)
def test_levels_are_ordered_and_share_zero(row, bits):
    values, got = rounded(torch.tensor([row]), bits)
    half = 2 ** (bits - 1)
    levels = twin_log_levels(*got.scale.split(1, 1), bits)[0]
    assert levels.isfinite().all() and levels[0] == 0
    assert (levels[:half].diff() >= 0).all() and (levels[half:].diff() >= 0).all() and (levels[half:] <= 0).all()
    assert int(got.codes.max()) < 2 * half
    signs = values[0] * torch.tensor(row)
    assert (signs >= 0).all()


def test_zero_rows_and_rows_of_one_sign():
    w = torch.stack([torch.zeros(64), torch.linspace(0.1, 1, 64), -torch.linspace(0.1, 1, 64)])
    got = rounded(w, 3)[0]
    assert (got[0] == 0).all()
    assert (got[1:] - w[1:]).abs().max() < 0.25
    assert (got[1:] * w[1:] >= 0).all()


def test_more_bits_are_closer_than_uniform_ones_on_long_tails():
    """Its reason to be: at 3 bits below half the error of one uniform grid of max|w|, on Student's t of 4 degrees."""
    w = torch.from_numpy(rows(3, n=4, k=4096)).float()
    errors = {b: float((rounded(w, b)[0] - w).square().sum() / w.square().sum()) for b in BITS}
    assert errors[4] < errors[3] < errors[2]
    step = w.abs().amax(1, keepdim=True) / 3
    uniform = float(((w / step).round() * step - w).square().sum() / w.square().sum())
    assert errors[3] < uniform / 2


@pytest.mark.parametrize("bits", BITS)
def test_what_is_stored_says_the_value(bits):
    """The value of a code by the paper's equation, from η, w₊ and w₋ alone."""
    values, got = rounded(torch.from_numpy(rows(1, n=2)), bits)
    for i, (eta, up, down) in enumerate(got.scale.double().tolist()):
        expected = [ORACLE.dequantize(int(c), eta, up, down, bits) for c in got.codes[i]]
        np.testing.assert_allclose(values[i].numpy(), expected, rtol=1e-5, atol=1e-9)


def test_rows_are_independent_of_how_many_there_are(monkeypatch):
    w = torch.from_numpy(rows(2)).float()
    whole = TwinLog(3).nearest(w, None)
    monkeypatch.setattr(twin_log, "CHUNK", w.shape[1])
    parts = TwinLog(3).nearest(w, None)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scale, parts.scale)


def test_bits_out_of_range():
    with pytest.raises(ValueError, match="codes of 5 bits"):
        TwinLog(5)
