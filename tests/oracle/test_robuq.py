"""RobuQ: the row of the table, its training and its allocation of bits, against their equations in float64."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dirotq.dirotq_core.activations import ACTIVATION_FORMATS
from dirotq.dirotq_core.allocate import allocate_bits, sensitivities
from dirotq.dirotq_core.build import solved_modules
from dirotq.dirotq_core.config import DiRotQConfig
from dirotq.dirotq_core.input_site import SiteMemo
from dirotq.dirotq_core.layout import SitePlan
from dirotq.dirotq_core.solve import solve_site
from dirotq.dirotq_core.ternary import Ternary
from dirotq.dirotq_core.ternary_training import TernaryLinear, insert, solved, ternary_values


def _load(name):
    spec = importlib.util.spec_from_file_location(f"dirotq_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROBUQ, LRQ = _load("robuq"), _load("lrq")
K, BITS = 192, (1, 2, 3, 4)
CONFIG = DiRotQConfig(method="robuq", activation_bits=4).resolved(calibrated=True)
PLAN = SitePlan(("q", "k"), K, (24, 16), 16, True, "robuq", seed=7)


def step_of(bits):
    return 2 / ACTIVATION_FORMATS[f"uniform_{bits}"].rms


def dense():
    torch.manual_seed(3)
    return nn.ModuleDict({"q": nn.Linear(K, 24), "k": nn.Linear(K, 16)})


def built(bits=4):
    model = dense()
    config = DiRotQConfig(method="robuq", activation_bits=bits).resolved(calibrated=True)
    solution = solve_site(PLAN, config, [m.weight.data for m in model.values()], torch.eye(K))
    return model, solved_modules(model, PLAN, solution, config, SiteMemo())


@pytest.mark.parametrize("bits", BITS)
def test_steps_are_the_best_for_a_gaussian(bits):
    here, narrower, wider = (ROBUQ.distortion(bits, step_of(bits) * f) for f in (1, 0.99, 1.01))
    assert here < narrower and here < wider
    known = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}[bits]  # Max (1960), table II
    assert here == pytest.approx(known, rel=2e-3)


@pytest.mark.parametrize("bits", (*BITS, 16))
def test_the_output_of_a_linear(oracle, activations, bits):
    model, quantized = built(bits)
    x = torch.from_numpy(activations(60, K, seed=2)).float()
    site = {name: oracle.array(t) for name, t in quantized["q"].site.tensors().items()}
    hadamard = LRQ.block_diagonal([LRQ.hadamard(64)] * 3)
    # The branch: leading right singular vectors, of which bfloat16 keeps the plane.
    stacked = np.concatenate([oracle.array(m.weight) for m in model.values()])
    right = np.linalg.svd(stacked)[2][:16]
    assert np.linalg.svd(right @ site["basis"])[1].min() > 0.999
    for name, linear in quantized.items():
        w = oracle.array(model[name].weight)
        u = site["basis"]
        low_rank = w @ u @ np.linalg.inv(u.T @ u)
        np.testing.assert_allclose(oracle.array(linear.low_rank), low_rank, atol=2**-8 * np.abs(low_rank).max())
        w_hat, margins = ROBUQ.ternary((w - low_rank @ u.T) * site["signs"] @ hadamard)
        rows = margins.min(1) > 1e-6
        assert rows.mean() > 0.9
        stored = linear.format.values(linear.format.unpack(linear.weight, K), linear.stored, torch.float64).numpy()
        np.testing.assert_allclose(stored[rows], w_hat[rows], atol=1e-7)
        z = (torch.from_numpy(oracle.array(x) @ u)).bfloat16()  # what the branch reads is 16 bit
        y, clear = ROBUQ.linear(
            oracle.array(x), site["signs"], hadamard, u, stored, 0 * low_rank, oracle.array(model[name].bias), bits,
            step_of(bits) if bits < 16 else None,
        )  # fmt: skip
        y += oracle.array(z) @ oracle.array(linear.low_rank).T
        clear = clear > 1e-5
        assert clear.mean() > 0.7
        error = np.abs(oracle.array(linear(x)) - y)[clear]
        assert error.max() < 1e-2 * np.sqrt(np.mean(y**2)) and np.median(error) < 1e-5 * np.sqrt(np.mean(y**2))


def test_average_bits():
    """1.6 bits a weight, a float32 scale a row."""
    assert Ternary().packed_columns(320) == 64 and Ternary().packed_columns(192) == 39
    _, quantized = built()
    assert quantized["q"].weight.shape == (24, 39) and quantized["q"].weight_scale.shape == (24,)


# --- training -----------------------------------------------------------------------------------------------------


def trainable():
    model = dense()
    return model, insert(model, [PLAN], CONFIG)["q"]


@pytest.mark.parametrize("bits", (*BITS, 16))
def test_what_is_trained_is_what_is_saved(oracle, bits):
    """The trainable linear and the packed one differ by the branch's 16 bits."""
    model, site = trainable()
    site.activation = CONFIG.activation(bits)
    x = torch.randn(50, K, generator=torch.Generator().manual_seed(0))
    before = {name: linear(x).detach() for name, linear in model.items()}
    config = DiRotQConfig(method="robuq", activation_bits=bits).resolved(calibrated=True)
    (solution,) = solved(model, [PLAN], config)
    quantized = solved_modules(model, PLAN, solution, config, SiteMemo())
    for name, y in before.items():
        error = (quantized[name](x) - y).square().mean() / y.square().mean()
        assert float(error) < 1e-4


