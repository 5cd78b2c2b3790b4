"""`benchmarks/linear_peers.py` makes linears that stand for the one they are made of."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("linear_peers", "step_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("linear_peers")


def test_the_published_construction(peers):
    make = torch.Generator().manual_seed(0)
    x, bias = torch.randn(33, 192, generator=make).bfloat16(), torch.randn(65, generator=make).bfloat16()
    weight = (torch.randn(65, 192, generator=make) / 192**0.5).bfloat16()
    run = peers.PEERS["paper"](weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    with torch.no_grad():
        error = run(x).double() - expected
        assert torch.equal(run(x), run(x))
    assert 0.005 < (error.square().sum() / expected.square().sum()).item() < 0.03  # of 4-bit weights and activations
