"""`linear_a8_add`, residual + gate · linear: the reference against float64, every strategy against the reference."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq import kernels
from dirotq.kernels import reference
from dirotq.kernels.addend import addend

from . import cases, oracle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TABLE = kernels.CODEBOOK16


def f64(tensor):
    return tensor.double().cpu().numpy()


def case(batch, sizes, k, n, rank, dtype=torch.bfloat16, device="cpu", gated=True):
    """The arguments of the linear, the parts of the residual, and the gate."""
    m = batch * sum(sizes)
    codes, scale = cases.lattice(m, k, device)
    w = cases.weights(n, k, rank, device=device)
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(m, rank, generator=generator).bfloat16().to(device) if rank else None
    parts = [torch.randn(batch, s, n, generator=generator).to(device, dtype) for s in sizes]
    gate = torch.randn(batch, 3 * n, generator=generator).to(device, dtype)[:, n : 2 * n] if gated else None
    return (codes, scale, z, w.weight, w.row_scale / 100, w.low_rank, w.bias, TABLE), parts, gate


def assert_close(y, expected, parts):
    """Up to one rounding of the product and one of the sum, and the order of fp32 sums."""
    residual = torch.cat(parts, 1).reshape(y.shape).double()
    y, dtype, expected = y.double(), y.dtype, expected.double()
    size = expected.abs() + (expected - residual).abs()
    assert ((y - expected).abs() <= cases.ULP[dtype] * size + 1e-5 * size.max()).all()


def check(batch, sizes, k, n, rank, dtype, device, gated):
    linear, parts, gate = case(batch, sizes, k, n, rank, dtype, device, gated)
    y = kernels.linear_a8_add(*linear, parts, gate)
    expected = reference.linear_a8_add(*linear, parts, gate)
    assert y.dtype == expected.dtype and y.shape == expected.shape
    assert_close(y, expected, parts)
    assert torch.equal(y, kernels.linear_a8_add(*linear, parts, gate))
    return linear, parts, gate, y


@pytest.mark.skipif(INTERPRETED, reason="the reference is tested without the interpreter")
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=3), groups=st.integers(1, 3),
    n=st.integers(1, 40), rank=st.integers(0, 5), gated=st.booleans(), dtype=st.sampled_from(list(cases.ULP)),
)  # fmt: skip
def test_definition(batch, sizes, groups, n, rank, gated, dtype):
    if not sum(sizes):
        sizes = [1, *sizes]
    linear, parts, gate = case(batch, sizes, 64 * groups, n, rank, dtype, gated=gated)
    y = kernels.linear_a8_add(*linear, parts, gate)
    codes, scale, z, weight, weight_scale, low_rank, bias, _ = linear
    floats = [None if t is None else f64(t) for t in (weight_scale, low_rank, bias)]
    whole = oracle.linear_a8(f64(codes), f64(scale), None if z is None else f64(z), weight.numpy(), *floats, TABLE)
    rows, scales, start = [], [], 0
    for image in range(batch):
        residual = np.concatenate([f64(part)[image] for part in parts])
        own = whole[start : start + len(residual)]
        rows.append(residual + (own if gate is None else f64(gate)[image] * own))
        scales.append(np.abs(rows[-1]) + np.abs(rows[-1] - residual))  # the product is rounded, then the sum
        start += len(residual)
    expected = np.concatenate(rows)
    assert y.dtype == dtype and y.shape == expected.shape
    assert (np.abs(f64(y) - expected) <= cases.ULP[dtype] * np.concatenate(scales) + 1e-5).all()


def test_parts_of_one_tensor_are_not_moved():
    whole = torch.randn(2, 7, 64).bfloat16()
    parts = list(whole.split([3, 4], 1))
    assert addend(parts, None).residual.data_ptr() == whole.data_ptr()
    assert torch.equal(addend(parts, None).residual, whole.flatten(0, 1))
    for others in (
        [parts[1], parts[0]], [parts[0][:1], parts[1][1:]], [parts[0], parts[1].clone()], [parts[0], parts[0]],
        [p[..., :32] for p in parts], [parts[0], parts[1][:, ::2]], [parts[0][:, :2], parts[1]],
    ):  # fmt: skip
        made = addend(others, None)
        assert torch.equal(made.residual, torch.cat(others, 1).flatten(0, 1)), "parts that lie otherwise are joined"
        assert made.image == sum(p.shape[1] for p in others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({8: []}, "residual is empty"),
        ({8: [torch.zeros(1, 4, 8)]}, r"residual has 4 tokens, codes have 6"),
        ({8: [torch.zeros(6, 8)]}, r"residual\[0\] has shape \[6, 8\]; expected \[B, S_0, 8\]"),
        ({8: [torch.zeros(2, 3, 9)]}, r"residual\[0\] has shape \[2, 3, 9\]"),
        ({8: [torch.zeros(2, 2, 8), torch.zeros(1, 2, 8)]}, r"residual\[1\] has shape \[1, 2, 8\]; expected \[2, S_1"),
        ({8: [torch.zeros(2, 2, 8), torch.zeros(2, 1, 8).half()]}, r"residual\[1\] has dtype torch.float16"),
        ({8: [torch.zeros(2, 3, 8, dtype=torch.int8)]}, "out_dtype is torch.int8"),
        ({9: torch.zeros(1, 8)}, r"gate has shape \[1, 8\]; expected \[2, 8\]"),
        ({9: torch.zeros(2, 8).half()}, "gate has dtype torch.float16"),
        ({8: [torch.zeros(2, 3, 8, device="meta")]}, r"residual\[0\] is on meta"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    linear, parts, gate = case(2, [3], 64, 8, 2, torch.float32)
    arguments = {**dict(enumerate((*linear, parts, gate))), **change}
    with pytest.raises(ValueError, match=message):
        kernels.linear_a8_add(*arguments.values())


def test_under_the_compiler():
    linear, parts, gate = case(2, [3, 4], 64, 24, 2)
    torch.library.opcheck(torch.ops.dirotq.linear_a8_add.default, (*linear[:7], list(TABLE), parts, gate))


NARROWING = ((3072, 3072), (12288, 3072), (15360, 3072), (1152, 1152), (4608, 1152), (192, 264))
SHAPES = [  # images, parts of one, K, N
    *[(1, [m], k, n) for k, n in NARROWING for m in cases.TOKENS],
    (1, [512, 4096], 15360, 3072),
    (2, [256, 512], 3072, 3072),
    (2, [4096], 1152, 1152),
    (3, [100], 192, 1152),
    (2, [77, 300], 3072, 3072),
    (4, [1], 256, 64),
    (2, [33], 192, 33),
]  # fmt: skip
SMALL = [(1, [7], 192, 65), (2, [5, 12], 64, 130), (3, [9], 256, 33)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize(
    ("batch", "sizes", "k", "n", "device"),
    [pytest.param(*s, "cpu") for s in (SMALL if INTERPRETED else [])]
    + [pytest.param(*s, "cuda", marks=pytest.mark.gpu) for s in SHAPES],
)
def test_kernels(batch, sizes, k, n, rank, gated, device):
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if sum(sizes) < 1000 else (torch.bfloat16,):
        check(batch, sizes, k, n, rank, dtype, device, gated)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("batch", "s", "k", "n"), [(1, 200, 1152, 1152), (2, 256, 3072, 3072), (1, 4608, 15360, 3072)])
def test_strategies_agree(batch, s, k, n, gated, monkeypatch):
    from dirotq.kernels import hopper_packed, triton_linear

    linear, parts, gate, y = check(batch, [s], k, n, 64, torch.bfloat16, "cuda", gated)
    if not triton_linear.on_hopper(n, 64, linear[0].device):
        pytest.skip("this GPU has one strategy")
    for tile in ((64, False), (64, True), (128, False), (128, True), (256, False), (256, True), None):
        monkeypatch.setattr(hopper_packed, "choose", lambda *_, tile=tile: tile)
        runs = [kernels.linear_a8_add(*linear, parts, gate) for _ in range(3)]
        assert all(torch.equal(run, y) for run in runs), tile
    monkeypatch.setattr(triton_linear, "on_hopper", lambda *_: False)
    assert_close(y, kernels.linear_a8_add(*linear, parts, gate), parts)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [128, 256, (128, False), (256, False)])
@pytest.mark.parametrize("gated", [False, True])
def test_thousands_of_sums_are_equal(gated, tile, monkeypatch):
    """Without a fence one in a million residual tiles was overwritten while it was read (K = 1152, no gate)."""
    from dirotq.kernels import hopper, hopper_packed, triton_linear

    linear, parts, gate = case(2, [4096], 1152, 1152, 64, device="cuda", gated=gated)
    if not triton_linear.on_hopper(1152, 64, linear[0].device):
        pytest.skip("the kernels are Hopper's")
    monkeypatch.setattr(hopper_packed, "choose", lambda *_: None if isinstance(tile, int) else tile)
    monkeypatch.setattr(hopper, "unpacked_columns", lambda *_: tile)
    first = kernels.linear_a8_add(*linear, parts, gate).view(torch.int16)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(6000):
        differ += (kernels.linear_a8_add(*linear, parts, gate).view(torch.int16) != first).any()
    assert not differ
