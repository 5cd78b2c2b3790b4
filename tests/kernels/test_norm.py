"""`norm_modulate` against its equation in float64, and its Triton kernel on a GPU or in the interpreter."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq import kernels
from dirotq.kernels import modulation_rows, norm_modulate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}  # relative, of the one rounding
SUMS = 2**-14 if INTERPRETED else 2**-18  # of fp32 sums and what follows; NumPy adds the columns one by one there
# (batch, tokens of each part, width)
REAL = [(1, (512, 4096), 3072), (1, (4608,), 3072), (4, (512, 4096), 3072), (2, (4096,), 1152)]
ODD = [(2, (1,), 1), (3, (2, 0, 9), 130), (1, (3, 1, 4, 2), 1151), (2, (7, 2), 3072), (1, (4,), 5000)]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the reference is tested without the interpreter")


def inputs(batch, tokens, d, dtype, device, mean=0.0, spread=3.0, seed=0):
    """Parts as columns of a wider matrix; scale and shift as pieces of one vector of modulation."""
    make = torch.Generator().manual_seed(seed)
    parts = [torch.randn(batch, s, 2, d, generator=make) * spread + mean for s in tokens]
    scale, shift = torch.randn(batch, 6 * d, generator=make).to(device, dtype).chunk(6, 1)[1:3]
    return [p.to(device, dtype)[:, :, 1] for p in parts], scale, shift


def compare(y, parts, scale, shift, eps):
    dtype = parts[0].dtype
    x, m, b = (t.double().cpu().numpy() for t in (torch.cat(parts, 1), scale, shift))
    m, b = 1 + m[:, None], b[:, None]
    variance = ((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + eps)
    expected = torch.from_numpy(normed * m + b)
    size = torch.from_numpy((abs(normed) + 1) * abs(m) + abs(b))
    assert y.dtype == dtype and y.is_contiguous() and y.shape == expected.shape
    difference = (y.double().cpu() - expected).abs()
    assert (difference <= ROUNDING[dtype] * expected.abs() + SUMS * size).all()


def check(batch, tokens, d, dtype, device, eps=1e-6, **values):
    parts, scale, shift = inputs(batch, tokens, d, dtype, device, **values)
    y = norm_modulate(parts, scale, shift, eps)
    compare(y, parts, scale, shift, eps)
    assert torch.equal(y, norm_modulate(parts, scale, shift, eps))


def check_narrow(dtype, device, d=3072):
    """Rows whose spread is a few of the dtype's steps, far from zero, and rows of one value."""
    check(1, (3, 2), d, dtype, device, mean=1e4, spread=1e4 * torch.finfo(dtype).eps)
    parts, scale, shift = inputs(2, (4,), d, dtype, device)
    parts[0][0], parts[0][1] = parts[0][0, :1, 7:8] + 1000, 0.1
    y = norm_modulate(parts, scale, shift, 1e-6)
    torch.testing.assert_close(y, shift[:, None].expand_as(y), rtol=0, atol=1e-5 if dtype == torch.float32 else 0)
    parts[0][:, :, 9] += 8  # of one value but in a single column
    compare(norm_modulate(parts, scale, shift, 1e-6), parts, scale, shift, 1e-6)


