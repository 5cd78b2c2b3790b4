"""`fake_quantize` against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.dirotq_core.activations import ACTIVATION_FORMATS, fake_quantize

#: NVFP4 has an oracle of its own (`tests/oracle/test_float4.py`).
GROUPED = [n for n, f in ACTIVATION_FORMATS.items() if not f.lattice and not f.float4]


def width(fmt, k):
    """Columns that share a scale."""
    return 64 if fmt.grouped else k


def reference(v, bits, symmetric, width):
    """Levels of each `width` columns, one after the other."""
    out = np.empty_like(v)
    for m in range(v.shape[0]):
        for start in range(0, v.shape[1], width):
            group = v[m, start : start + width]
            if symmetric:
                low, step = 0.0, np.abs(group).max() / (2 ** (bits - 1) - 1)
            else:
                low, step = group.min(), (group.max() - group.min()) / (2**bits - 1)
            q = np.round((group - low) / step) if step else 0 * group
            out[m, start : start + width] = low + q * step
    return out


def tokens(seed, m=5, k=192):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, k)) * np.exp(rng.standard_normal((m, 1)) * 3) + rng.standard_normal()


@pytest.mark.parametrize("name", GROUPED)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_against_numpy(name, seed):
    fmt, v = ACTIVATION_FORMATS[name], tokens(seed).astype(np.float32)
    got = fake_quantize(torch.from_numpy(v), fmt).double().numpy()
    expected = reference(v.astype(np.float64), fmt.bits, fmt.symmetric, width(fmt, v.shape[1]))
    span = (v.max(1) - v.min(1))[:, None] + np.abs(v).max(1)[:, None]
    far = np.abs(got - expected) > 1e-5 * span
    assert far.mean() < 0.01  # ties that float32 decides the other way
    assert (np.abs(got - expected) <= span / (2 ** (fmt.bits - 1) - 1)).all()


@pytest.mark.parametrize("name", GROUPED)
def test_error_is_at_most_half_a_step(name):
    fmt, v = ACTIVATION_FORMATS[name], torch.from_numpy(tokens(3))
    groups = v.unflatten(1, (-1, width(fmt, v.shape[1])))
    if fmt.symmetric:
        step = groups.abs().amax(2) / (2 ** (fmt.bits - 1) - 1)
    else:
        step = (groups.amax(2) - groups.amin(2)) / (2**fmt.bits - 1)
    error = (fake_quantize(v, fmt) - v).unflatten(1, groups.shape[1:]).abs().amax(2)
    assert (error <= 0.5001 * step + 1e-6).all()


@pytest.mark.parametrize("name", GROUPED)
def test_at_most_two_to_the_bits_levels(name):
    fmt = ACTIVATION_FORMATS[name]
    v = torch.linspace(-1, 1, 64).reshape(1, 64).repeat(1, 3) * torch.tensor([1.0, 5, 9]).repeat_interleave(64)
    got = fake_quantize(v, fmt)
    assert all(len(g.unique()) <= 2**fmt.bits for g in got.unflatten(1, (-1, width(fmt, v.shape[1])))[0])


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("value", [0.0, 3.0, -7.5, 1e-20])
def test_constant_tokens_are_exact(name, value):
    v = torch.full((2, 128), value)
    torch.testing.assert_close(fake_quantize(v, ACTIVATION_FORMATS[name]), v, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_shape_are_kept(name, dtype):
    v = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = fake_quantize(v, ACTIVATION_FORMATS[name])
    assert got.dtype == dtype and got.shape == v.shape
    exact = fake_quantize(v.float(), ACTIVATION_FORMATS[name])
    assert torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("name", GROUPED)
def test_the_gradient_passes_straight_through(name):
    v = torch.randn(2, 64, requires_grad=True)
    got = fake_quantize(v, ACTIVATION_FORMATS[name])
    (got * torch.arange(64)).sum().backward()
    assert torch.equal(v.grad, torch.arange(64.0).expand(2, -1))
    torch.testing.assert_close(got.detach(), fake_quantize(v.detach(), ACTIVATION_FORMATS[name]))


@pytest.mark.parametrize("name", GROUPED)
def test_groups_and_tokens_do_not_touch_each_other(name):
    fmt, v = ACTIVATION_FORMATS[name], torch.from_numpy(tokens(5)).float()
    disturbed = v.clone()
    first = width(fmt, v.shape[1])
    disturbed[0, :first] *= 1e4
    got, other = fake_quantize(v, fmt), fake_quantize(disturbed, fmt)
    assert torch.equal(got[0, first:], other[0, first:])
    assert torch.equal(got[1:], other[1:])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_shift_makes_codes_unsigned(bits):
    """Groups with a positive shift c: step max|v + c| / (2ᵇ − 1), codes from 0, c taken off; others as without."""
    fmt = ACTIVATION_FORMATS["sym_g64" if bits == 4 else "sym_g64_8"]
    rng = np.random.default_rng(2)
    v = np.concatenate([rng.standard_normal((7, 64)), np.abs(rng.standard_normal((7, 64))) - 0.2], 1).astype(np.float32)
    shift = np.concatenate([np.zeros(64), rng.uniform(0.2, 0.4, 64)]).astype(np.float32)
    got = fake_quantize(torch.from_numpy(v), fmt, torch.from_numpy(shift)).double().numpy()
    np.testing.assert_array_equal(got[:, :64], fake_quantize(torch.from_numpy(v[:, :64].copy()), fmt).double().numpy())
    moved = v[:, 64:].astype(np.float64) + shift[64:]
    step = np.abs(moved).max(1, keepdims=True) / (2**bits - 1)
    expected = np.clip(np.round(moved / step), 0, 2**bits - 1) * step - shift[64:]
    far = np.abs(got[:, 64:] - expected) > 1e-5
    assert far.mean() < 0.01 and (np.abs(got[:, 64:] - expected) <= step * 1.001).all()
    assert np.abs(got[:, 64:] - v[:, 64:]).max() <= step.max() * 0.501
