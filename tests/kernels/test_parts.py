"""`rotate_quantize_parts` equals `rotate_quantize` of the parts side by side, and Hopper's kernels read them apart."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq import kernels

from . import cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLUX = (3072, 12288)  # attention and MLP of a single block: the second lies in the columns of a product, 21504 wide
BEFORE = 21504 - FLUX[1]
# Widths of the parts, rank, and columns before each part but the first in its matrix.
OTHER = [
    (77, FLUX, 33, BEFORE),
    (77, FLUX, 384, BEFORE),
    (77, (3072, 12288 + 64), 64, BEFORE),
    (512, (3072 + 64, 12288), 16, BEFORE),
    (512, (3072 + 64, 12288 + 64), 64, BEFORE),
    (77, (1000, 24), 16, BEFORE),
    (77, (384,), 16, BEFORE),
    (77, (128, 256, 128), 64, 64),
    (65, (128, 128), 8, 9217),  # rows that the memory accelerator does not take
    (65, (128, 1152), 64, 4),
    (65, (0, 256), 8, 64),
    (65, (256, 0), 8, 64),
]
ODD = [(7, (128, 64), 3, 64), (5, (30, 34, 128), 0, 5), (3, (192,), 16, 0), (5, (128, 128), 8, 64)]


def site(m, widths, rank, before, device="cpu", dtype=torch.bfloat16, block=None):
    """The parts of x, and the other arguments up to the mode."""
    k = sum(widths)
    case = cases.site(m, k, rank, block=block or (128 if k % 128 == 0 else 64), device=device, dtype=dtype)
    first, *others = case.x.split(list(widths), 1)
    parts = [first.contiguous()]
    for x in others:
        wide = torch.randn(m, before + x.shape[1], device=device).to(dtype)
        wide[:, before:] = x
        parts.append(wide[:, before:])
    return parts, case.arguments[1:]


def check(parts, rest, mode):
    expected = kernels.rotate_quantize(torch.cat(parts, 1), *rest, mode)
    found = kernels.rotate_quantize_parts(parts, *rest, mode)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(INTERPRETED, reason="the reference is tested without the interpreter")
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 6), widths=st.lists(st.integers(0, 90), max_size=4), groups=st.integers(1, 4),
    rank=st.integers(0, 9), before=st.integers(0, 9), dtype=st.sampled_from(list(cases.ULP)),
    mode=st.sampled_from(cases.MODES),
)  # fmt: skip
def test_reference(m, widths, groups, rank, before, dtype, mode):
    rest = -sum(widths) % 64 + 64 * (groups - 1)
    check(*site(m, (*widths, rest or 64), rank, before, dtype=dtype, block=64), mode)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    ("m", "widths", "rank", "before"),
    [(m, FLUX, rank, BEFORE) for m in (1, 77, 512, 4608) for rank in (0, 16, 64)] + OTHER + ODD,
)
def test_kernels(m, widths, rank, before, mode, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check(*site(m, widths, rank, before, "cuda"), mode)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 77, 4608])
def test_nothing_is_concatenated_on_hopper(m, monkeypatch):
    from dirotq.kernels import triton_site

    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    parts, rest = site(m, FLUX, 64, BEFORE, "cuda")
    if not triton_site.reads_apart(parts, *rest):
        pytest.skip("this GPU concatenates")
    expected = kernels.rotate_quantize(torch.cat(parts, 1), *rest, "int4")
    monkeypatch.setattr(torch, "cat", None)
    assert all(map(torch.equal, kernels.rotate_quantize_parts(parts, *rest, "int4"), expected))


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(("m", "widths", "rank", "before"), ODD)
def test_cpu_interpreter(m, widths, rank, before, mode, monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    check(*site(m, widths, rank, before), mode)


@pytest.fixture
def launched(monkeypatch):
    """Arguments with which Hopper's kernels are launched on an imagined chip, by kernel, in order of the launches."""
    triton = pytest.importorskip("triton")
    if INTERPRETED or tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        pytest.skip("the kernels need the Gluon of Triton 3.6, and are not interpreted")
    from dirotq.kernels import hopper_site, triton_site

    made = []
    monkeypatch.setattr(triton_site, "is_hopper", lambda _: True)
    monkeypatch.setattr(triton_site, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(hopper_site, "launch", lambda kernel, grid, *arguments, **_: made.append((kernel, arguments)))
    return made


def x_of(launched):
    """What the two passes were given as x: descriptors of one or two parts, and the columns of the first."""
    from dirotq.kernels import gluon_site, gluon_site_wide

    passes = (
        gluon_site.site_project_hopper_kernel,
        gluon_site.site_quantize_hopper_kernel,
        gluon_site_wide.site_quantize_wide_kernel,
    )
    named = [dict(zip(kernel.arg_names, values, strict=False)) for kernel, values in launched if kernel in passes]
    first, second = ([given_[name] for name in ("x_desc", "x1_desc", "split")] for given_ in named)
    assert all(a is b for a, b in zip(first, second, strict=True))
    return first


@pytest.mark.parametrize(
    ("m", "first", "wide"), [(1, 128, False), (5, 128, False), (300, 128, False), (600, 256, True)]
)
def test_hopper_reads_two_parts_where_they_lie(m, first, wide, launched, monkeypatch):
    from dirotq.kernels import gluon_site_wide, hopper_site, triton_rotate

    monkeypatch.setattr(hopper_site, "WIDE_ELEMENTS", 1)  # where 256 columns at a time can be, they are
    parts, rest = site(m, (first, 256), 8, 64)
    triton_rotate.rotate_quantize_parts(parts, *rest, "int4")
    assert (launched[-1][0] is gluon_site_wide.site_quantize_wide_kernel) == wide
    x, x1, split = x_of(launched)
    assert split == first and x.shape == [m, first] and x1.shape == [m, 256]
    assert [d.base.data_ptr() for d in (x, x1)] == [p.data_ptr() for p in parts]
    assert m == 1 or x1.strides == [320, 1]


def test_hopper_aligns_each_part(launched):
    from dirotq.kernels import triton_rotate

    parts, rest = site(5, (128, 256), 8, 3)  # rows of the second at multiples of 518 bytes
    triton_rotate.rotate_quantize_parts(parts, *rest, "int4")
    x, x1, _ = x_of(launched)
    assert x.base.data_ptr() == parts[0].data_ptr() and x1.base.data_ptr() != parts[1].data_ptr()
    assert x1.strides == [256, 1] and torch.equal(x1.base, parts[1])


@pytest.mark.parametrize("widths", [(384,), (64, 320), (128, 128, 128), (0, 384), (384, 0)])
def test_hopper_is_given_one_matrix_otherwise(widths, launched):
    from dirotq.kernels import triton_rotate

    parts, rest = site(5, widths, 8, 64)
    triton_rotate.rotate_quantize_parts(parts, *rest, "int4")
    x, x1, split = x_of(launched)
    assert x1 is None and split == 384 and torch.equal(x.base, torch.cat(parts, 1))


@pytest.mark.parametrize(
    ("widths", "changes", "message"),  # of a change named part: of the second one
    [
        ((), {}, "parts is empty; at least one is needed"),
        ((64, 64), {}, r"basis has shape \[192, 3\]; expected \[128, r\]"),
        ((64, 65), {}, "parts, side by side, has 129 columns; a positive multiple of 64"),
        ((128, 64), {"part": torch.zeros(4, 64)}, r"parts\[1\] has shape \[4, 64\]; expected \[5, K_1\]"),
        ((128, 64), {"part": torch.zeros(5, 8, 8)}, r"parts\[1\] has shape \[5, 8, 8\]; expected \[5, K_1\]"),
        ((128, 64), {"part": torch.zeros(5, 64).half()}, r"parts\[1\] has dtype torch.float16; allowed: torch.float32"),
        ((128, 64), {"part": torch.zeros(5, 64, device="meta")}, r"parts\[1\] is on meta, parts\[0\] on cpu"),
        ((128, 64), {"signs": torch.ones(128, dtype=torch.int8)}, r"signs has shape \[128\]; expected \[192\]"),
        ((128, 64), {"basis": torch.ones(192, 3)}, "basis has dtype torch.float32; allowed: torch.bfloat16"),
        ((128, 64), {"signs": torch.ones(192, dtype=torch.int8, device="meta")}, r"signs is on meta, parts\[0\] on"),
        ((128, 64), {"block": 128}, "block is 128; a power of two that divides the 192 columns of parts"),
        ((128, 64), {"mode": "fp4"}, "mode is 'fp4'; one of codebook, int4, int8"),
    ],
)
def test_bad_input(widths, changes, message):
    case = cases.site(5, 192, 3, block=64)
    rest = {"basis": case.basis, "signs": case.signs, "block": 64, "mode": "int4", **changes}
    parts = [torch.zeros(5, width) for width in widths]
    parts[1:2] = [rest.pop("part", x) for x in parts[1:2]]
    with pytest.raises(ValueError, match=message):
        kernels.rotate_quantize_parts(parts, **rest)


def test_first_part_is_checked_like_x():
    with pytest.raises(ValueError, match=r"parts\[0\] has dtype torch.float64"):
        kernels.rotate_quantize_parts([torch.zeros(5, 64).double()], None, None, 1, "int8")
    with pytest.raises(ValueError, match=r"parts\[0\] has shape \[64\]; expected \[M, K_0\]"):
        kernels.rotate_quantize_parts([torch.zeros(64)], None, None, 1, "int8")
