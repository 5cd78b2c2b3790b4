"""OrbitQuant as a row of the table, against its own equations in float64."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dirotq.dirotq_core.activations import ACTIVATION_FORMATS
from dirotq.dirotq_core.build import solved_modules
from dirotq.dirotq_core.codebooks import WEIGHT_FORMATS
from dirotq.dirotq_core.config import DiRotQConfig
from dirotq.dirotq_core.input_site import SiteMemo
from dirotq.dirotq_core.layout import SitePlan
from dirotq.dirotq_core.methods import METHODS
from dirotq.dirotq_core.solve import solve_site
from dirotq.dirotq_core.transforms import TRANSFORMS, SiteStatistics, widest_block

METHOD_OF_BITS = {4: "orbitquant", 3: "orbitquant_w3", 2: "orbitquant_w2"}
SETTINGS = [(4, 4), (4, 6), (3, 3), (2, 4), (2, 16)]
#: Decibels that integers cost against the exact Lloyd–Max codebook, at most (the Gaussian limit).
ACTIVATION_COST = {"codebook": 0.055, "lloyd3": 0.006, "lloyd6": 0.125}
WEIGHT_COST = {"lloyd4": 0.035, "lloyd3": 0.006, "lloyd2": 0.0001}
#: What the Gaussian limit adds at small widths is below this.
WIDTHS = {192: 0.05, 1152: 0.002, 3072: 0.001, 15360: 0.001}


@pytest.fixture(scope="session")
def orbit():
    spec = importlib.util.spec_from_file_location("dirotq_orbitquant", Path(__file__).with_name("orbitquant.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def positive(table, rms):
    return np.array(sorted(t for t in table if t > 0)) / rms


def activation_points(name):
    """Positive entries per root mean square of a token."""
    fmt = ACTIVATION_FORMATS[name]
    return positive(fmt.table, fmt.rms) if fmt.table else positive(WEIGHT_FORMATS["codebook"].table, 36)


def symmetric(points, k):
    return np.concatenate([points, -points]) / np.sqrt(k)


def decibels(points, bits, k, orbit):
    exact = orbit.distortion(orbit.lloyd_max(bits, k), k)
    return 10 * np.log10(orbit.distortion(points / np.sqrt(k), k) / exact)


def test_the_density_is_one_and_has_the_variance_of_a_unit_vector(orbit):
    for k in (64, 192, 1152, 15360):
        assert 2 * orbit.moment(0, 0, 1, k) == pytest.approx(1, rel=1e-9)
        assert 2 * k * orbit.moment(2, 0, 1, k) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("k", [64, 192, 3072, 100_000])
def test_integrals_in_closed_form(orbit, k):
    """As by quadrature."""
    cuts = orbit.thresholds(orbit.lloyd_max(6, k))
    by_quadrature = [[orbit.moment(power, a, b, k) for a, b in pairwise(cuts)] for power in (0, 1)]
    np.testing.assert_allclose(orbit.between(cuts, k), by_quadrature, rtol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_gaussian_limit(orbit, bits):
    """Published: Max (1960), distortion 0.1175, 0.03454 and 0.009497 of a Gaussian."""
    k = 100_000
    known = {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]
    assert orbit.distortion(orbit.lloyd_max(bits, k), k) == pytest.approx(known, rel=1e-3)


@pytest.mark.parametrize("k", sorted(WIDTHS))
@pytest.mark.parametrize("name", sorted(WEIGHT_COST))
def test_what_the_lattice_costs_weights(orbit, name, k):
    fmt = WEIGHT_FORMATS[name]
    cost = decibels(positive(fmt.table, fmt.rms), fmt.bits, k, orbit)
    assert -1e-6 < cost < WEIGHT_COST[name] + WIDTHS[k]


@pytest.mark.parametrize(("name", "k"), [("codebook", 192), ("codebook", 3072), ("lloyd3", 3072), ("lloyd6", 3072)])
def test_what_the_lattice_costs_activations(orbit, name, k):
    cost = decibels(activation_points(name), ACTIVATION_FORMATS[name].bits, k, orbit)
    assert -1e-6 < cost < ACTIVATION_COST[name] + WIDTHS[k]


@pytest.mark.parametrize("name", ["lloyd2", "lloyd3", "lloyd4"])
def test_tables_are_exact_in_int8_and_e4m3(name):
    table = torch.tensor(WEIGHT_FORMATS[name].table, dtype=torch.float64)
    assert torch.equal(table.to(torch.int8).double(), table)
    assert torch.equal(table.to(torch.float8_e4m3fn).double(), table)


@pytest.mark.parametrize("k", [64, 192, 512, 1152])
def test_the_rotation(orbit, oracle, k):
    tensors = TRANSFORMS["permuted_hadamard"].prepare(SiteStatistics(k, [], 5, 0, "pca", None))
    assert sorted(tensors["permutation"].tolist()) == list(range(k))
    assert widest_block(k) == k & -k
    x = torch.from_numpy(np.random.default_rng(k).standard_normal((3, k)))
    v, z = TRANSFORMS["permuted_hadamard"].apply(x, tensors)
    pi = orbit.rotation(oracle.array(tensors["signs"]), tensors["permutation"].numpy())
    assert z.shape == (3, 0)
    np.testing.assert_allclose(v.numpy(), x.numpy() @ pi, atol=1e-12)
    np.testing.assert_allclose(pi @ pi.T, np.eye(k), atol=1e-12)


def built(weight_bits, activation_bits, k, dtype=torch.float32):
    torch.manual_seed(3)
    model = nn.ModuleDict({"q": nn.Linear(k, 24, dtype=dtype), "k": nn.Linear(k, 16, dtype=dtype)})
    name = METHOD_OF_BITS[weight_bits]
    config = DiRotQConfig(method=name, activation_bits=activation_bits).resolved(calibrated=False)
    plan = SitePlan(("q", "k"), k, (24, 16), 0, True, name, seed=7)
    solved = solve_site(plan, config, [m.weight.data for m in model.values()], None)
    return model, solved_modules(model, plan, solved, config, SiteMemo())


@pytest.mark.parametrize("k", [192, 512])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), SETTINGS)
def test_the_output_of_a_linear(orbit, oracle, activations, weight_bits, activation_bits, k):
    """With the package's codebooks, every token without a close decision is the equations' to float32 precision."""
    dense, quantized = built(weight_bits, activation_bits, k)
    x = torch.from_numpy(activations(40, k, seed=2)).float()
    x[3] = 0
    name = METHODS[METHOD_OF_BITS[weight_bits]].activations.get(activation_bits)
    fmt = WEIGHT_FORMATS[METHODS[METHOD_OF_BITS[weight_bits]].weight_format]
    weight_points = symmetric(positive(fmt.table, fmt.rms), k)
    activation_points_ = None if name is None else symmetric(activation_points(name), k)
    site = quantized["q"].site
    for member in ("q", "k"):
        y, m_x, m_w = orbit.linear(
            oracle.array(x), oracle.array(dense[member].weight), oracle.array(dense[member].bias),
            oracle.array(site.tensor("signs")), site.tensor("permutation").numpy(), activation_points_, weight_points,
        )  # fmt: skip
        got = oracle.array(quantized[member](x))
        rows, columns = m_x.min(1) > 1e-5, m_w.min(1) > 1e-5
        rows[3] = True
        assert rows.mean() > 0.8 and columns.mean() > 0.8
        scale = np.sqrt(np.mean(y**2))
        assert np.abs(got - y)[np.ix_(rows, columns)].max() < 2e-5 * scale


@pytest.mark.parametrize("weight_bits", [4, 3, 2])
def test_output_against_the_exact_codebook(orbit, oracle, activations, weight_bits):
    """SQNR of a linear: the lattice costs less than 0.15 dB against Lloyd–Max in float64 on both sides."""
    k, activation_bits = 512, 4
    dense, quantized = built(weight_bits, activation_bits, k)
    x = torch.from_numpy(activations(400, k, seed=6)).float()
    w, bias = oracle.array(dense["q"].weight), oracle.array(dense["q"].bias)
    exact = [np.concatenate([c, -c]) for c in (orbit.lloyd_max(b, k) for b in (activation_bits, weight_bits))]
    site = quantized["q"].site
    signs, permutation = oracle.array(site.tensor("signs")), site.tensor("permutation").numpy()
    reference = oracle.array(x) @ w.T + bias
    ideal = orbit.linear(oracle.array(x), w, bias, signs, permutation, *exact)[0]
    got = oracle.array(quantized["q"](x))
    noise = [np.sum((y - reference) ** 2) for y in (got, ideal)]
    assert abs(10 * np.log10(noise[0] / noise[1])) < 0.15
