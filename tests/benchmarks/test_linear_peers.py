"""`benchmarks/linear_peers.py` makes linears that stand for the one they are made of."""

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def linear(script):
    return script("linear")


def test_the_published_construction(linear):
    make = torch.Generator().manual_seed(0)
    x, bias = torch.randn(33, 192, generator=make).bfloat16(), torch.randn(65, generator=make).bfloat16()
    weight = (torch.randn(65, 192, generator=make) / 192**0.5).bfloat16()
    run = linear.linear_peers.PEERS["paper"](weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    with torch.no_grad():
        error = run(x).double() - expected
        assert torch.equal(run(x), run(x))
    assert 0.005 < (error.square().sum() / expected.square().sum()).item() < 0.03  # of 4-bit weights and activations


def test_what_is_timed_at_the_limit_of_power(linear):
    """All but our other modes; torchao's int8 is not one of them."""
    peers = linear.linear_peers.PEERS
    ours = [f"{what} {mode}" for mode in ("int4", "int8") for what in ("ours", "rotate_quantize")]
    names = ["bf16", *peers, *ours, "linear_a8"]
    assert linear.of_first_mode(names, ["int4", "int8"]) == ["bf16", *peers, *ours[:2], "linear_a8"]
    assert linear.LEAST_DB.keys() == peers.keys()


def test_a_peer_that_cannot_be_made_is_named(linear, monkeypatch, capsys):
    def refuse(weight, bias):
        raise AttributeError("no such kernel\nfor this GPU")

    monkeypatch.setitem(linear.linear_peers.PEERS, "paper", refuse)
    copy = SimpleNamespace(dense=None, bias=None, peers={})
    assert not linear.attempt_peer("paper", [copy])
    assert capsys.readouterr().out == "paper is left out: AttributeError: no such kernel\n"
