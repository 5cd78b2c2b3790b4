"""Every Triton kernel compiled for GPUs that are not here: its matrix instruction, shared memory, no spills."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton does not compile while it interprets", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dirotq.kernels import (  # noqa: E402
    triton_add,
    triton_attention,
    triton_fp4,
    triton_gptq,
    triton_linear,
    triton_norm,
    triton_one_token,
    triton_rotate,
    triton_site,
    triton_unpack,
    triton_w4a16,
)
from dirotq.kernels.triton_common import OPTIONS  # noqa: E402

KIB = 1024
#: Older Triton spills registers in two kernels, and has not the Gluon and the early launch of Hopper's.
NEW = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
needs_gluon = pytest.mark.skipif(not NEW, reason="the kernel needs the Gluon of Triton 3.6, and is used from there on")
# Shared memory that one program can use, and the int8 matrix instruction of the chip.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB, r"mma\.sync\S*s32\.s8\.s8"),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * KIB, r"mma\.sync\S*s32\.s8\.s8"),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * KIB, r"mma\.sync\S*s32\.s8\.s8"),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB, r"wgmma\.mma_async\S*s32\.s8\.s8"),
    # tcgen05 with Triton 3.9; with 3.4 and 3.6 the instruction of sm_80
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB, r"tcgen05\.mma\S*kind::i8|mma\.sync\S*s32\.s8\.s8"),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KIB, r"mma\.sync\S*s32\.s8\.s8"),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 64 * KIB, r"v_wmma_i32\S*iu8"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB, r"v_mfma_i32\S*i8"),
}
FLOAT_MATRIX = (
    r"mma\.sync\S*f32\.(bf16|f16)|wgmma\.mma_async\S*f32\.(bf16|f16)|tcgen05\.mma\S*kind::f16|v_(wmma|mfma)_f32"
)

SITE = {"x_ptr": "bf16", "z_ptr": "bf16", "basis_ptr": "bf16", "signs_ptr": "i8"}
WEIGHTS = {"z_ptr": "bf16", "weight_ptr": "u8", "low_rank_ptr": "bf16", "bias_ptr": "bf16", "out_ptr": "bf16"}
A8 = {**WEIGHTS, "codes_ptr": "i8", "scale_ptr": "fp32", "weight_scale_ptr": "fp32"}
A16 = {**WEIGHTS, "x_ptr": "bf16", "scale_ptr": "bf16", "words_ptr": "i32"}
QUANTIZE = {**SITE, "energy_ptr": "fp32", "codes_ptr": "i8", "scale_ptr": "fp32"}
LINEAR = {"HAS_LOW_RANK": True, "HAS_BIAS": True}
LINEAR_A8 = {**LINEAR, "GELU": False}
ROTATED = {"PROJECT": True, "ROTATE": True, "BLOCK": 128}
MANY = triton_rotate.blocks(4608, 128)
PASS = {**QUANTIZE, "partial_ptr": "fp32", "squares_ptr": "fp32"}
PROJECTED = {"PROJECT": True, "BLOCK": 128}

KERNELS = {
    "project": (
        triton_rotate.project_kernel,
        QUANTIZE,
        {"PROJECT": True, "PARTS": 1, **triton_rotate.project_blocks(4608)},
        False,
    ),
    "rotate": (triton_rotate.rotate_kernel, {**SITE, "v_ptr": "bf16"}, {**ROTATED, **MANY}, False),
    "quantize codebook": (triton_rotate.quantize_kernel, QUANTIZE, {**ROTATED, "MODE": "codebook", **MANY}, False),
    "quantize int4": (triton_rotate.quantize_kernel, QUANTIZE, {**ROTATED, "MODE": "int4", **MANY}, False),
    "quantize int4, one token": (
        triton_rotate.quantize_kernel, QUANTIZE, {**ROTATED, "MODE": "int4", **triton_rotate.blocks(1, 128)}, False
    ),
    "quantize int4, no basis": (
        triton_rotate.quantize_kernel,
        {**QUANTIZE, "x_ptr": "fp16", "basis_ptr": "fp16"},
        {**ROTATED, "PROJECT": False, "MODE": "int4", **MANY},
        False,
    ),
    "a8, many tokens": (
        triton_linear.linear_a8_kernel, A8, {**LINEAR_A8, **triton_linear.blocks(4608, 3072)}, True
    ),
    "a8, one token": (triton_linear.linear_a8_kernel, A8, {**LINEAR_A8, **triton_linear.blocks(1, 3072)}, True),
    "a8, 64 tokens": (triton_linear.linear_a8_kernel, A8, {**LINEAR_A8, **triton_linear.blocks(64, 3072)}, True),
    "a8, GELU": (
        triton_linear.linear_a8_kernel, A8, {**LINEAR_A8, "GELU": True, **triton_linear.blocks(4608, 3072)}, True
    ),
    "a16, many tokens": (
        triton_w4a16.many_tokens_kernel, A16, {**LINEAR, **triton_w4a16.many_tokens_blocks(4608, torch.bfloat16)}, False
    ),
    "a16, 16 tokens": (
        triton_w4a16.many_tokens_kernel, A16, {**LINEAR, **triton_w4a16.many_tokens_blocks(16, torch.bfloat16)}, False
    ),
}  # fmt: skip

# The passes over a common site, which only NVIDIA GPUs run.
SITE_KERNELS = {
    f"partial project, {m} tokens": (
        triton_site.partial_project_kernel, PASS, {"PROJECT": True, **triton_site.project_blocks(m)}
    )
    for m in (1, 4608)
}  # fmt: skip
for _mode in ("codebook", "int4", "int8"):
    for _m in (1, 4608):
        _values = {**PROJECTED, "MODE": _mode, **triton_site.site_blocks(_m)}
        SITE_KERNELS[f"quantize {_mode}, {_m} tokens"] = (triton_site.site_quantize_kernel, PASS, _values)


def overlaps(chip):
    """Whether kernels start there while the one before them ends."""
    return chip == "sm_90" and NEW


def compile_for(target, kernel, pointers, values):
    options = {**OPTIONS, **{name: values[name] for name in ("num_warps", "num_stages")}}
    signature, attributes, constants = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name] = "constexpr"
            constants[(position,)] = values[name]
        else:
            kind = (
                f"*{pointers[name]}"
                if name.endswith("_ptr")
                else "fp32"
                if name in ("norm", "factor", "eps")
                else "i32"
            )
            signature[name] = kind
            if name.endswith(("_ptr", "_batch", "_token")) or name in ("K", "r", "stride_x"):  # as a launch finds them
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    try:
        return triton.compile(source, target=target, options=options)
    except Exception as error:
        if "ld.lld" in str(error):  # older Triton does not bring the linker for AMD
            pytest.skip(str(error))
        raise


# Passes for uncommon sites (fp16, other ranks) and for AMD, which keep a part of their registers in memory: slower than
# they could be there, not wrong.
SPILLING = {
    **{(chip, "quantize int4, no basis"): "fp16 and int4" for chip in TARGETS},
    ("gfx1100", "quantize int4, one token"): "int4",
    **{("gfx942", name): "a tile of 8 waves" for name in ("rotate", "quantize codebook", "quantize int4")},
}


def spilled(compiled, target, folder):
    """Bytes (NVIDIA) or registers (AMD) that the compiled kernel keeps in memory for want of registers."""
    if target.backend == "hip":
        counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert counts
        return sum(map(int, counts))
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"REG:\d+ STACK:(\d+)", listing)
    return int(stack)


def check(compiled, target, shared_memory, folder, most_spilled=0):
    assert compiled.metadata.shared <= shared_memory
    assert spilled(compiled, target, folder) <= most_spilled or not NEW


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("chip", TARGETS)
def test_compiles(chip, name, tmp_path):
    target, shared_memory, int8_matrix = TARGETS[chip]
    kernel, pointers, values, is_int8 = KERNELS[name]
    compiled = compile_for(target, kernel, pointers, values)
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    assert re.search(FLOAT_MATRIX, assembly)
    assert not is_int8 or re.search(int8_matrix, assembly)
    if (chip, name) in SPILLING:
        assert compiled.metadata.shared <= shared_memory
        pytest.xfail(f"spills: {SPILLING[chip, name]}")
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize("name", SITE_KERNELS)
@pytest.mark.parametrize("chip", [chip for chip in TARGETS if chip.startswith("sm_")])
def test_site_kernels_compile(chip, name, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    kernel, pointers, values = SITE_KERNELS[name]
    compiled = compile_for(target, kernel, pointers, values)
    assert re.search(FLOAT_MATRIX, compiled.asm["ptx"])
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("chip", TARGETS)
def test_few_tokens_compiles(chip, tokens, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    asm = target.backend == "cuda"
    values = {**LINEAR, "ASM": asm, "OVERLAP": overlaps(chip), **triton_w4a16.few_tokens_blocks(tokens)}
    compiled = compile_for(target, triton_w4a16.few_tokens_kernel, A16, values)
    assert not asm or "prmt.b32" in compiled.asm["ptx"]
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize("chip", [chip for chip in TARGETS if chip.startswith("sm_")])
def test_one_token_compiles(chip, tmp_path):
    chunks = triton_one_token.MOST_CHUNKS
    target, shared_memory, _ = TARGETS[chip]
    values = {**LINEAR, "ASM": True, "OVERLAP": overlaps(chip), "CHUNKS": chunks, **triton_one_token.BLOCKS}
    compiled = compile_for(target, triton_one_token.one_token_kernel, A16, values)
    assert "dp4a.s32.u32" in compiled.asm["ptx"]
    check(compiled, target, shared_memory, tmp_path)


NVFP4 = {
    **WEIGHTS, "codes_ptr": "u8", "blocks_ptr": "u8", "weight_blocks_ptr": "u8",
    "scale_ptr": "fp32", "weight_scale_ptr": "fp32",
}  # fmt: skip


@pytest.mark.skipif(not NEW, reason="older Triton has no such product for sm_120; the other kernel runs then")
@pytest.mark.parametrize("tokens", [1, 4608])
@pytest.mark.parametrize(
    ("chip", "instruction"),
    [
        ("sm_100", r"tcgen05\.mma\S*kind::mxf4nvf4\.block_scale"),
        ("sm_120", r"mma\.sync\S*kind::mxf4nvf4\.block_scale\S*scale_vec::4X\S*e2m1\.e2m1\S*ue4m3"),
    ],
)
def test_nvfp4_compiles_to_the_block_scaled_instruction(chip, instruction, tokens, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    values = {**LINEAR, "NATIVE": True, **triton_fp4.blocks(tokens, True)}
    compiled = compile_for(target, triton_fp4.linear_nvfp4_kernel, NVFP4, values)
    assert re.search(instruction, compiled.asm["ptx"])
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx1100", "gfx942"])
def test_nvfp4_compiles_elsewhere(chip, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    values = {**LINEAR, "NATIVE": False, **triton_fp4.blocks(4608, False)}
    compiled = compile_for(target, triton_fp4.linear_nvfp4_kernel, NVFP4, values)
    assert re.search(FLOAT_MATRIX, compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"])
    if chip == "gfx1100":
        assert compiled.metadata.shared <= shared_memory
        pytest.xfail("spills: two decodes of fp32 a tile")
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize("chip", TARGETS)
def test_unpack_compiles(chip, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    values = {
        "ASM": target.backend == "cuda",
        "BLOCK": 1024,
        "OVERLAP": overlaps(chip),
        "num_warps": 4,
        "num_stages": 1,
    }
    compiled = compile_for(target, triton_unpack.unpack_kernel, {"packed_ptr": "i32", "out_ptr": "i32"}, values)
    assert target.backend != "cuda" or "prmt.b32" in compiled.asm["ptx"]
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize("chip", TARGETS)
def test_add_compiles(chip, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    pointers = dict.fromkeys(triton_add.add_kernel.arg_names, "bf16")
    values = {"GATED": True, "BLOCK": triton_add.BLOCK, "num_warps": 4, "num_stages": 1}
    compiled = compile_for(target, triton_add.add_kernel, pointers, values)
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize("chip", TARGETS)
def test_round_columns_compiles(chip, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    names = ("work", "factor", "scale", "midpoints", "values", "errors")
    pointers = {**{f"{name}_ptr": "fp32" for name in names}, "entries_ptr": "u8"}
    compiled = compile_for(target, triton_gptq.round_columns_kernel, pointers, triton_gptq.blocks(128))
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize("chip", TARGETS)
def test_qk_norm_rope_compiles(chip, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    kernel = triton_attention.qk_norm_rope_kernel
    pointers = {name: "fp32" if name in ("cos_ptr", "sin_ptr") else "bf16" for name in kernel.arg_names}
    compiled = compile_for(target, kernel, pointers, {"D": 128, "OVERLAP": overlaps(chip), **triton_attention.TILE})
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize(
    ("d", "dtype"), [(1152, "bf16"), (3072, "bf16"), (3072, "fp16"), (3072, "fp32"), (5120, "bf16"), (16384, "bf16")]
)
@pytest.mark.parametrize("chip", TARGETS)
def test_norm_modulate_compiles(chip, d, dtype, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    kernel = triton_norm.norm_modulate_kernel
    pointers = dict.fromkeys(kernel.arg_names, dtype)
    compiled = compile_for(target, kernel, pointers, {"D": d, "OVERLAP": overlaps(chip), **triton_norm.blocks(d)})
    check(compiled, target, shared_memory, tmp_path)
    if target.backend == "cuda":  # every access of 16 bytes: rows of the parts, scale, shift; what is written
        accesses = re.findall(r"(?:ld|st)\.global\S*", compiled.asm["ptx"])
        assert accesses and all(".v4.b32" in access for access in accesses)


def compile_gluon(kernel, types, values, folder, most_spilled=0, warps=4):
    """Compiled for Hopper; `types` of arguments that are no 32-bit integers, `values` of the constants."""
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    pointers = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
    source = GluonASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    target, shared_memory, _ = TARGETS["sm_90"]
    compiled = triton.compile(source, target=target, options={**OPTIONS, "num_warps": warps})
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    check(compiled, target, shared_memory, folder, most_spilled)
    return compiled


def descriptor(kind, *shape):
    from triton.experimental.gluon import language as gl

    dtype = {"i8": gl.int8, "i16": gl.int16, "bf16": gl.bfloat16}[kind]
    return f"tensordesc<{kind}{list(shape)},{gl.NVMMASharedLayout.get_default_for(list(shape), dtype)!r}>"


ENDS = {"plain": {}, "gelu": {"GELU": 1}, "added": {"ADD": True}, "gated": {"ADD": True, "GATED": True}}


@needs_gluon
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("columns", [128, 256])
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
@pytest.mark.parametrize("rows", [64, 128, 256])
@pytest.mark.parametrize(
    ("name", "end", "shared"),
    [
        ("linear_a8_packed_kernel", "plain", False),
        ("linear_a8_packed_kernel", "gelu", False),
        ("linear_a8_packed_kernel", "gated", False),
        ("linear_a8_packed_kernel", "gated", True),
        ("siblings_packed_kernel", "plain", False),
        ("siblings_packed_kernel", "gelu", True),
    ],
)
def test_hopper_packed_product_compiles(name, end, rows, shared, tmp_path):
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
@pytest.mark.parametrize(
    ("m", "alone", "project"), [(4608, False, True), (8192, True, True), (8192, True, False), (16384, True, True)]
)
@ONE_OR_TWO_PARTS
def test_hopper_project_compiles(x, m, alone, project, tmp_path):
    from dirotq.kernels import gluon_site, hopper_site

    tile = hopper_site.project_tile(m)
    rows = tile["ROWS"]
    assert (hopper_site.project_chunks(-(-m // rows), 24) == 1) == alone
    types = {**site_types(), **dict.fromkeys(("x_desc", "x1_desc"), descriptor("bf16", rows, 64))}
    values = {"PROJECT": project, "ALONE": alone, **x, **tile}
    compiled = compile_gluon(gluon_site.site_project_hopper_kernel, types, values, tmp_path, warps=rows // 16)
    assert 2 * (compiled.metadata.shared + KIB) <= 228 * KIB
    assert re.search(r"wgmma\.mma_async\S*f32\.bf16", compiled.asm["ptx"])
    # The second pass, which may start from here on, reads x before it waits: x must be complete by now.
    ptx = compiled.asm["ptx"]
    assert 0 < ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")
    assert ptx.index("griddepcontrol.wait") < ptx.index("cp.async.bulk.tensor")
