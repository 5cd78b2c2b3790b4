"""The PyTorch reference against the float64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq import kernels
from dirotq.kernels import reference

from . import cases, oracle


def f64(tensor):
    return None if tensor is None else tensor.double().numpy()


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "reference")


def check_quantization(case, mode):
    codes, scale, z = kernels.rotate_quantize(*case.arguments, mode)
    x, basis = f64(case.x), f64(case.basis)
    if basis is not None:
        product = x @ basis
        size = np.linalg.norm(x, axis=1, keepdims=True)
        assert (np.abs(f64(z) - oracle.bf16(product)) <= 2**-7 * np.abs(product) + 1e-6 * size).all()
        assert (f64(z) != oracle.bf16(product)).sum() <= max(2, 0.01 * z.numel())
    v = oracle.rotate(x, f64(z), basis, f64(case.signs), case.block)
    np.testing.assert_allclose(f64(scale), oracle.row_scale(x, basis, mode), rtol=1e-5)
    expected, margin = oracle.PROLOGUES[mode](v, f64(scale))
    # fp32 against float64: only decisions nearer to a tie than the arithmetic resolves may differ.
    np.testing.assert_array_equal(f64(codes)[margin > 1e-3], expected[margin > 1e-3])
    return (margin > 1e-3).mean()


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("m", "k", "rank", "block", "signs"),
    [
        (7, 1152, 64, 128, True),
        (5, 192, 5, 64, True),
        (4, 64, 0, 1, True),
        (5, 576, 3, 16, False),
        (4, 512, 64, 512, True),
    ],
)
def test_rotate_quantize(m, k, rank, block, signs, mode, dtype):
    decided = check_quantization(cases.site(m, k, rank, block=block, signs=signs, dtype=dtype), mode)
    assert decided > 0.7  # a zero row sits on a tie in int4


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(0, 9), st.sampled_from((1, 2, 8, 64)), st.booleans(),
    st.sampled_from(cases.MODES), st.integers(0, 10**6),
)  # fmt: skip
def test_rotate_quantize_odd_shapes(m, groups, rank, block, signs, mode, seed):
    check_quantization(cases.site(m, 64 * groups, rank, block=block, signs=signs, seed=seed), mode)


@pytest.mark.parametrize("mode", cases.MODES)
def test_zero_rows_have_scale_zero_and_the_code_of_zero(mode):
    x = torch.zeros(3, 128)
    x[1] = 1e-42  # below the smallest normal number
    codes, scale, _ = kernels.rotate_quantize(x, None, None, 1, mode)
    assert scale.tolist() == [0, 0, 0]
    assert codes.unique().tolist() == [4 if mode == "codebook" else 0]


def test_codebook_ties_go_to_the_smaller_magnitude():
    # rms 36, so that a lattice unit is 1: the rest of the row balances the midpoints' squares.
    row = torch.zeros(64)
    row[:7] = torch.tensor(kernels.MIDPOINTS)
    row[7:14] = -row[:7]
    rest = (64 * 36.0**2 - row.square().sum()) / 50
    row[14:] = rest.sqrt()
    scale = reference.row_scale(row[None] / 36, None, "codebook")
    codes = reference.quantize(row[None] / 36, scale, "codebook")
    units = (row / 36) / scale
    exact = units[:7] == torch.tensor(kernels.MIDPOINTS)
    assert exact.any()
    assert torch.equal(codes[0, :7][exact].int(), torch.tensor(kernels.MAGNITUDES)[:7][exact].int())


@pytest.mark.parametrize("mode", cases.MODES)
def test_no_tokens(mode):
    case = cases.site(0, 128, 4)
    codes, scale, z = kernels.rotate_quantize(*case.arguments, mode)
    assert codes.shape == (0, 128) and scale.shape == (0,) and z.shape == (0, 4)
    given_ = cases.weights(33, 128, 4)
    y = kernels.linear(
        *case.arguments, mode, given_.weight, given_.row_scale, given_.low_rank, given_.bias, kernels.INT4
    )
    assert y.shape == (0, 33)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 64), (5, 33, 192), (7, 65, 4608), (3, 10, 15360)])
def test_int8_products_are_exact(m, n, k, monkeypatch):
    a, _ = cases.lattice(m, k)
    w = torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(3), dtype=torch.int16).to(torch.int8)
    w[0] = 127
    expected = a.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(reference, "_cpu_int_mm_is_exact", lambda: False)
        product = reference.int8_matmul(a, w)
        assert product.dtype == torch.int32
        np.testing.assert_array_equal(product.numpy(), expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 70), st.integers(1, 4), st.integers(0, 5), st.booleans(),
    st.lists(st.integers(-127, 127), min_size=16, max_size=16),
)  # fmt: skip
def test_linear_a8(m, n, groups, rank, with_bias, table):
    codes, scale = cases.lattice(m, 64 * groups)
    w = cases.weights(n, 64 * groups, rank, dtype=torch.float32)
    z = torch.randn(m, rank).bfloat16() if rank else None
    bias = w.bias if with_bias else None
    y = kernels.linear_a8(codes, scale, z, w.weight, w.row_scale, w.low_rank, bias, table, torch.float32)
    expected = oracle.linear_a8(
        f64(codes), f64(scale), f64(z), w.weight.numpy(), f64(w.row_scale), f64(w.low_rank), f64(bias), table
    )
    np.testing.assert_allclose(f64(y), expected, rtol=1e-5, atol=1e-5 * max(np.abs(expected).max(), 1e-9))
    rounded = kernels.linear_a8(codes, scale, z, w.weight, w.row_scale, w.low_rank, bias, table, torch.bfloat16)
    assert torch.equal(rounded, y.bfloat16())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=5), st.booleans())
def test_gelu_of_siblings(ns, named):
    codes, scale = cases.lattice(5, 64)
    z = torch.randn(5, 3).bfloat16()
    own = [cases.weights(n, 64, 3, dtype=torch.float32, seed=i) for i, (n, _) in enumerate(ns)]
    curved = [flag for _, flag in ns] if named else []
    table = kernels.CODEBOOK16
    columns = [[w.weight for w in own], [w.row_scale for w in own], [w.low_rank for w in own], [w.bias for w in own]]
    y = kernels.linear_a8_siblings(codes, scale / 100, z, *columns, table, torch.float32, curved)
    for i, (part, w) in enumerate(zip(y.split([n for n, _ in ns], 1), own, strict=True)):
        floats = f64(w.row_scale), f64(w.low_rank), f64(w.bias)
        expected = oracle.linear_a8(f64(codes), f64(scale / 100), f64(z), w.weight.numpy(), *floats, table)
        flag = bool(curved) and curved[i]
        np.testing.assert_allclose(f64(part), oracle.gelu(expected) if flag else expected, rtol=1e-4, atol=1e-5)
        single = w.weight, w.row_scale, w.low_rank, w.bias, table, torch.float32, flag
        assert torch.equal(part, kernels.linear_a8(codes, scale / 100, z, *single))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_linear_a16(dtype, grouped, rank):
    x = cases.site(5, 192, dtype=dtype, signs=False).x
    w = cases.weights(33, 192, rank, dtype=dtype)
    scale = w.group_scale if grouped else w.row_scale[:, None]
    z = torch.randn(5, rank).bfloat16() if rank else None
    y = kernels.linear_a16(x, z, w.weight, scale, w.low_rank, w.bias, kernels.CODEBOOK16)
    exact = oracle.grouped_weight(w.weight.numpy(), f64(scale), kernels.CODEBOOK16)
    expected = f64(x) @ exact.T + f64(w.bias) + (0 if z is None else f64(z) @ f64(w.low_rank).T)
    cases.assert_close(y, torch.from_numpy(expected).to(dtype))
    fp32 = kernels.dequantize(w.weight, scale, kernels.CODEBOOK16, torch.float32)
    np.testing.assert_allclose(f64(fp32), exact, rtol=1e-7)
