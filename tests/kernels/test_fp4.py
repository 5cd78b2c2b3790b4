"""NVFP4 against the definition of its numbers, in float64 (`tests/oracle/float4.py`)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.fx.experimental.proxy_tensor import make_fx

from dirotq import kernels
from dirotq.kernels import fp4


def _load():
    file = Path(__file__).parents[1] / "oracle" / "float4.py"
    spec = importlib.util.spec_from_file_location("dirotq_float4_oracle", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ORACLE = _load()
E2M1, E4M3, nearest, quantized = ORACLE.E2M1, ORACLE.E4M3, ORACLE.nearest, ORACLE.quantized


def test_the_numbers():
    codes = torch.arange(16, dtype=torch.uint8)
    np.testing.assert_array_equal(kernels.decode_e2m1(codes, torch.float64).numpy(), E2M1)
    bits = torch.arange(0x7F, dtype=torch.uint8)
    np.testing.assert_array_equal(kernels.decode_e4m3(bits, torch.float64).numpy(), E4M3)
    assert kernels.decode_e4m3(torch.tensor([fp4.NAN_BITS], dtype=torch.uint8)).isnan()
    products = torch.from_numpy(np.outer(E4M3, E2M1))
    assert torch.equal(products.bfloat16().double(), products)


def test_ties_go_to_the_even_code():
    middles = (E2M1[1:8] + E2M1[:7]) / 2
    got = fp4.encode_e2m1(torch.from_numpy(np.concatenate([middles, -middles])))
    expected = [nearest(x, E2M1[:8])[0] for x in middles]
    assert got.tolist() == [*expected, *(e + 8 for e in expected)]
    assert all(e % 2 == 0 for e in expected)


@settings(deadline=None, max_examples=100)
@given(
    arrays.arrays(np.float32, (2, 32), elements=st.floats(-1e3, 1e3, width=32)),
    st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_rows_against_the_definition(rows, size):
    rows = (rows * np.float32(size)).astype(np.float32)
    codes, blocks, scale = kernels.quantize_nvfp4(torch.from_numpy(rows))
    assert codes.shape == (2, 16) and blocks.shape == (2, 2) and int(blocks.max()) < fp4.NAN_BITS
    got = kernels.dequantize_nvfp4(codes, blocks, torch.float64).numpy() * scale.double().numpy()[:, None]
    for ours, row in zip(got, rows.astype(np.float64), strict=True):
        expected, margin = quantized(row)
        if margin > 1e-5:
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=0)
        # Whatever the ties: at most half the widest step of e2m1, and what rounding the block scale costs at the top.
        largest = np.abs(row.reshape(-1, 16)).max(1).repeat(16)
        zeroed = 6 * 448 * np.finfo(np.float32).tiny
        assert (np.abs(ours - row) <= largest * (1 / 6 + 1 / 15) + np.abs(row).max() * 2**-18 + zeroed).all()


def test_most_rows_have_no_close_decision():
    rows = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32).astype(np.float64)
    margins = [quantized(row)[1] for row in rows]
    assert np.mean(np.array(margins) > 1e-5) > 0.9


def test_a_given_scale_is_used():
    v = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    shared = kernels.nvfp4_scale(v.abs().max()).expand(3)
    codes, blocks, scale = kernels.quantize_nvfp4(v, shared)
    assert torch.equal(scale, shared)
    error = kernels.dequantize_nvfp4(codes, blocks) * scale[:, None] - v
    assert error.square().mean() < 0.01 * v.square().mean()


def test_a_wrong_width():
    with pytest.raises(ValueError, match=r"\[2, 24\].*multiple of 16"):
        kernels.quantize_nvfp4(torch.zeros(2, 24))


def operands(m=5, n=7, k=64, rank=3):
    g = torch.Generator().manual_seed(1)
    a, w = (kernels.quantize_nvfp4(torch.randn(rows, k, generator=g)) for rows in (m, n))
    z, low_rank = (torch.randn(rows, rank, generator=g).bfloat16() for rows in (m, n))
    return dict(zip(
        ("codes", "block_scale", "scale", "z", "weight", "weight_block_scale", "weight_scale", "low_rank", "bias"),
        (*a, z, *w, low_rank, torch.randn(n, generator=g)), strict=True,
    ))  # fmt: skip


@pytest.mark.parametrize("branch", [True, False])
def test_the_product(branch):
    o = operands()
    a, w = (
        ORACLE.dequantized(*(o[name].numpy() for name in names))
        for names in (("codes", "block_scale", "scale"), ("weight", "weight_block_scale", "weight_scale"))
    )
    expected = a @ w.T
    if branch:
        expected += o["z"].double().numpy() @ o["low_rank"].double().numpy().T + o["bias"].double().numpy()
    else:
        o |= {"z": None, "low_rank": None, "bias": None}
    got = kernels.linear_nvfp4(**o, out_dtype=torch.float32).double().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_scale": torch.zeros(5, 3, dtype=torch.uint8)}, r"block_scale has shape \[5, 3\]; expected \[5, 4\]"),
        ({"weight_block_scale": torch.zeros(7, 4)}, "weight_block_scale has dtype torch.float32"),
        ({"codes": torch.zeros(5, 24, dtype=torch.uint8)}, "codes, unpacked, has 48 columns"),
        ({"weight": torch.zeros(7, 32)}, "weight has dtype torch.float32"),
        ({"scale": torch.zeros(4)}, r"scale has shape \[4\]; expected \[5\]"),
        ({"low_rank": None}, "z is given without low_rank"),
        ({"out_dtype": torch.int8}, "out_dtype is torch.int8"),
    ],
)
def test_arguments_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        kernels.linear_nvfp4(**{**operands(), "out_dtype": torch.float32, **wrong})


def float32_patterns():
    """Every sign, exponent and upper 7 bits of the mantissa, with lower bits that decide ties, and their neighbours."""
    upper = torch.arange(1 << 16).repeat_interleave(7) << 16
    lower = torch.tensor([0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(1 << 16)
    return (upper | lower).to(torch.int32).view(torch.float32)


def test_e4m3_has_the_bits_of_torchs_conversion():
    """Ties, subnormals, both zeros, values of either sign up to where rounding passes 448."""
    x = float32_patterns()
    x = x[(x.abs() <= 464) | x.isnan()]
    ours, theirs = fp4.encode_e4m3(x), x.to(torch.float8_e4m3fn).view(torch.uint8)
    number = ~x.isnan()
    assert len(set(ours[number].tolist())) == 254 and torch.equal(ours[number], theirs[number])
    assert set((ours[~number] & 127).tolist()) == {fp4.NAN_BITS}


def test_e4m3_saturates():
    x = torch.tensor([448.0, 464.0, 465.0, 480.0, 1e30, torch.inf])
    assert torch.cat([fp4.encode_e4m3(x), fp4.encode_e4m3(-x)]).tolist() == [0x7E] * 6 + [0xFE] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_e4m3_values_have_the_bits_of_torchs_conversion(dtype):
    bits = torch.arange(256, dtype=torch.uint8)
    ours, theirs = fp4.decode_e4m3(bits, dtype), bits.view(torch.float8_e4m3fn).to(dtype)
    number = ~theirs.isnan()
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.signbit()[number], theirs.signbit()[number])
    assert torch.equal(ours[number], theirs[number])


@pytest.mark.untraced
def test_a_compiled_graph_has_no_float8():
    """Triton converts to e4m3 from sm_89 on only."""

    def both(v):
        codes, blocks, scale = fp4.quantize_nvfp4(v)
        return fp4.dequantize_nvfp4(codes, blocks) * scale[:, None]

    v = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    graph = make_fx(both)(v)
    dtypes = {node.meta["tensor_meta"].dtype for node in graph.graph.nodes if "tensor_meta" in node.meta}
    assert torch.float32 in dtypes and torch.float8_e4m3fn not in dtypes
    torch.compiler.reset()
    compiled = torch.compile(fp4.quantize_nvfp4, fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(v), fp4.quantize_nvfp4(v), strict=True))
