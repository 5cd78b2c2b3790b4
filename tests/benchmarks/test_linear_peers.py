"""`benchmarks/linear_peers.py` makes linears that stand for the one they are made of."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("matplotlib")
    for name in ("linear", "linear_peers", "step_models", "step_report"):
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


def test_what_is_timed_at_the_limit_of_power(peers):
    """All but our other modes; torchao's int8 is not one of them."""
    linear = importlib.import_module("linear")
    ours = [f"{what} {mode}" for mode in ("int4", "int8") for what in ("ours", "rotate_quantize")]
    names = ["bf16", *peers.PEERS, *ours, "linear_a8"]
    assert linear.of_first_mode(names, ["int4", "int8"]) == ["bf16", *peers.PEERS, *ours[:2], "linear_a8"]
    assert linear.LEAST_DB.keys() == peers.PEERS.keys()


def test_a_peer_that_cannot_be_made_is_named(peers, monkeypatch, capsys):
    linear = importlib.import_module("linear")

    def refuse(weight, bias):
        raise AttributeError("no such kernel\nfor this GPU")

    monkeypatch.setitem(linear.linear_peers.PEERS, "paper", refuse)
    copy = SimpleNamespace(dense=None, bias=None, peers={})
    assert not linear.attempt_peer("paper", [copy])
    assert capsys.readouterr().out == "paper is left out: AttributeError: no such kernel\n"
