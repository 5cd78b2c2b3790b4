"""LRQ-DiT as a row of the table, against its own equations in float64."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dirotq.dirotq_core.adaptive import ADAPTIVE_ROTATION, GREEDY_STEPS, NO_STEP, fluctuation, zigzag
from dirotq.dirotq_core.build import solved_modules
from dirotq.dirotq_core.config import DiRotQConfig
from dirotq.dirotq_core.input_site import SiteMemo
from dirotq.dirotq_core.layout import SitePlan
from dirotq.dirotq_core.solve import solve_site
from dirotq.dirotq_core.transforms import SiteStatistics


def _load(name):
    spec = importlib.util.spec_from_file_location(f"dirotq_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LRQ, TWIN_LOG = _load("lrq"), _load("twin_log")


def tokens(k, outliers, seed=0, m=600):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) @ (np.eye(k) + 0.2 * rng.standard_normal((k, k)) / np.sqrt(k))
    x[:, rng.choice(k, 5, replace=False)] *= outliers
    return x


def prepared(x, seed=5):
    moment = torch.from_numpy(x.T @ x / len(x))
    site = SiteStatistics(x.shape[1], [], seed, 0, "pca", moment)
    return ADAPTIVE_ROTATION.prepare(site), moment


@pytest.mark.parametrize("k", [64, 192, 256, 640])
@pytest.mark.parametrize("outliers", [1, 30])
def test_the_rotation_is_that_of_its_steps(k, outliers):
    x = tokens(k, outliers)
    t, _ = prepared(x)
    dense = LRQ.rotation(t["steps"].numpy(), t["permutation"].numpy(), t["signs"].numpy().astype(float))
    np.testing.assert_allclose(dense @ dense.T, np.eye(k), atol=1e-12)
    v, z = ADAPTIVE_ROTATION.apply(torch.from_numpy(x), t)
    assert z.shape == (len(x), 0)
    np.testing.assert_allclose(v.numpy(), x @ dense, atol=1e-10)


def test_fluctuation_is_the_papers():
    x = tokens(128, 9).reshape(3, 200, 128)
    flat = x.reshape(-1, 128)
    expected = np.linalg.norm(x) / np.sqrt(np.prod(x.shape))
    assert fluctuation(torch.from_numpy(flat.T @ flat / len(flat))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [64, 192, 256])
def test_below_one_it_is_a_random_hadamard(k):
    x = tokens(k, 1)
    x *= 0.999 / np.sqrt((x**2).mean())
    t, _ = prepared(x)
    n = 64 if k % 128 else 128
    signs = t["signs"].numpy().astype(float)
    expected = x * signs @ LRQ.block_diagonal([LRQ.hadamard(n)] * (k // n))
    np.testing.assert_allclose(ADAPTIVE_ROTATION.apply(torch.from_numpy(x), t)[0].numpy(), expected, atol=1e-10)
    free = ADAPTIVE_ROTATION.prepare(SiteStatistics(k, [], 5, 0, "pca", None))
    assert all(torch.equal(free[name], t[name]) for name in t)


@pytest.mark.parametrize("k", [256, 640])
def test_from_one_on_the_steps_are_the_greedy_ones(k):
    x = tokens(k, 40, seed=k)
    x *= 1.001 / np.sqrt((x**2).mean())
    t, _ = prepared(x)
    steps, order, signs = t["steps"].numpy(), t["permutation"].numpy(), t["signs"].numpy().astype(float)
    blocks = np.split(signs, k // 128)
    for i, part in enumerate(np.split(x, k // 128, axis=1)):
        assert [c for c in steps[0, i] if c != NO_STEP] == LRQ.greedy(part, blocks[i], GREEDY_STEPS)
    rotated = x @ LRQ.block_diagonal([LRQ.product(c, d) for c, d in zip(steps[0], blocks, strict=True)])
    sizes = np.sqrt((rotated**2).mean(0))
    expected = np.array(LRQ.zigzag(sizes, k // 128))
    # Columns that the Hadamard made equal may change places.
    np.testing.assert_allclose(sizes[order], sizes[expected], rtol=1e-9)
    assert sorted(order) == list(range(k))
    for i, part in enumerate(np.split(rotated[:, order], k // 128, axis=1)):
        assert [c for c in steps[1, i] if c != NO_STEP] == LRQ.greedy(part, blocks[i], GREEDY_STEPS)
    v = ADAPTIVE_ROTATION.apply(torch.from_numpy(x), t)[0].numpy()
    assert np.sqrt((v**2).mean(0)).max() < 0.5 * np.sqrt((x**2).mean(0)).max()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_zigzag_deals_to_every_block(blocks, each, seed):
    sizes = np.random.default_rng(seed).permutation(blocks * each).astype(float)
    assert zigzag(torch.from_numpy(sizes), blocks).tolist() == LRQ.zigzag(sizes, blocks)


@pytest.mark.parametrize("outliers", [0.1, 8])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (3, 4), (4, 6), (4, 8), (3, 16)])
def test_the_output_of_a_linear(oracle, weight_bits, activation_bits, outliers):
    """Every token without a close decision is the equations' to float32 precision."""
    k = 256
    x = tokens(k, outliers, seed=3) * (0.5 if outliers < 1 else 1)
    torch.manual_seed(3)
    model = nn.ModuleDict({"q": nn.Linear(k, 24), "k": nn.Linear(k, 16)})
    name = "lrq" if weight_bits == 4 else "lrq_w3"
    config = DiRotQConfig(method=name, activation_bits=activation_bits).resolved(calibrated=True)
    plan = SitePlan(("q", "k"), k, (24, 16), 0, True, name, seed=7)
    moment = torch.from_numpy(x.T @ x / len(x)).float()
    assert (fluctuation(moment) < 1) == (outliers < 1)
    solved = solve_site(plan, config, [m.weight.data for m in model.values()], moment, len(x))
    quantized = solved_modules(model, plan, solved, config, SiteMemo())
    site = {name: t.numpy() for name, t in quantized["q"].site.tensors().items()}
    rotation = LRQ.rotation(site["steps"], site["permutation"], site["signs"].astype(float))
    x = x[:60]
    v = x.astype(np.float32).astype(np.float64) @ rotation
    v_hat, margins = (v, np.ones(v.shape)) if activation_bits == 16 else LRQ.quantize_tokens(v, activation_bits)
    rows = margins.min(1) > 2e-5
    assert rows.mean() > 0.4
    for member, linear in quantized.items():
        assert linear.weight_scale.shape == (linear.out_features, 3)
        w_hat = np.array([
            [TWIN_LOG.dequantize(int(c), *scale, weight_bits) for c in row]
            for row, scale in zip(
                linear.format.unpack(linear.weight, k), linear.weight_scale.double().numpy(), strict=True
            )
        ])  # fmt: skip
        # The codes themselves: what the paper's rounding makes of W R̂₁ P R̂₂ with these scales.
        target = oracle.array(model[member].weight) @ rotation
        for row, w_row, scale in zip(target, w_hat, linear.weight_scale.double().numpy(), strict=True):
            pairs = [TWIN_LOG.quantize(w, *scale, weight_bits) for w in row]
            far = np.array([margin for _, margin in pairs]) > 1e-4
            np.testing.assert_allclose(w_row[far], np.array([value for value, _ in pairs])[far], rtol=1e-5, atol=1e-9)
        expected = v_hat @ w_hat.T + oracle.array(model[member].bias)
        got = oracle.array(linear(torch.from_numpy(x).float()))
        assert np.abs(got - expected)[rows].max() < 2e-5 * np.sqrt(np.mean(expected**2))
