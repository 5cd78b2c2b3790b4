"""Hopper's Gluon kernels compiled without the GPU."""

import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ..marks import thorough
from .offline import KIB, TARGETS, check, compile_for, compile_gluon, descriptor, loop, needs_gluon

ENDS = {"plain": {}, "gelu": {"GELU": 1}, "added": {"ADD": True}, "gated": {"ADD": True, "GATED": True}}


@needs_gluon
@pytest.mark.parametrize(
    ("columns", "end"),
    [
        (128, "gelu"), (256, "gated"),
        *(thorough(128, end) for end in ("plain", "added", "gated")),
        *(thorough(256, end) for end in ("plain", "added", "gelu")),
    ],
)  # fmt: skip
def test_hopper_product_compiles(columns, end, tmp_path):
    from triton.experimental.gluon import language as gl

    from dirotq.kernels.gluon_hopper import linear_a8_hopper_kernel as kernel

    tile = {"BN": columns, "STAGES": 4 if columns == 256 else 5, "PARTS": columns // 128}
    types = {
        "a_desc": descriptor("i8", 64, 128),
        "w_desc": descriptor("i8", columns, 128),
        "z_desc": descriptor("bf16", 64, 64),
        "l_desc": descriptor("bf16", columns, 64),
        "out_desc": descriptor("bf16", 64, 128),
        "scale_ptr": "*fp32",
        "weight_scale_ptr": "*fp32",
        "residual_desc": descriptor("bf16", 64, 128),
        **dict.fromkeys(("bias_ptr", "gate_ptr"), "*bf16"),
    }
    values = {"TOTAL": gl.int32, "HAS_BIAS": True, "GELU": 0, "ADD": False, "GATED": False, **ENDS[end], **tile}
    most_spilled = 8 if columns == 256 and end == "gated" else 0  # once a tile
    ptx = compile_gluon(kernel, types, values, tmp_path, most_spilled).asm["ptx"]
    assert re.search(TARGETS["sm_90"][2], ptx) and "setmaxnreg" in ptx and ("ex2.approx" in ptx) == (end == "gelu")


@needs_gluon
@pytest.mark.parametrize(
    ("name", "end", "shared", "rows"),
    [
        ("linear_a8_packed_kernel", "gelu", False, 128),
        ("linear_a8_packed_kernel", "gated", True, 256),
        ("siblings_packed_kernel", "gelu", True, 64),
        thorough("linear_a8_packed_kernel", "plain", False, 64),
        thorough("siblings_packed_kernel", "plain", False, 128),
        thorough("linear_a8_packed_kernel", "plain", False, 128),
        thorough("linear_a8_packed_kernel", "gelu", False, 256),
        thorough("linear_a8_packed_kernel", "gated", False, 128),
        thorough("linear_a8_packed_kernel", "gated", True, 64),
        thorough("linear_a8_packed_kernel", "gated", True, 128),
        thorough("siblings_packed_kernel", "plain", False, 64),
        thorough("siblings_packed_kernel", "gelu", False, 128),
        thorough("siblings_packed_kernel", "gelu", True, 256),
    ],
)
def test_hopper_packed_product_compiles(name, end, shared, rows, tmp_path):
    from dirotq.kernels import gluon_packed, hopper_packed

    tile = hopper_packed.block(rows, shared, torch.bfloat16)
    kernel = getattr(gluon_packed, name)
    types = {
        "a_desc": descriptor("i8", rows, 128),
        "z_desc": descriptor("bf16", rows, 32),
        "out_desc": descriptor("bf16", rows // tile["PARTS"], 64),
        "space_ptr": "*i32",
    }
    for argument in kernel.arg_names:
        if argument.startswith("w") and argument.endswith("_desc"):
            types[argument] = descriptor("i16", 128, 32)
        elif argument.startswith("l") and argument.endswith("_desc"):
            types[argument] = descriptor("bf16", 128, 32)
        elif "scale" in argument:
            types[argument] = "*fp32"
        elif argument.startswith(("bias", "gate_ptr")):
            types[argument] = "*bf16"
    values = {"HAS_BIAS": True, "GELU": 0, **ENDS[end], **tile}
    if name.startswith("siblings"):
        values["GELU"] *= 8
    else:
        values = {"ADD": False, "GATED": False, **values}
        types["residual_desc"] = descriptor("bf16", rows, 64)
    ptx = compile_gluon(kernel, types, values, tmp_path).asm["ptx"]
    assert re.search(TARGETS["sm_90"][2], ptx) and "prmt.b32" in ptx and "setmaxnreg" in ptx
    assert ("ex2.approx" in ptx) == (end == "gelu")
    assert ("ld.acquire.gpu" in ptx) == shared


SITE_TYPES = {
    **dict.fromkeys(("x_desc", "x1_desc", "z_desc", "basis_desc"), ("bf16", 64, 64)),
    **{"signs_ptr": "*i8", "codes_ptr": "*i8", "z_ptr": "*bf16", "norm": "fp32", "factor": "fp32"},
    **dict.fromkeys(("scale_ptr", "partial_ptr", "squares_ptr"), "*fp32"),
}


def site_types():
    return {name: kind if isinstance(kind, str) else descriptor(*kind) for name, kind in SITE_TYPES.items()}


ONE_OR_TWO_PARTS = pytest.mark.parametrize("x", [{"x1_desc": None}, {}], ids=["one part", "two parts"])


@needs_gluon
@pytest.mark.parametrize(
    ("mode", "block", "project", "x"),
    [
        *((mode, 128, True, x) for mode in ("codebook", "int4", "int8") for x in ({"x1_desc": None}, {})),
        ("int4", 64, False, {}),
        ("int8", 32, True, {}),
    ],
)
def test_hopper_quantize_compiles(mode, block, project, x, tmp_path):
    from dirotq.kernels import gluon_site, hopper_site

    values = {
        "PROJECT": project,
        "BLOCK": block,
        **x,
        "MODE": mode,
        "PARTS": hopper_site.PARTS[mode],
        "STAGES": hopper_site.STAGES,
    }
    compiled = compile_gluon(gluon_site.site_quantize_hopper_kernel, site_types(), values, tmp_path)
    assert hopper_site.RESIDENT * (compiled.metadata.shared + KIB) <= 228 * KIB
    assert re.search(r"wgmma\.mma_async\S*f32\.bf16", compiled.asm["ptx"])


@needs_gluon
@given(st.integers(1, 40_000), st.integers(1, 240), st.integers(1, 160))
def test_projection_fills_the_chip(m, blocks, multiprocessors):
    from dirotq.kernels import hopper_site

    tile, chunks = hopper_site.project_plan(m, blocks, multiprocessors)
    programs = chunks * -(-m // tile["ROWS"])
    two = 2 if tile["STAGES"] * tile["WIDTH"] * (tile["ROWS"] + 64) * 128 < 114 * KIB else 1  # by their shared memory
    assert 1 <= chunks <= blocks
    assert chunks == 1 or programs <= two * multiprocessors
    assert tile["WIDTH"] * 64 <= 128 and blocks * 128 >= chunks * tile["WIDTH"] * 64  # each has a step at least
    assert 1 <= hopper_site.sum_rows(m) <= 16


@needs_gluon
@pytest.mark.parametrize(
    ("m", "resident", "alone", "project"),
    [
        (512, 1, False, True),
        (4608, 2, False, True),
        (8192, 1, True, True),
        (8704, 2, True, False),
        thorough(512, 1, False, False),
        thorough(8192, 1, True, False),
        thorough(8704, 2, True, True),
        thorough(16384, 2, True, True),
    ],
)
@ONE_OR_TWO_PARTS
def test_hopper_project_compiles(x, m, resident, alone, project, tmp_path):
    from dirotq.kernels import gluon_site, hopper_site

    tile, chunks = hopper_site.project_plan(m, 24, 132)
    rows = tile["ROWS"]
    assert (chunks == 1) == alone
    assert chunks * -(-m // rows) <= resident * 132
    types = {**site_types(), **dict.fromkeys(("x_desc", "x1_desc"), descriptor("bf16", rows, 64))}
    values = {"PROJECT": project, "ALONE": alone, **x, **tile}
    compiled = compile_gluon(gluon_site.site_project_hopper_kernel, types, values, tmp_path, warps=rows // 16)
    assert resident * (compiled.metadata.shared + KIB) <= 228 * KIB
    assert re.search(r"wgmma\.mma_async\S*f32\.bf16", compiled.asm["ptx"])
    # The second pass, which may start from here on, reads x before it waits: x must be complete by now.
    ptx = compiled.asm["ptx"]
    assert 0 < ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")
    assert ptx.index("griddepcontrol.wait") < ptx.index("cp.async.bulk.tensor")


@needs_gluon
@pytest.mark.parametrize(("d", "bias", "masked"), [(72, False, False), (72, True, True), (80, False, True)])
def test_hopper_attention_compiles(d, bias, masked, tmp_path):
    from dirotq.kernels import hopper_attention
    from dirotq.kernels.gluon_attention import narrow_attention_kernel as kernel

    types = {"out_ptr": "*bf16", "bias_ptr": "*bf16", "factor": "fp32"}
    for name, rows in (("q", hopper_attention.QUERIES), ("k", hopper_attention.KEYS), ("v", hopper_attention.KEYS)):
        types[f"{name}_desc"] = descriptor("bf16", rows, hopper_attention.FIRST)
        types[f"{name}_rest_desc"] = descriptor("bf16", rows, hopper_attention.SECOND)
    values = {"D": d, "BIAS": bias, "MASK": masked, "STAGES": hopper_attention.STAGES}
    ptx = compile_gluon(kernel, types, values, tmp_path).asm["ptx"]
    for columns in (128, 64, 16):  # scores, and the two parts of a head
        assert re.search(rf"wgmma\.mma_async\S*m64n{columns}k16\.f32\.bf16", ptx)
    assert "ex2.approx" in ptx and "setmaxnreg" in ptx


@needs_gluon
@pytest.mark.parametrize("masked", [False, thorough(True)])
def test_hopper_wide_attention_compiles(masked, tmp_path):
    from dirotq.kernels import hopper_attention
    from dirotq.kernels.gluon_wide_attention import wide_attention_kernel as kernel

    types = {"out_ptr": "*bf16", "doubt_ptr": "*i32"}
    for name, rows in (("q", hopper_attention.QUERIES), ("k", hopper_attention.KEYS), ("v", hopper_attention.KEYS)):
        types[f"{name}_desc"] = descriptor("bf16", rows, hopper_attention.COLUMNS)
    values = {"MASK": masked, "STAGES": hopper_attention.WIDE_STAGES}
    compiled = compile_gluon(kernel, types, values, tmp_path, 32 if masked else 0)  # with the last keys, once a tile
    assert re.search(r"wgmma\.mma_async\S*m64n128k16\.f32\.bf16", compiled.asm["ptx"])
    per_tile = Counter(loop(compiled, "HGMMA", tmp_path))  # of both warpgroups
    assert per_tile["HGMMA"] >= 64 and per_tile["MUFU"] >= 256 and per_tile["FMNMX"] == 0  # no running maximum


@needs_gluon
def test_hopper_doubtful_attention_compiles(tmp_path):
    from dirotq.kernels.triton_attention import DOUBTFUL, doubtful_attention_kernel

    target, shared_memory, _ = TARGETS["sm_90"]
    pointers = {f"{name}_ptr": "bf16" for name in ("q", "k", "v", "out")} | {"doubt_ptr": "i32"}
    compiled = compile_for(target, doubtful_attention_kernel, pointers, {**DOUBTFUL, "OVERLAP": True})
    check(compiled, target, shared_memory, tmp_path)
    assert re.search(r"wgmma\.mma_async\S*f32\.bf16", compiled.asm["ptx"])
