"""solve → install → forward of the packed linear, against the formula on the stored tensors in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from dirotq.dirotq_core.build import dequantize_linears, quantized_linears, solved_modules, swapped
from dirotq.dirotq_core.config import DiRotQConfig
from dirotq.dirotq_core.input_site import SiteMemo
from dirotq.dirotq_core.layout import SitePlan
from dirotq.dirotq_core.methods import METHODS
from dirotq.dirotq_core.solve import solve_site

K = 192
ROWS = {"q": 33, "k": 8}
# method, activation format (None: 16 bit), rank
CASES = [
    *(("dirotq", a, r) for a in ("codebook", "int4", "int8", None) for r in (0, 24)),
    *(("hadamard", a, 0) for a in ("codebook", "int4", "int8", None)),
    *(("dirotq", a, 24) for a in ("asym_g64", "asym_g64_8", "sym_g64")),
    *(("paper", a, 64) for a in ("asym_g64", "asym_g64_8", None)),
    *(("svdquant", a, 32) for a in ("sym_g64", "sym_g64_8", None)),
    *(("rtn", a, 0) for a in ("sym_g64", "sym_g64_8", None)),
]


@pytest.fixture(scope="module")
def build(activations):
    """build(method, activation, rank, dtype): a quantized holder of siblings q and k, tokens, dense twins."""

    def make(method, activation, rank, dtype, k=K, weight_only=False, **config):
        torch.manual_seed(0)
        data = activations(8 * k, k, seed=4)
        dense = nn.ModuleDict({n: nn.Linear(k, rows, bias=n == "q", dtype=dtype) for n, rows in ROWS.items()})
        moment = torch.from_numpy(data.T @ data / len(data)).float()
        plan = SitePlan(("q", "k"), k, tuple(ROWS.values()), rank, not weight_only, method, seed=11)
        resolved = DiRotQConfig(method=method, **config).resolved(calibrated=True)
        solved = solve_site(plan, resolved, [m.weight.data for m in dense.values()], moment, len(data))
        model = nn.ModuleDict(dict(dense.items()))
        with swapped(model, solved_modules(model, plan, solved, resolved, SiteMemo())):
            pass
        model["q"].site.activation = activation
        return model, torch.from_numpy(data[:40]).to(dtype), dense

    return make


def stored(oracle, module):
    return {n: oracle.array(p) for n, p in module.named_parameters(recurse=False)}


def expected(oracle, model, name, x, activation):
    module = model[name]
    table = oracle.TABLES[module.plan.format.name]
    return oracle.forward(oracle.array(x), stored(oracle, module.site), stored(oracle, module), table, activation)


def relative(y, reference):
    """Error of each token, relative to the size of a typical one."""
    return np.linalg.norm(y - reference, axis=1) / np.sqrt(np.mean(np.sum(reference**2, axis=1)))


@pytest.mark.parametrize(("method", "activation", "rank"), CASES)
def test_float32_output(oracle, build, method, activation, rank):
    """No 16-bit rounding but that of z: equal to float32 precision wherever no decision is a close call."""
    model, x, _ = build(method, activation, rank, torch.float32)
    for name in ROWS:
        y = oracle.array(model[name](x))
        reference, unclear = expected(oracle, model, name, x, activation)
        error = relative(y, reference)
        assert unclear.mean() < 0.5
        assert error[~unclear].max() < 2e-5
        assert error.max() < 0.1


@pytest.mark.parametrize(("method", "activation", "rank"), [c for c in CASES if c[1] in ("codebook", "int4", "int8")])
def test_bfloat16_output_of_lattice_formats(oracle, build, method, activation, rank):
    """The only rounding beside z's is that of the result: half a unit in the last place of bfloat16."""
    model, x, _ = build(method, activation, rank, torch.bfloat16)
    for name in ROWS:
        y = oracle.array(model[name](x))
        reference, unclear = expected(oracle, model, name, x, activation)
        slack = 1e-4 * np.sqrt(np.mean(reference**2))
        assert unclear.mean() < 0.5
        assert (np.abs(y - reference) <= 2**-8 * np.abs(reference) + slack)[~unclear].all()


