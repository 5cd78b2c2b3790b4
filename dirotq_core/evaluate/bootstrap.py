"""Paired bootstrap: prompts are drawn again with replacement, the same ones for every model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: Resamples of an interval; its ends move by about 1 % of its width from seed to seed.
RESAMPLES = 10_000
LEVEL = 0.95
#: Values of the table of resampled indices that are made at a time.
CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means over resampled prompts (Efron 1979).

    Args:
        values: [P, M] for P prompts and M quantities; a row is drawn as a whole, which is the pairing.

    Returns:
        [resamples, M] float64.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"finite values [prompts, quantities] are needed, got shape {values.shape}")
    return np.concatenate(list(_parts(values, resamples, seed)))


def _parts(values: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    prompts = len(values)
    size = max(1, CHUNK // prompts)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        picks = generator.integers(prompts, size=(rows, prompts))
        cells = (picks + prompts * np.arange(rows)[:, None]).ravel()
        counts = np.bincount(cells, minlength=rows * prompts).reshape(rows, prompts)
        yield counts.astype(np.float64) @ values / prompts


def intervals(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> list[Interval]:
    """Percentile intervals of the column means of `values` [P, M]. The same `seed` and P draw the same prompts."""
    means = bootstrap_means(values, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(*map(float, row)) for row in zip(np.mean(values, axis=0), low, high, strict=True)]
