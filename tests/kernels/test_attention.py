"""`qk_norm_rope` against its equations in float64, and its Triton kernel on a GPU or in the interpreter."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.kernels import qk_norm_rope

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GAP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}  # one rounding of the norm, one of the result
# (batch, tokens of each part, heads, head width)
REAL = [(1, (512, 4096), 24, 128), (1, (4608,), 24, 128), (2, (77, 300), 24, 128)]
ODD = [(1, (5, 67), 3, 16), (2, (1,), 1, 2), (1, (130,), 9, 64)]
FEW = [(1, (5, 7), 3, 16), (2, (1,), 1, 2), (1, (13,), 9, 64)]  # a program is a token, one after the other there


def inputs(batch, tokens, heads, d, dtype, device, seed=0):
    """Queries, keys and values as columns of one wide matrix, which is how a product over siblings leaves them."""
    make = torch.Generator().manual_seed(seed)
    parts = [torch.randn(batch, s, 3, heads, d, generator=make) * 3 for s in tokens]
    parts = [p.to(device, dtype) for p in parts]
    weights = [(1 + torch.randn(4, d, generator=make) / 4).to(device, dtype) for _ in tokens]
    angle = torch.randn(sum(tokens), d, generator=make) * 4
    return (
        *([p[:, :, i] for p in parts] for i in range(3)),
        [w[0] for w in weights],
        [w[1] for w in weights],
        angle.cos().to(device),
        angle.sin().to(device),
    )


def oracle(parts, weights, cos, sin, eps, dtype, scale):
    normed = []
    for x, w in zip(parts, weights, strict=True):
        x, w = x.double().cpu().numpy(), w.double().cpu().numpy()
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w
        normed.append(torch.from_numpy(y).to(dtype).double().numpy())
    x = np.concatenate(normed, 1)
    c, s = cos.double().cpu().numpy()[None, :, None], sin.double().cpu().numpy()[None, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    out, size = np.empty_like(x), np.empty_like(x)
    out[..., 0::2] = even * c[..., 0::2] - odd * s[..., 0::2]
    out[..., 1::2] = odd * c[..., 1::2] + even * s[..., 1::2]
    size[..., 0::2] = abs(even * c[..., 0::2]) + abs(odd * s[..., 0::2])
    size[..., 1::2] = abs(odd * c[..., 1::2]) + abs(even * s[..., 1::2])
    return torch.from_numpy(out * scale), torch.from_numpy(size * scale)


def compare(got, given_parts, weights, cos, sin, eps, dtype, scale=1.0):
    expected, size = oracle(given_parts, weights, cos, sin, eps, dtype, scale)
    assert got.dtype == dtype and got.is_contiguous() and got.shape == expected.shape
    difference = (got.double().cpu() - expected).abs()
    # Values of the norm may round the other way before they are turned, and so may the result.
    assert (difference <= GAP[dtype] * (size + expected.abs())).all()
    assert difference.square().sum() <= (GAP[dtype] / 2 * size).square().sum()


def check(batch, tokens, heads, d, dtype, device, eps=1e-6):
    queries, keys, values, wq, wk, cos, sin = inputs(batch, tokens, heads, d, dtype, device)
    q, k, v = qk_norm_rope(queries, keys, values, wq, wk, cos, sin, eps)
    compare(q, queries, wq, cos, sin, eps, dtype)
    compare(k, keys, wk, cos, sin, eps, dtype)
    assert torch.equal(v, torch.cat(values, 1)) and v.is_contiguous()
    *again, nothing = qk_norm_rope(queries, keys, [], wq, wk, cos, sin, eps)
    assert torch.equal(q, again[0]) and torch.equal(k, again[1]) and nothing.shape == (0,) and nothing.dtype == dtype
    scaled, same, _ = qk_norm_rope(queries, keys, values, wq, wk, cos, sin, eps, query_scale=0.1275)
    compare(scaled, queries, wq, cos, sin, eps, dtype, 0.1275)
    assert torch.equal(same, k)


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 3), tokens=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    heads=st.integers(1, 11), power=st.integers(1, 6), dtype=st.sampled_from(list(GAP)),
)  # fmt: skip
@pytest.mark.skipif(INTERPRETED, reason="the reference is tested without the interpreter")
def test_reference(batch, tokens, heads, power, dtype):
    check(batch, tokens, heads, 2**power, dtype, "cpu")


@pytest.mark.parametrize("dtype", list(GAP))
@pytest.mark.parametrize(("batch", "tokens", "heads", "d"), REAL + ODD)
@pytest.mark.gpu
def test_kernel(batch, tokens, heads, d, dtype, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check(batch, tokens, heads, d, dtype, "cuda")


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
@pytest.mark.parametrize(("batch", "tokens", "heads", "d"), FEW)
def test_cpu_interpreter(batch, tokens, heads, d, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check(batch, tokens, heads, d, torch.bfloat16, "cpu")


def test_bad_input():
    queries, keys, values, wq, wk, cos, sin = inputs(1, (4, 6), 3, 16, torch.bfloat16, "cpu")
    for change, message in [
        (([], [], [], [], []), "queries is empty"),
        ((queries, keys[:1], [], wq, wk), "keys has 1 tensors for 2 queries"),
        ((queries, keys, values[:1], wq, wk), "values has 1 tensors for 2 queries"),
        ((queries, keys, values[::-1], wq, wk), r"values\[0\] has shape \[1, 6, 3, 16\]; expected \[1, 4, 3, 16\]"),
        (
            (queries, keys, [v.half() for v in values], wq, wk),
            r"values\[0\] has dtype torch.float16; allowed: torch.bfloat16",
        ),
        (
            ([q.float() for q in queries], keys, [], wq, wk),
            r"keys\[0\] has dtype torch.bfloat16; allowed: torch.float32",
        ),
        ((queries, keys, [], [w[:8] for w in wq], wk), r"query_weights\[0\] has shape \[8\]; expected \[16\]"),
        (([q[..., :12] for q in queries], keys, [], wq, wk), "12 columns a head; a power of two"),
    ]:
        with pytest.raises(ValueError, match=message):
            qk_norm_rope(*change, cos, sin, 1e-6)
    with pytest.raises(ValueError, match=r"cos has shape \[9, 16\]; expected \[10, 16\]"):
        qk_norm_rope(queries, keys, values, wq, wk, cos[:9], sin, 1e-6)
    for scale in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"query_scale is {scale}; a positive number"):
            qk_norm_rope(queries, keys, values, wq, wk, cos, sin, 1e-6, query_scale=scale)
