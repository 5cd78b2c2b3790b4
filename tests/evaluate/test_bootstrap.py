"""The bootstrap: exact where all resamples can be listed, and its intervals cover what they should."""

from itertools import product

import numpy as np
import pytest

from dirotq.dirotq_core.evaluate import bootstrap
from dirotq.dirotq_core.evaluate.bootstrap import bootstrap_means, intervals


def test_the_distribution_is_that_of_all_resamples():
    """Three prompts have 27 equally likely resamples; their means are listed here."""
    values = np.array([1.0, 2.0, 10.0])
    exact = np.array([np.mean(values[list(picks)]) for picks in product(range(3), repeat=3)])
    means = bootstrap_means(values[:, None], 60_000)[:, 0]
    for level in np.unique(exact):
        assert np.mean(means <= level + 1e-9) == pytest.approx(np.mean(exact <= level + 1e-9), abs=0.008)


def test_prompts_are_drawn_together():
    """Columns that differ by a constant differ by it in every resample."""
    x = np.random.default_rng(0).normal(size=40)
    means = bootstrap_means(np.stack([x, x + 3, -x], axis=1), 500)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 3, atol=1e-12)
    np.testing.assert_allclose(means[:, 2], -means[:, 0], atol=1e-12)


@pytest.mark.parametrize("draw", [lambda g, n: g.normal(2, 3, n), lambda g, n: g.exponential(2, n)])
def test_coverage(draw):
    """About 95 % of the intervals of 60 prompts hold the true mean, 2: a little fewer, and fewer where it is skewed."""
    generator, repeats = np.random.default_rng(1), 600
    samples = np.stack([draw(generator, 60) for _ in range(repeats)], axis=1)
    found = intervals(samples, 800)
    covered = np.mean([i.low <= 2 <= i.high for i in found])
    assert 0.90 < covered < 0.97


def test_width_is_that_of_the_normal_approximation():
    x = np.random.default_rng(2).normal(0, 1, (400, 1))
    (found,) = intervals(x)
    assert found.high - found.low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.06)
    assert found.mean == pytest.approx(x.mean())


def test_a_pairing_that_matters():
    """Prompts differ much and models little: only the paired interval of the difference sees it."""
    generator = np.random.default_rng(3)
    hard = generator.normal(25, 8, 100)
    a, b = hard + generator.normal(0.3, 0.5, 100), hard + generator.normal(0, 0.5, 100)
    first, second, difference = intervals(np.stack([a, b, a - b], axis=1), 2000)
    assert first.low < second.high and difference.low > 0


def test_the_size_of_the_parts_changes_nothing(monkeypatch):
    """Whole numbers, whose sums are exact: how BLAS rounds depends on the number of rows on some processors."""
    x = np.random.default_rng(4).integers(-50, 51, size=(30, 2))
    whole = bootstrap_means(x, 100)
    monkeypatch.setattr(bootstrap, "CHUNK", 30 * 7)
    np.testing.assert_array_equal(bootstrap_means(x, 100), whole)


@pytest.mark.parametrize("values", [np.zeros((0, 1)), np.zeros(3), np.array([[np.nan]]), np.array([[np.inf]])])
def test_what_it_cannot_resample(values):
    with pytest.raises(ValueError, match="finite values"):
        intervals(values)
