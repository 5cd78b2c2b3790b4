"""Tests marked `gpu` are deselected where no CUDA GPU is found, rather than listed as skipped by the hundred."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    left_out = [item for item in items if here in item.path.parents and item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def nothing_repeated():
    """Tests here compare kernels and change what chooses them: every call runs the op itself."""
    from dirotq.kernels import replay

    replay.enable(False)


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors of the CPU pass for a GPU's, and calls are repeated."""
    from dirotq.kernels import launch, replay

    monkeypatch.setattr(replay, "_launches", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(launch, "_variants", {})
    replay.enable(True)
    yield
    replay.enable(False)
