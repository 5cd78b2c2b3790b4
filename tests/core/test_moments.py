import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.dirotq_core import moments
from dirotq.dirotq_core.moments import SecondMoment

X = np.random.default_rng(0).standard_normal((120, 12)) * np.arange(1, 13)


def moment_of(parts, diagonal=False, dtype=torch.float32):
    m = SecondMoment(12, diagonal)
    for part in parts:
        m.update(torch.from_numpy(part).to(dtype))
    return m


def expected(x, diagonal):
    return (x**2).mean(0) if diagonal else x.T @ x / len(x)


@pytest.mark.parametrize("diagonal", [False, True])
@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 119), max_size=5, unique=True))
def test_any_split_into_batches_gives_the_same_moment(diagonal, cuts):
    m = moment_of(np.split(X, sorted(cuts)), diagonal)
    assert m.tokens == 120
    np.testing.assert_allclose(m.mean().numpy(), expected(X, diagonal), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 119, 120, 121])
def test_chunks_do_not_show(monkeypatch, chunk, diagonal):
    monkeypatch.setattr(moments, "CHUNK", chunk)
    np.testing.assert_allclose(moment_of([X], diagonal).mean().numpy(), expected(X, diagonal), rtol=1e-5, atol=1e-4)


def test_leading_dimensions_are_tokens():
    m = moment_of([X.reshape(2, 3, 20, 12)])
    assert m.tokens == 120
    np.testing.assert_allclose(m.mean().numpy(), expected(X, False), rtol=1e-5, atol=1e-4)


def test_batches_of_several_dtypes_merge_in_float32():
    """Sums are kept in float32: 16-bit ones would stop growing."""
    m = SecondMoment(12)
    ones = torch.ones(3000, 12)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        m.update(ones.to(dtype))
    assert m.mean().dtype == torch.float32
    assert torch.equal(m.mean(), torch.ones(12, 12))
    assert m.tokens == 12000


def test_non_contiguous_tokens():
    m = SecondMoment(12)
    m.update(torch.from_numpy(X.T.copy()).float().T[::2])
    np.testing.assert_allclose(m.mean().numpy(), expected(X[::2], False), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_bad_batch_raises_and_is_not_added(diagonal, bad):
    m = moment_of([X], diagonal)
    before = m.mean().clone()
    x = torch.ones(5, 12)
    x[3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        m.update(x)
    assert m.tokens == 120
    assert torch.equal(m.mean(), before)


def test_wrong_width_names_both():
    with pytest.raises(ValueError, match=r"width 12, got 13"):
        SecondMoment(12).update(torch.ones(2, 13))


def test_no_tokens_no_mean():
    with pytest.raises(ValueError, match="no calibration tokens"):
        SecondMoment(12).mean()


def test_empty_batches_are_no_tokens():
    m = SecondMoment(12)
    m.update(torch.ones(0, 12))
    with pytest.raises(ValueError, match="no calibration tokens"):
        m.mean()


def test_the_input_is_not_kept_or_changed():
    x = torch.ones(4, 12, requires_grad=True)
    m = SecondMoment(12)
    m.update(x)
    m.update(x)
    assert torch.equal(x, torch.ones(4, 12))
    assert not m.mean().requires_grad
