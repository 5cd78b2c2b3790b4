"""Marks that tests in several folders carry."""

import pytest
import torch

#: Of a test or a module: it runs on a CUDA GPU only.
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on_gpu(test):
    """`ON_GPU` as a decorator."""
    for mark in ON_GPU:
        test = mark(test)
    return test


def thorough(*values):
    """Parameters of a test that is one more variant of what the default run has: `pytest -m thorough` runs it."""
    return pytest.param(*values, marks=pytest.mark.thorough)
