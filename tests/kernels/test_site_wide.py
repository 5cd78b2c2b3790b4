"""The second pass of `rotate_quantize` by 256 columns gives the bits of that by 128, and is taken where it can be."""

import os
import re

import pytest
import torch

from ..marks import thorough
from . import cases
from .offline import compile_gluon, needs_gluon
from .test_offline_hopper import ONE_OR_TWO_PARTS, site_types

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Gluon is not interpreted")
# Rows, columns of the parts, rank, Hadamard block.
SITES = [
    (1, (256,), 8, 128),
    (63, (256, 512), 16, 64),
    (64, (3072,), 64, 128),
    (513, (3072, 12288), 64, 128),
    (1000, (2304,), 40, 32),
    (4608, (3072, 12288), 64, 128),
    (4095, (12288,), 64, 128),
    (20_001, (768,), 64, 128),
]


@pytest.mark.gpu
@needs_gluon
@pytest.mark.parametrize(("m", "widths", "rank", "block"), SITES)
def test_both_widths_give_the_same_bits(m, widths, rank, block, monkeypatch):
    from dirotq.kernels import hopper_site, triton_site

    case = cases.site(m, sum(widths), rank, block=block, device="cuda", dtype=torch.bfloat16)
    x, *rest = case.arguments
    parts = list(x.split(list(widths), 1))
    if not triton_site._on_hopper(x, rest[0]):
        pytest.skip("not this GPU's kernel")

    def quantize(wide_elements):
        monkeypatch.setattr(hopper_site, "WIDE_ELEMENTS", wide_elements)
        return triton_site.rotate_quantize(parts, *rest, "int4")

    narrow, wide, again = quantize(x.numel() + 1), quantize(0), quantize(0)
    assert all(map(torch.equal, wide, narrow)) and all(map(torch.equal, again, wide))


@needs_gluon
@pytest.mark.parametrize("mode", ["int4", "codebook", "int8"])
@pytest.mark.parametrize(
    ("m", "widths", "rank", "wide"),
    [
        (700, (3072, 12288), 64, True),
        (39_063, (256,), 8, True),
        (39_062, (256,), 8, False),  # too few for it to be faster
        (700, (3072, 12288), 0, False),  # no subspace
        (8700, (1152,), 64, False),  # PixArt's: no multiple of 256 columns
        (39_063, (128, 128), 64, False),  # a part that ends within 256 columns
    ],
)
def test_taken_where_it_can_be(m, widths, rank, wide, mode, monkeypatch):
    from dirotq.kernels import gluon_site_wide, hopper_site

    made = []
    monkeypatch.setattr(hopper_site, "launch", lambda kernel, grid, *_, **constants: made.append((kernel, grid)))
    case = cases.site(m, sum(widths), rank, block=128, dtype=torch.bfloat16)
    x, *rest = case.arguments
    z = torch.empty(m, rank, dtype=torch.bfloat16)
    hopper_site.rotate_quantize(list(x.split(list(widths), 1)), *rest, mode, z, 132)
    kernel, (columns, programs) = made[-1]
    assert (kernel is gluon_site_wide.site_quantize_wide_kernel) == (wide and mode == "int4")
    assert columns == sum(widths) // (256 if wide and mode == "int4" else 128)
    assert 0 < programs <= -(-m // 64)


@needs_gluon
@pytest.mark.parametrize("block", [128, thorough(64), thorough(32)])
@ONE_OR_TWO_PARTS
def test_compiles(x, block, tmp_path):
    from dirotq.kernels import gluon_site_wide, hopper_site

    values = {"BLOCK": block, **x, "STAGES": hopper_site.WIDE_STAGES}
    ptx = compile_gluon(gluon_site_wide.site_quantize_wide_kernel, site_types(), values, tmp_path).asm["ptx"]
    assert "setmaxnreg" in ptx and re.search(r"wgmma\.mma_async\S*m64n128k16\.f32\.bf16", ptx)
