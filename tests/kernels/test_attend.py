"""`attend` against its equation in float64, and Hopper's kernel for narrow heads on a GPU."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.kernels import attend

# Relative: the rounding of the weights of a sum and that of its result.
GAP = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}
TINY = {torch.bfloat16: 0.0, torch.float16: 2**-25, torch.float32: 0.0}  # absolute, of a weight of at most one
NARROW = [
    (2, 4096, 4096, 4, 72),
    (1, 1000, 1000, 3, 72),
    (3, 77, 300, 5, 72),
    (2, 256, 1, 2, 80),
    (2, 129, 128, 3, 80),
    (1, 1, 500, 1, 72),
]
OTHERS = [(1, 300, 300, 2, 64), (2, 50, 60, 3, 88), (1, 33, 20, 2, 48)]


def inputs(batch, queries, keys, heads, d, dtype, device, spread=1.0, seed=0):
    """Columns of wider matrices, which is how a product over siblings leaves them."""
    make = torch.Generator().manual_seed(seed)
    wide = torch.randn(batch, queries, 3, heads, d, generator=make) * spread
    others = wide if keys == queries else torch.randn(batch, keys, 3, heads, d, generator=make) * spread
    wide, others = wide.to(device, dtype), others.to(device, dtype)
    return wide[:, :, 0], others[:, :, 1], others[:, :, 2]


def bias_of(keys, batch, dtype, device):
    """Some keys masked as diffusers masks text, or as PyTorch does; others more or less welcome."""
    make = torch.Generator().manual_seed(1)
    bias = torch.randn(batch, 2, keys, generator=make)[:, 1]
    which = torch.randint(0, 5, (batch, keys), generator=make)
    bias[which == 0], bias[which == 1] = -10000.0, -torch.inf
    bias[:, keys // 3] = 1.0
    return bias.to(device, dtype)


def compare(got, query, key, value, bias=None):
    q, k, v = (x.double().cpu().transpose(1, 2).numpy() for x in (query, key, value))
    for image in range(len(q)):
        scores = q[image] @ k[image].swapaxes(1, 2) / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + bias[image].double().cpu().numpy()
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        weights /= total
        expected = torch.from_numpy(weights @ v[image]).transpose(0, 1)
        size = torch.from_numpy(weights @ abs(v[image])).transpose(0, 1)
        tiny = TINY[got.dtype] * torch.from_numpy(abs(v[image]).sum(1, keepdims=True) / total).transpose(0, 1)
        difference = (got[image].double().cpu() - expected).abs()
        assert (difference <= GAP[got.dtype] * (size + expected.abs()) + tiny).all()
        assert difference.square().mean() <= (GAP[got.dtype] / 2 * size).square().mean()
    assert got.dtype == query.dtype and got.is_contiguous() and got.shape == query.shape


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 3), queries=st.integers(1, 40), keys=st.integers(1, 40), heads=st.integers(1, 4),
    d=st.integers(1, 90), dtype=st.sampled_from(list(GAP)), biased=st.booleans(),
)  # fmt: skip
def test_reference(batch, queries, keys, heads, d, dtype, biased):
    given_ = inputs(batch, queries, keys, heads, d, dtype, "cpu")
    if biased:
        given_ += (bias_of(keys, batch, dtype, "cpu"),)
    compare(attend(*given_), *given_)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "d"), NARROW + OTHERS)
@pytest.mark.gpu
def test_kernel(batch, queries, keys, heads, d, dtype, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    for spread in (1, 4):  # scores of a few dozen: a row's largest weights come late as well
        given_ = inputs(batch, queries, keys, heads, d, dtype, "cuda", spread)
        y = attend(*given_)
        compare(y, *given_)
        assert torch.equal(y, attend(*(x.contiguous() for x in given_)))
        bias = bias_of(keys, batch, dtype, "cuda")
        compare(attend(*given_, bias), *given_, bias)


@pytest.mark.gpu
def test_any_layout_on_a_gpu():
    """Rows at odd distances, heads apart, columns apart, expanded, at odd addresses: as contiguous tensors."""
    query, key, value = (x.contiguous() for x in inputs(2, 130, 140, 3, 72, torch.bfloat16, "cuda"))
    expected = attend(query, key, value)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    by_column = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (query, key, value)]
    padded = [torch.cat([x.flatten(2), x[:, :, 0, :7]], 2)[..., :-7].unflatten(2, (3, 72)) for x in (query, key, value)]
    odd = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (query, key, value)]
    for others in (by_head, by_column, padded, odd):
        assert torch.equal(attend(*others), expected)
    one = attend(query, key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1))
    assert torch.equal(one[:1], expected[:1])


@pytest.mark.parametrize(
    ("shape", "strides", "start", "copied"),
    [
        ((2, 6, 3, 72), (3888, 648, 72, 1), 216, False),  # columns of a wider matrix
        ((2, 6, 3, 72), (1296, 72, 432, 1), 0, True),  # head by head
        ((2, 6, 3, 72), (1296, 216, 1, 3), 0, True),
        ((2, 3, 3, 72), (1296, 432, 72, 1), 0, False),  # every other token
        ((2, 5, 3, 72), (216, 0, 72, 1), 0, True),  # expanded
        ((4, 5, 3, 72), (0, 216, 72, 1), 0, True),
        ((2, 1, 3, 72), (216, 5, 72, 1), 0, False),  # of a dimension of one the stride says nothing
        ((1, 1, 3, 72), (5, 5, 72, 1), 0, False),
        ((2, 2, 1, 72), (144, 72, 3, 1), 0, False),
        ((1, 2, 3, 72), (7, 220, 72, 1), 0, True),  # rows at no multiple of 16 bytes
        ((1, 2, 3, 72), (7, 216, 72, 1), 1, True),
    ],
)
def test_what_the_memory_accelerator_reads(shape, strides, start, copied):
    """Rows at distances it takes, and a copy only where they are not."""
    hopper_attention = pytest.importorskip("dirotq.kernels.hopper_attention", exc_type=ImportError)
    numbers = torch.randn(8000, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = numbers.as_strided(shape, strides, start)
    matrix = hopper_attention._matrix(x)
    assert torch.equal(matrix, x.reshape(shape[0] * shape[1], -1))
    assert matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.stride(0) >= matrix.shape[1]
    assert matrix.data_ptr() % 16 == 0 and (matrix.data_ptr() != x.data_ptr()) == copied
    widths = [d for d in range(1, 200) if hopper_attention.takes(torch.empty(1, 1, 1, d, dtype=x.dtype))]
    assert widths == [72, 80] and not hopper_attention.takes(torch.empty(1, 1, 1, 72))


@pytest.mark.gpu
def test_hundreds_of_results_are_equal():
    """Of PixArt's shape, in which every multiprocessor passes its buffers on a thousand times."""
    given_ = inputs(2, 4096, 4096, 16, 72, torch.bfloat16, "cuda")
    expected = attend(*given_)
    for _ in range(300):
        assert torch.equal(attend(*given_), expected)


def test_bad_input():
    query, key, value = inputs(2, 5, 6, 3, 8, torch.bfloat16, "cpu")
    for change, message in [
        ((query[0], key, value), r"query has shape \[5, 3, 8\]; expected \[B, S, H, D\]"),
        ((query, key[:1], value), r"key has shape \[1, 6, 3, 8\]; expected \[2, T, 3, 8\]"),
        ((query, key, value[:, :5]), r"value has shape \[2, 5, 3, 8\]; expected \[2, 6, 3, 8\]"),
        ((query, key[:, :0], value[:, :0]), r"key has shape \[2, 0, 3, 8\]; a key and a column at least"),
        ((query, key, value, torch.zeros(2, 5).bfloat16()), r"bias has shape \[2, 5\]; expected \[2, 6\]"),
        ((query, key, value, torch.zeros(2, 6)), "bias has dtype torch.float32; allowed: torch.bfloat16"),
        ((query, key.half(), value), "key has dtype torch.float16; allowed: torch.bfloat16"),
        ((query.int(), key, value), "query has dtype torch.int32; allowed: torch.bfloat16, torch.float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(*change)
    assert attend(query[:, :0], key, value).shape == (2, 0, 3, 8)
