"""Loads the oracle, and makes data whose covariance looks like that of a transformer's activations."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def oracle():
    spec = importlib.util.spec_from_file_location("dirotq_oracle", Path(__file__).with_name("oracle.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def activations():
    """activations(m, k, seed, steep): float64 tokens [m, k] with power-law variances in a random rotation."""

    def make(m, k, seed=0, steep=1.0):
        rng = np.random.default_rng(seed)
        rotation = np.linalg.qr(rng.standard_normal((k, k)))[0]
        spread = (1 + np.arange(k)) ** (-steep / 2)
        return rng.standard_normal((m, k)) * spread @ rotation + 0.1 * rng.standard_normal(k)

    return make
