"""`attend` against its equation in float64, and Hopper's kernels on a GPU."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.kernels import POWERS_OF_TWO, attend, powers_scale

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
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
POWERS = powers_scale(128)  # in queries: scores are logarithms to base two then
WIDE = [
    (1, 1536, 1536, 3, 128),
    (2, 300, 300, 2, 128),
    (3, 129, 128, 5, 128),
    (2, 128, 256, 2, 128),
    (2, 257, 130, 3, 128),
    (1, 64, 500, 24, 128),
    (3, 77, 20, 2, 128),
    (2, 5, 1, 2, 128),
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


def compare(got, query, key, value, bias=None, scale=None):
    q, k, v = (x.double().cpu().transpose(1, 2).numpy() for x in (query, key, value))
    for image in range(len(q)):
        scores = q[image] @ k[image].swapaxes(1, 2) * (scale or 1 / math.sqrt(q.shape[-1]))
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
        if difference.numel() >= 64:  # of fewer, all may round far
            # Where weights are relative to the largest, that needs no rounding, and is often most of the sum.
            most = 1.2 if scale == POWERS_OF_TWO and got.is_cuda and got.dtype == torch.bfloat16 else 1
            assert difference.square().mean() <= most * (GAP[got.dtype] / 2 * size).square().mean()
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
    compare(attend(*given_, scale=0.3), *given_, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "d"), NARROW + WIDE + OTHERS)
@pytest.mark.gpu
def test_kernel(batch, queries, keys, heads, d, dtype, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    for spread in (1, 4):  # scores of a few dozen: a row's largest weights come late as well
        given_ = inputs(batch, queries, keys, heads, d, dtype, "cuda", spread)
        y = attend(*given_)
        compare(y, *given_)
        assert torch.equal(y, attend(*(x.contiguous() for x in given_)))
        scaled = given_[0] * POWERS, *given_[1:]
        y = attend(*scaled, scale=POWERS_OF_TWO)
        compare(y, *scaled, scale=POWERS_OF_TWO)
        assert torch.equal(y, attend(*(x.contiguous() for x in scaled), scale=POWERS_OF_TWO))
        bias = bias_of(keys, batch, dtype, "cuda")
        compare(attend(*given_, bias), *given_, bias)


def extreme(case, device):
    """Heads of 128 columns whose scores leave, in some rows or in all, what powers of two can hold."""
    query, key, value = (x.clone() for x in inputs(2, 300, 333, 3, 128, torch.bfloat16, "cpu"))
    if case == "large":  # powers up to 2¹⁵¹ in one image's last tile
        query[1, 256:] *= 25
    elif case == "all large":
        query *= 50
    elif case == "a large row":
        query[0, 100, 1] = key[0, 332, 1] * 11  # the last key
    elif case == "small":  # 2⁻²⁵⁰ and so
        query[:, :, 2], key[:, :, 2] = 4.0, -4.0 + key[:, :, 2] / 16
    elif case == "around the limit":
        query *= torch.linspace(11, 19, 300)[None, :, None, None]
    return [x.bfloat16().to(device) for x in (query * POWERS, key, value)]


PLACES = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]  # tiles of 300 queries and halves that have any
EXTREMES = ["large", "all large", "a large row", "small", "around the limit"]


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.gpu
def test_scores_beyond_powers_of_two(case, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    given_ = extreme(case, "cuda")
    y = attend(*given_, scale=POWERS_OF_TWO)
    compare(y, *given_, scale=POWERS_OF_TWO)
    assert torch.equal(y, attend(*given_, scale=POWERS_OF_TWO))
    plain = [x[:1, :128] for x in extreme("none", "cuda")]
    mixed = [torch.cat([x[:1, :128], y]) for x, y in zip(given_, plain, strict=True)]
    both, alone = (attend(*x, scale=POWERS_OF_TWO) for x in (mixed, plain))
    assert torch.equal(both[1:], alone)  # tiles without doubt are as they were


@pytest.mark.gpu
def test_what_is_in_doubt():
    """Halves of tiles with scores out of range, none else: [image, head, tile, half]."""
    hopper_attention = pytest.importorskip("dirotq.kernels.hopper_attention", exc_type=ImportError)
    launched = []

    def recorded(kernel, grid, *args, **constants):
        launched.append((kernel, args))
        launch(kernel, grid, *args, **constants)

    launch = hopper_attention.launch
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's kernel")
    for case, expected in {
        "none": [],
        "large": [[1, head, 2, 0] for head in range(3)],  # queries from 256 to 299: the first half of the last tile
        "a large row": [[0, 1, 0, 1]],
        "all large": [[i, h, *place] for i in range(2) for h in range(3) for place in PLACES],
        "small": [[i, 2, *place] for i in range(2) for place in PLACES],
    }.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper_attention, "launch", recorded)
            hopper_attention.attend(*extreme(case, "cuda"), None, POWERS_OF_TWO)
        kernel, args = launched[-1]
        assert kernel is hopper_attention.doubtful_attention_kernel
        doubt = args[4].view(2, 3, 3, 2)
        assert doubt.nonzero().tolist() == sorted(expected)


@pytest.mark.gpu
def test_what_is_not_finite_shows():
    query, key, value = extreme("none", "cuda")
    query[0, 130, 1, 7] = torch.nan
    query[1, 7, 2, 9] = torch.inf
    y = attend(query, key, value, scale=POWERS_OF_TWO)
    wrong = y.isnan().any(3)
    assert wrong.nonzero().tolist() == [[0, 130, 1], [1, 7, 2]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_doubtful_tiles_alone(device):
    """Only those tiles, all of their rows, nothing else."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("run by test_interpreter.py")
    triton_attention = pytest.importorskip("dirotq.kernels.triton_attention", exc_type=ImportError)
    batch, length, keys, heads = (2, 150, 70, 2) if device == "cpu" else (2, 300, 333, 3)
    query, key, value = inputs(batch, length, keys, heads, 128, torch.bfloat16, device, spread=4)
    query = query * POWERS
    tiles = batch * heads * -(-length // 128)
    doubt = torch.zeros(tiles, 2, dtype=torch.int32, device=device)
    doubt[1, 0] = doubt[4, 1] = doubt[5] = 1
    out = torch.full((batch, length, heads, 128), 7.0, dtype=torch.bfloat16, device=device)
    q, k, v = (x.reshape(len(x) * x.shape[1], -1) for x in (query, key, value))
    options = {**triton_attention.DOUBTFUL, "OVERLAP": False}
    triton_attention.doubtful_attention_kernel[(2,)](
        q, k, v, out, doubt, length, keys, heads, tiles, q.stride(0), k.stride(0), v.stride(0), **options
    )
    expected = torch.full_like(out, 7.0)
    exact = attend(query.float(), key.float(), value.float(), scale=POWERS_OF_TWO)
    per_head = tiles // batch // heads
    for tile in (1, 4, 5):
        image, head, start = tile // per_head // heads, tile // per_head % heads, tile % per_head * 128
        expected[image, start : start + 128, head] = exact[image, start : start + 128, head].bfloat16()
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6)
    touched = (out != 7.0).any(3)
    assert torch.equal(touched, (expected != 7.0).any(3))