def check_strides(device, d):
    """Every layout gives the bits that contiguous tensors give."""
    parts, scale, shift = inputs(2, (5, 6), d, torch.bfloat16, device)
    expected = norm_modulate([p.contiguous() for p in parts], scale.contiguous(), shift.contiguous(), 1e-6)
    by_token = [p.transpose(0, 1).contiguous().transpose(0, 1) for p in parts]
    by_column = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in parts]
    for others in (parts, by_token, by_column):
        assert torch.equal(norm_modulate(others, scale, shift, 1e-6), expected)
    assert torch.equal(norm_modulate(parts, scale.T.contiguous().T, shift.T.contiguous().T, 1e-6), expected)
    joined = torch.cat(parts, 1)
    assert torch.equal(norm_modulate([joined], scale, shift, 1e-6), expected)
    assert torch.equal(norm_modulate(joined.split([1, 2, 5, 3], 1), scale, shift, 1e-6), expected)
    whole = norm_modulate([joined], scale[:1].expand(2, -1), shift[:1].expand(2, -1), 1e-6)
    assert torch.equal(whole[:1], expected[:1])


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3), tokens=st.lists(st.integers(0, 20), min_size=1, max_size=4), d=st.integers(1, 300),
    dtype=st.sampled_from(list(ROUNDING)), mean=st.sampled_from([0.0, -40.0, 3000.0]),
    spread=st.sampled_from([0.01, 1.0, 50.0]), eps=st.sampled_from([1e-6, 1e-5, 0.1]),
)  # fmt: skip
@not_interpreted
def test_reference(batch, tokens, d, dtype, mean, spread, eps):
    check(batch, tokens, d, dtype, "cpu", eps, mean=mean, spread=spread)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@not_interpreted
def test_reference_of_narrow_rows(dtype):
    check_narrow(dtype, "cpu")


@not_interpreted
def test_reference_of_any_strides():
    check_strides("cpu", 37)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("batch", "tokens", "d"), [*REAL, (1, (5, 67), 48), *ODD, (1, (3,), 16385)])