@pytest.mark.parametrize(("method", "activation", "rank"), [c for c in CASES if c[1] is None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_output_of_16_bit_activations(oracle, build, method, activation, rank, dtype):
    """v, z, Ŵ and y are each rounded once."""
    model, x, _ = build(method, activation, rank, dtype)
    for name in ROWS:
        reference, _ = expected(oracle, model, name, x, None)
        assert relative(oracle.array(model[name](x)), reference).max() < 2**-7


@pytest.mark.parametrize(("method", "activation", "rank"), [c for c in CASES if c[1] and "g64" in c[1]])
def test_bfloat16_output_of_grouped_formats(oracle, build, method, activation, rank):
    """v is rounded to bfloat16 before it is quantized, which moves close calls: 26 dB below the output."""
    model, x, _ = build(method, activation, rank, torch.bfloat16)
    for name in ROWS:
        reference, _ = expected(oracle, model, name, x, activation)
        error = relative(oracle.array(model[name](x)), reference)
        assert np.sqrt(np.mean(error**2)) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulation_linear(oracle, dtype, activations):
    """W4A16: Ŵ of 64-column groups, no transform, scales searched under diag(C)."""
    data = activations(400, K, seed=8)
    torch.manual_seed(1)
    dense = nn.Linear(K, 33, dtype=dtype)
    model = nn.ModuleDict({"m": dense})
    plan = SitePlan(("m",), K, (33,), 0, False, None, seed=0)
    config = DiRotQConfig().resolved(calibrated=True)
    diagonal = torch.from_numpy((data**2).mean(0)).float()
    solved = solve_site(plan, config, [dense.weight.data], diagonal, 400)
    with swapped(model, solved_modules(model, plan, solved, config, SiteMemo())):
        pass
    x = torch.from_numpy(data[:1]).to(dtype)
    reference, _ = expected(oracle, model, "m", x, None)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert relative(oracle.array(model["m"](x)), reference).max() < tolerance
    w = oracle.array(dense.weight)
    tensors = stored(oracle, model["m"])
    w_hat = oracle.dequantized(tensors["weight"], tensors["weight_scale"], oracle.CODEBOOK)
    assert np.sum((w - w_hat) ** 2 * (data**2).mean(0)) < 10**-1.9 * np.sum(w**2 * (data**2).mean(0))


def test_weight_only_linear_keeps_its_transform(oracle, build):
    model, x, _ = build("dirotq", None, 24, torch.float32, weight_only=True)
    assert model["q"].activation_bits == 16
    reference, _ = expected(oracle, model, "q", x, None)
    assert relative(oracle.array(model["q"](x)), reference).max() < 2e-5


@pytest.mark.parametrize("k", [64, 128, 256])
@pytest.mark.parametrize("activation", ["codebook", "int4", "int8", None])
def test_hadamard_blocks_of_64_and_128(oracle, build, k, activation):
    model, x, _ = build("dirotq", activation, 32, torch.float32, k=k)
    reference, unclear = expected(oracle, model, "q", x, activation)
    assert relative(oracle.array(model["q"](x)), reference)[~unclear].max() < 2e-5


@pytest.mark.parametrize(("method", "rank"), [(c[0], c[2]) for c in CASES if c[1] is None])
def test_dequantized_weight_is_the_linear_it_stands_for(oracle, build, method, rank):
    """The dense twin's output on the same tokens, up to the rounding of z to bfloat16."""
    model, x, dense = build(method, None, rank, torch.float32)
    quantized = {n: oracle.array(model[n](x)) for n in ROWS}
    dequantize_linears(model, torch.float32)
    assert not quantized_linears(model)
    for name in ROWS:
        assert model[name].weight.shape == dense[name].weight.shape
        assert relative(quantized[name], oracle.array(model[name](x))).max() < 2**-7


def test_stored_tensors_follow_from_weights_and_moment(oracle, build, activations):
    """Everything between C, W and the bytes: basis, L, W_res, its moment, GPTQ codes, nibbles."""
    model, _, dense = build("dirotq", "codebook", 24, torch.float32, basis="pca", rounding="gptq")
    site = stored(oracle, model["q"].site)
    data = activations(8 * K, K, seed=4)
    u = oracle.principal(data, 24)
    assert np.linalg.norm(site["basis"] - u @ (u.T @ site["basis"]), 2) < 2**-8
    basis, rotation = site["basis"], oracle.sign_rotation(site["signs"])
    pseudo_inverse = np.linalg.pinv(basis)
    moment = data.T @ data / len(data)
    keep = (np.eye(K) - basis @ basis.T) @ rotation
    h = keep.T @ moment @ keep
    for name in ROWS:
        w = oracle.array(dense[name].weight)
        tensors = stored(oracle, model[name])
        np.testing.assert_allclose(tensors["low_rank"], w @ pseudo_inverse.T, rtol=2**-8, atol=1e-6)
        w_res = (w - w @ pseudo_inverse.T @ basis.T) @ rotation
        chosen = oracle.unpack(tensors["weight"])
        codes, margins = oracle.gptq(w_res, h, tensors["weight_scale"][:, None], oracle.CODEBOOK, chosen)
        clear = margins > 0.05
        assert clear.mean() > 0.98
        np.testing.assert_array_equal(codes[clear], chosen[clear])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_near_the_dense_linear(oracle, build, method):
    """16-bit activations: weight error alone, at 4 bits at least 17 dB below the output, untrained ternary ones 5.5."""
    rank = {"paper": 64, "svdquant": 32, "nunchaku": 32, "dirotq": 24}.get(method, 0)
    model, x, dense = build(method, None, rank, torch.float32)
    y, reference = (oracle.array(m["q"](x)) for m in (model, dense))
    below = {"4": 17, "3": 14, "2": 8, "1.58": 5.5}[model["q"].plan.format.label]
    assert np.sum((y - reference) ** 2) < 10 ** (-below / 10) * np.sum(reference**2)


@pytest.mark.parametrize("activation", ["codebook", "int4", "int8", None])
def test_zero_and_extreme_tokens(oracle, build, activation):
    """A zero token gives the bias; one with a huge value, or very small ones, follows the formula."""
    model, x, _ = build("dirotq", activation, 24, torch.float32)
    x = x[:4].clone()
    x[0] = 0
    x[1, 5] = 1e4
    x[2] *= 1e-6
    y = oracle.array(model["q"](x))
    reference, unclear = expected(oracle, model, "q", x, activation)
    np.testing.assert_allclose(y[0], oracle.array(model["q"].bias), atol=1e-7)
    error = np.linalg.norm(y - reference, axis=1) / np.linalg.norm(reference, axis=1)
    assert (error < np.where(unclear, 0.05, 2e-5)).all()