def test_gradients_pass_straight_through():
    model, site = trainable()
    linear = model["q"]
    assert isinstance(linear, TernaryLinear)
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    (linear(x) * g).sum().backward()
    v, z = site(x.detach())
    w_hat = ternary_values(linear.weight)
    rotation = (torch.eye(K) * site.signs).unflatten(1, (-1, 64)) @ site.hadamard
    expected = g @ w_hat @ rotation.flatten(1).T + g @ linear.low_rank @ site.basis.T
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear.weight.grad, g.T @ v)
    torch.testing.assert_close(linear.low_rank.grad, g.T @ z)
    torch.testing.assert_close(site.basis.grad, x.detach().T @ g @ linear.low_rank, rtol=1e-4, atol=1e-4)


def test_training_brings_it_closer_to_the_original():
    original = dense()["q"]
    model, site = trainable()
    site.activation = "uniform_3"
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model["q"].parameters(), 1e-3)

    def loss():
        x = torch.randn(256, K, generator=g)
        return (model["q"](x) - original(x).detach()).square().mean()

    first = float(loss().detach())
    for _ in range(60):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.8 * first


def test_copies_and_states_of_a_trainable_model():
    model, _ = trainable()
    again = copy.deepcopy(model)
    assert again["q"].site is again["k"].site
    again.load_state_dict(model.state_dict())
    assert len(list(model.parameters())) == 7  # two of each linear's weight, branch and bias, and one basis


def test_another_method_cannot_be_inserted():
    with pytest.raises(ValueError, match="'robuq' with a rank is needed, got 'rtn'"):
        insert(dense(), [PLAN], DiRotQConfig(method="rtn").resolved(calibrated=True))


# --- AMPN ---------------------------------------------------------------------------------------------------------

tables = st.lists(
    st.dictionaries(st.sampled_from(BITS), st.floats(0, 100), min_size=1), min_size=1, max_size=5
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(tables, st.data(), st.floats(1, 4.5))
def test_allocation_against_every_choice(costs, data, average):
    layers = data.draw(st.lists(st.integers(1, 4), min_size=len(costs), max_size=len(costs)))
    best = ROBUQ.best_allocation(costs, layers, average)
    if best is None:
        with pytest.raises(ValueError, match="the fewest there can be"):
            allocate_bits(costs, layers, average)
        return
    bits = allocate_bits(costs, layers, average)
    assert sum(n * b for n, b in zip(layers, bits, strict=True)) <= average * sum(layers) + 1e-9
    assert sum(site[b] for site, b in zip(costs, bits, strict=True)) == pytest.approx(best)


def test_allocation_of_a_large_model_is_quick():
    rng = np.random.default_rng(0)
    costs = [{b: float(4.0**-b * s) for b in BITS} for s in rng.exponential(size=300)]
    bits = allocate_bits(costs, [int(n) for n in rng.integers(1, 5, 300)], 2.5)
    assert set(bits) == set(BITS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 2), "0 sites with costs"),
        (([{2: 1.0}], [1, 2], 2), "1 sites with costs and 2 with layers"),
        (([{}], [1], 2), "needs layers and a choice"),
        (([{2: float("nan")}], [1], 2), "costs numbers"),
        (([{2: 1.0}], [0], 2), "at least 1"),
        (([{1: float("inf")}], [1], 4), "no choice of bits with finite costs has an average of at most 4"),
        (([{1: 0.1, 4: 0.2}, {1: float("inf"), 4: 0.1}], [1, 1], 2), "no choice of bits with finite costs"),
    ],
)
def test_allocation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate_bits(*arguments)


def test_sensitivities_are_those_of_one_site_alone():
    model, site = trainable()
    other, other_site = trainable()
    x = torch.randn(30, K, generator=torch.Generator().manual_seed(0))

    def run():
        return model["q"](x) + 3 * other["q"](x)

    before = site.activation
    got = sensitivities([site, other_site], {b: f"uniform_{b}" for b in BITS}, run)
    assert (site.activation, other_site.activation) == (before, before)
    site.activation = other_site.activation = None
    with torch.no_grad():
        reference = run()
        other_site.activation = "uniform_2"
        assert got[1][2] == pytest.approx(float((run() - reference).double().square().mean()), rel=1e-5)
    assert all(costs[1] > costs[2] > costs[3] > costs[4] > 0 for costs in got)
    assert all(b[2] == pytest.approx(9 * a[2], rel=1e-4) for a, b in [got])