@pytest.mark.gpu
def test_kernel(batch, tokens, d, dtype, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check(batch, tokens, d, dtype, "cuda")


@pytest.mark.parametrize("d", [1152, 3072])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.gpu
def test_kernel_of_narrow_rows(dtype, d, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check_narrow(dtype, "cuda", d)


@pytest.mark.parametrize("d", [37, 3072])
@pytest.mark.gpu
def test_kernel_of_any_strides(d, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check_strides("cuda", d)


@needs_interpreter
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("batch", "tokens", "d"), [(1, (5, 7), 48), *ODD, (1, (3,), 16385)])
def test_cpu_interpreter(batch, tokens, d, dtype, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check(batch, tokens, d, dtype, "cpu")


@needs_interpreter
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_cpu_interpreter_of_narrow_rows(dtype, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check_narrow(dtype, "cpu")


@needs_interpreter
def test_cpu_interpreter_of_any_strides(monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check_strides("cpu", 37)


@needs_interpreter
@pytest.mark.parametrize("rows", [2, 4])
def test_cpu_interpreter_of_several_tokens_a_program(rows, monkeypatch):
    from dirotq.kernels import triton_norm

    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    blocks = triton_norm.blocks
    monkeypatch.setattr(triton_norm, "blocks", lambda d: {**blocks(d), "BS": rows})
    check(2, (5, 2, 7), 130, torch.bfloat16, "cpu")


def test_no_tokens():
    parts, scale, shift = inputs(2, (0, 0), 16, torch.bfloat16, "cpu")
    assert norm_modulate(parts, scale, shift, 1e-6).shape == (2, 0, 16)
    assert norm_modulate([p[:0] for p in parts], scale[:0], shift[:0], 1e-6).shape == (0, 0, 16)


def test_bad_input():
    parts, scale, shift = inputs(2, (4, 6), 16, torch.bfloat16, "cpu")
    for change, message in [
        ({"parts": []}, "parts is empty; at least one is needed"),
        ({"parts": [parts[0][0]]}, r"parts\[0\] has shape \[4, 16\]; expected \[B, S, D\]"),
        ({"parts": [p[..., :0] for p in parts]}, r"parts\[0\] has 0 columns; at least one"),
        ({"parts": [p.double() for p in parts]}, r"parts\[0\] has dtype torch.float64; allowed: torch.bfloat16,"),
        ({"parts": [parts[0], parts[1][:1]]}, r"parts\[1\] has shape \[1, 6, 16\]; expected \[2, S, 16\]"),
        ({"parts": [parts[0], parts[1].float()]}, r"parts\[1\] has dtype torch.float32; allowed: torch.bfloat16$"),
        ({"parts": [parts[0], parts[1].to("meta")]}, r"parts\[1\] is on meta, parts\[0\] on cpu"),
        ({"scale": scale[:1]}, r"scale has shape \[1, 16\]; expected \[2, 16\]"),
        ({"shift": shift[:, None]}, r"shift has shape \[2, 1, 16\]; expected \[2, 16\]"),
        ({"scale": scale.float()}, "scale has dtype torch.float32; allowed: torch.bfloat16$"),
        ({"shift": shift.to("meta")}, r"shift is on meta, parts\[0\] on cpu"),
        ({"eps": 0.0}, "eps is 0.0; a positive number"),
        ({"eps": float("nan")}, "eps is nan; a positive number"),
    ]:
        arguments = {"parts": parts, "scale": scale, "shift": shift, "eps": 1e-6, **change}
        with pytest.raises(ValueError, match=message):
            norm_modulate(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [(512,), (4096,), (512, 4096)])
def test_a_chain_in_a_graph(tokens):
    """Modulation, norm, rotation, product, each started while the one before it ends: replays see their own inputs."""
    d, rank = 3072, 64
    make = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=make, device="cuda").bfloat16()

    parts, embedding = [randn(1, s, d) for s in tokens], randn(1, d)
    packed = [torch.randint(0, 256, (n, d // 2), dtype=torch.uint8, device="cuda") for n in (2 * d, d)]
    scales = torch.rand(2 * d, d // 64, device="cuda") / (36 * d**0.5), torch.rand(d, device="cuda") / (36 * d**0.5)
    basis = torch.linalg.qr(torch.randn(d, rank, device="cuda"))[0].bfloat16()
    signs = (torch.randint(0, 2, (d,), device="cuda") * 2 - 1).to(torch.int8)
    low_rank = randn(d, rank)

    def chain():
        shift, scale = kernels.linear_a16(embedding, None, packed[0], scales[0], None, None, kernels.CODEBOOK16).chunk(
            2, 1
        )
        x = kernels.norm_modulate(parts, scale, shift, 1e-6)[0]
        codes, row, z = kernels.rotate_quantize(x, basis, signs, 128, "int4")
        return (
            x,
            codes,
            kernels.linear_a8(codes, row, z, packed[1], scales[1], low_rank, None, kernels.CODEBOOK16, torch.bfloat16),
        )

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [chain() for _ in range(8)]
    for _ in range(10):
        for part in parts:
            part.copy_(randn(*part.shape))
        embedding.copy_(randn(1, d))
        graph.replay()
        torch.cuda.synchronize()
        apart = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("norm_modulate", "rotate_quantize", "linear_a8", "linear_a16"):
                run = getattr(kernels, name)
                patch.setattr(kernels, name, lambda *a, run=run: (torch.cuda.synchronize(), run(*a))[1])
            apart = chain()
        for found in captured:
            assert all(torch.equal(a, b) for a, b in zip(found, apart, strict=True))


@not_interpreted
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("batch", "rows", "d"), [(2, 6, 1152), (1, 1, 1), (3, 5, 7)])
def test_modulation_rows(batch, rows, d, dtype):
    make = torch.Generator().manual_seed(0)
    table = torch.randn(rows, d, generator=make).to(dtype)
    timestep = torch.randn(batch, 2, rows * d, generator=make).to(dtype)[:, 1]
    got = modulation_rows(table, timestep)
    expected = table.double().reshape(-1).numpy() + timestep.double().numpy()
    torch.testing.assert_close(got.flatten(1), torch.from_numpy(expected).to(dtype), rtol=0, atol=0)
    assert got.shape == (batch, rows, d) and got.dtype == dtype and got.is_contiguous()


@not_interpreted
def test_bad_modulation_rows():
    table, timestep = torch.zeros(6, 8), torch.zeros(2, 48)
    for change, message in [
        ((table[0], timestep), r"table has shape \[8\]; expected \[R, D\]"),
        ((table, timestep[:, :40]), r"timestep has shape \[2, 40\]; expected \[B, 48\]"),
        ((table, timestep.half()), "timestep has dtype torch.float16; allowed: torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            modulation_rows(*change)
