"""NVFP4 and NF4 as rows of the table, against their definitions in float64."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dirotq.dirotq_core.activations import ACTIVATION_FORMATS, fake_quantize
from dirotq.dirotq_core.build import solved_modules
from dirotq.dirotq_core.config import DiRotQConfig
from dirotq.dirotq_core.float4 import NF4, NVFP4, NormalFloat4
from dirotq.dirotq_core.input_site import SiteMemo
from dirotq.dirotq_core.layout import SitePlan
from dirotq.dirotq_core.solve import solve_site


def _load():
    spec = importlib.util.spec_from_file_location("dirotq_float4", Path(__file__).with_name("float4.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FLOAT4 = _load()


def built(method, k, bits):
    torch.manual_seed(3)
    model = nn.ModuleDict({"q": nn.Linear(k, 24), "k": nn.Linear(k, 16)})
    config = DiRotQConfig(method=method, activation_bits=bits).resolved(calibrated=False)
    plan = SitePlan(("q", "k"), k, (24, 16), 0, True, method, seed=7)
    solved = solve_site(plan, config, [m.weight.data for m in model.values()], None)
    return model, solved_modules(model, plan, solved, config, SiteMemo())


def test_the_levels_of_nf4():
    np.testing.assert_allclose(NF4, FLOAT4.nf4_levels(), atol=3e-7)


def test_nf4_weights(oracle):
    model, quantized = built("nf4", 192, 16)
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(0))
    for name, linear in quantized.items():
        w = oracle.array(model[name].weight)
        scale = linear.weight_scale.double().numpy()
        np.testing.assert_allclose(scale, np.abs(w.reshape(len(w), -1, 64)).max(2), rtol=2**-8)
        scaled = w / np.repeat(scale, 64, 1)
        distance = np.abs(scaled[:, :, None] - FLOAT4.nf4_levels())
        expected = FLOAT4.nf4_levels()[distance.argmin(2)] * np.repeat(scale, 64, 1)
        clear = np.diff(np.sort(distance, 2)[:, :, :2])[:, :, 0] > 1e-5
        assert clear.mean() > 0.99
        got = oracle.array(linear.dequantized_weight())
        np.testing.assert_allclose(got[clear], expected[clear], atol=1e-6)
        y = oracle.array(x) @ got.T + oracle.array(model[name].bias)
        np.testing.assert_allclose(oracle.array(linear(x)), y, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 16])
def test_an_nvfp4_linear(oracle, activations, bits):
    """Every token and row without a close decision is the definition's; activations have a scale of each token."""
    k = 192
    model, quantized = built("nvfp4", k, bits)
    x = torch.from_numpy(activations(40, k, seed=2)).float()
    x[3] = 0
    tokens = [FLOAT4.quantized(row) if bits == 4 else (row, 1) for row in oracle.array(x)]
    x_hat, clear_tokens = np.stack([t[0] for t in tokens]), np.array([t[1] for t in tokens]) > 1e-5
    largest = max(float(m.weight.detach().abs().max()) for m in model.values())
    for name, linear in quantized.items():
        rows = [FLOAT4.quantized(row, largest) for row in oracle.array(model[name].weight)]
        w_hat, clear = np.stack([r[0] for r in rows]), np.array([r[1] for r in rows]) > 1e-5
        assert clear.mean() > 0.8 and clear_tokens.mean() > 0.7
        got = oracle.array(linear.dequantized_weight())
        np.testing.assert_allclose(got[clear], w_hat[clear], rtol=1e-6)
        np.testing.assert_allclose(
            got, FLOAT4.dequantized(*(t.double().numpy() if t.is_floating_point() else t.numpy()
                                      for t in (linear.weight, linear.block_scale, linear.weight_scale))), rtol=1e-6
        )  # fmt: skip
        y = x_hat @ w_hat.T + oracle.array(model[name].bias)
        error = np.abs(oracle.array(linear(x)) - y)[np.ix_(clear_tokens, clear)]
        assert error.max() < 1e-5 * np.sqrt(np.mean(y**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_with_other_weights(activations, dtype):
    """Rounded in floating point where the weights are another format's; the gradient passes straight through."""
    v = torch.from_numpy(activations(20, 64, seed=1)).to(dtype)
    got = fake_quantize(v, ACTIVATION_FORMATS["nvfp4"])
    rows = [FLOAT4.quantized(row) for row in v.double().numpy()]
    clear = np.array([margin for _, margin in rows]) > 1e-5
    assert clear.mean() > 0.8 and got.dtype == dtype
    expected = torch.from_numpy(np.stack([row for row, _ in rows])).to(dtype)
    torch.testing.assert_close(got[clear], expected[clear])
    v.requires_grad_()
    fake_quantize(v, ACTIVATION_FORMATS["nvfp4"]).sum().backward()
    assert (v.grad == 1).all()


@pytest.mark.parametrize("fmt", [NVFP4(), NormalFloat4()])
def test_zero_rows_and_packing(fmt):
    w = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    w[1], w[2, :64] = 0, 0
    got = fmt.nearest(w, None)
    values = fmt.values(fmt.unpack(fmt.pack(got.codes), 128), got.scales)
    assert (values[1] == 0).all() and (values[2, :64] == 0).all() and values.isfinite().all()
    for name, (tail, _) in fmt.scales(128).items():
        assert got.scales[name].shape == (5, *tail)
    assert (values - w).square().sum() < 0.015 * w.square().sum()