@pytest.mark.parametrize(("d", "scale"), [(72, None), (128, POWERS_OF_TWO)])
@pytest.mark.gpu
def test_any_layout_on_a_gpu(d, scale):
    """Rows at odd distances, heads apart, columns apart, expanded, at odd addresses: as contiguous tensors."""
    query, key, value = (x.contiguous() / 8 for x in inputs(2, 130, 140, 3, d, torch.bfloat16, "cuda"))
    expected = attend(query, key, value, scale=scale)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    by_column = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (query, key, value)]
    padded = [torch.cat([x.flatten(2), x[:, :, 0, :7]], 2)[..., :-7].unflatten(2, (3, d)) for x in (query, key, value)]
    odd = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (query, key, value)]
    for others in (by_head, by_column, padded, odd):
        assert torch.equal(attend(*others, scale=scale), expected)
    one = attend(query, key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1), scale=scale)
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


def test_what_the_kernels_take():
    hopper_attention = pytest.importorskip("dirotq.kernels.hopper_attention", exc_type=ImportError)
    bias = torch.zeros(1, 1)
    for dtype, widths in {torch.bfloat16: [72, 80, 128], torch.float16: [72, 80], torch.float32: []}.items():
        heads = [torch.empty(1, 1, 1, d, dtype=dtype) for d in range(1, 260)]
        for others, narrow in [((None, POWERS_OF_TWO), False), ((None, None), True), ((bias, POWERS_OF_TWO), True)]:
            taken = [x.shape[3] for x in heads if hopper_attention.takes(x, *others)]
            assert taken == (widths[:2] if narrow else widths)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "tokens", "heads", "d"), [(2, 4096, 16, 72), (1, 4608, 24, 128)])
def test_hundreds_of_results_are_equal(batch, tokens, heads, d):
    """Of PixArt's and FLUX.1's shape, in which every multiprocessor passes its buffers on a thousand times."""
    given_ = inputs(batch, tokens, tokens, heads, d, torch.bfloat16, "cuda")
    expected = attend(*given_, scale=POWERS_OF_TWO)
    for _ in range(300):
        assert torch.equal(attend(*given_, scale=POWERS_OF_TWO), expected)


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
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"scale is {scale}; a positive number"):
            attend(query, key, value, scale=scale)
    assert attend(query[:, :0], key, value).shape == (2, 0, 3, 8)
