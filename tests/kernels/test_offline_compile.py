"""Every Triton kernel compiled for GPUs that are not here: its matrix instruction, shared memory, no spills."""

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton does not compile while it interprets", allow_module_level=True)

from dirotq.kernels import (  # noqa: E402
    rehearsal,
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

from ..marks import thorough  # noqa: E402
from .offline import FLOAT_MATRIX, NEW, TARGETS, check, compile_for, loop, overlaps  # noqa: E402

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
    "quantize int8": (triton_rotate.quantize_kernel, QUANTIZE, {**ROTATED, "MODE": "int8", **MANY}, False),
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


# Passes for uncommon sites (fp16, other ranks) and for AMD, which keep a part of their registers in memory: slower than
# they could be there, not wrong.
SPILLING = {
    **{(chip, "quantize int4, no basis"): "fp16 and int4" for chip in TARGETS},
    ("gfx1100", "quantize int4, one token"): "int4",
    **{
        ("gfx942", name): "a tile of 8 waves"
        for name in ("rotate", *(f"quantize {mode}" for mode in ("codebook", "int4", "int8")))
    },
}


# Other sizes and modes of a kernel, with `-m thorough`.
VARIANTS = (
    "quantize codebook", "quantize int8", "quantize int4, one token", "quantize int4, no basis", "a8, one token",
    "a8, 64 tokens", "a8, GELU", "a16, 16 tokens",
)  # fmt: skip


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        *((chip, name) for chip in TARGETS for name in KERNELS if name not in VARIANTS),
        *(thorough(chip, name) for chip in TARGETS for name in VARIANTS),
    ],
)
def test_compiles(chip, name, tmp_path):
    target, shared_memory, int8_matrix = TARGETS[chip]
    kernel, pointers, values, is_int8 = KERNELS[name]
    if "ASM" in kernel.arg_names:
        values = {**values, "ASM": target.backend == "cuda"}
    compiled = compile_for(target, kernel, pointers, values)
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    assert re.search(FLOAT_MATRIX[chip], assembly)
    assert not is_int8 or re.search(int8_matrix, assembly)
    check(compiled, target, shared_memory, tmp_path, known=SPILLING.get((chip, name)))


@pytest.mark.parametrize(("chip", "tokens"), [("sm_80", 4608), ("sm_86", 64), ("sm_89", 4608), ("sm_120", 4608)])
def test_expanding_weights_does_not_outweigh_multiplying_them(chip, tokens, tmp_path):
    target, _, _ = TARGETS[chip]
    tile = triton_linear.blocks(tokens, 3072)
    compiled = compile_for(target, triton_linear.linear_a8_kernel, A8, {**LINEAR_A8, "ASM": True, **tile})
    names = loop(compiled, "IMMA", tmp_path)
    integers = sum(names.count(name) for name in ("PRMT", "LOP3", "SEL", "SHF", "ISETP", "IADD3"))
    # A matrix instruction of 16 by 8 by 32 keeps a quarter of a multiprocessor for 16 cycles, each of these for two.
    assert 2 * integers <= 16 * names.count("IMMA")


ON_ALL = ("partial project, 4608 tokens", "quantize int4, 4608 tokens")
OTHER_MODES = ("quantize codebook, 4608 tokens", "quantize int8, 4608 tokens")


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        *((chip, name) for chip in TARGETS if chip.startswith("sm_") for name in ON_ALL),
        *(thorough(chip, name) for chip in TARGETS if chip.startswith("sm_") for name in OTHER_MODES),
        *(
            thorough(chip, name)
            for chip in ("sm_86", "sm_90")
            for name in SITE_KERNELS
            if name not in (*ON_ALL, *OTHER_MODES)
        ),
    ],
)
def test_site_kernels_compile(chip, name, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    kernel, pointers, values = SITE_KERNELS[name]
    compiled = compile_for(target, kernel, pointers, values)
    assert re.search(FLOAT_MATRIX[chip], compiled.asm["ptx"])
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize(
    ("chip", "chunks", "rows"),
    [
        *((chip, *plan) for chip in TARGETS if chip.startswith("sm_") for plan in ((32, 4), (3, 16))),
        thorough("sm_90", 120, 16),
    ],
)
def test_sum_of_parts_compiles(chip, chunks, rows, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    values = {"CHUNKS": chunks, "PROJECT": True, "OVERLAP": overlaps(chip), "BM": rows, "num_warps": 4, "num_stages": 3}
    compiled = compile_for(target, triton_site.sum_project_kernel, PASS, values)
    check(compiled, target, shared_memory, tmp_path)


@pytest.mark.parametrize("tokens", [1, thorough(4)])
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


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", thorough("gfx1100"), "gfx942"])
def test_nvfp4_compiles_elsewhere(chip, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    values = {**LINEAR, "NATIVE": False, **triton_fp4.blocks(4608, False)}
    compiled = compile_for(target, triton_fp4.linear_nvfp4_kernel, NVFP4, values)
    assert re.search(FLOAT_MATRIX[chip], compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"])
    known = "two decodes of fp32 a tile" if chip == "gfx1100" else None
    check(compiled, target, shared_memory, tmp_path, known=known)


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
    ("chip", "d", "dtype"),
    [
        *((chip, 3072, "bf16") for chip in TARGETS),
        *(thorough(chip, d, "bf16") for chip in ("sm_86", "sm_90", "gfx1100") for d in (1152, 5120, 16384)),
        *(thorough("sm_90", 3072, dtype) for dtype in ("fp16", "fp32")),
    ],
)
def test_norm_modulate_compiles(chip, d, dtype, tmp_path):
    target, shared_memory, _ = TARGETS[chip]
    kernel = triton_norm.norm_modulate_kernel
    pointers = dict.fromkeys(kernel.arg_names, dtype)
    compiled = compile_for(target, kernel, pointers, {"D": d, "OVERLAP": overlaps(chip), **triton_norm.blocks(d)})
    check(compiled, target, shared_memory, tmp_path)
    if target.backend == "cuda":  # every access of 16 bytes: rows of the parts, scale, shift; what is written
        accesses = re.findall(r"(?:ld|st)\.global\S*", compiled.asm["ptx"])
        assert accesses and all(".v4.b32" in access for access in accesses)


def test_threads_compile_what_one_compiles(monkeypatch, tmp_path):
    """As in a rehearsal: kernels that share code, and one kernel for several chips, at the same time."""
    parse, one = triton.JITFunction.parse, threading.Lock()

    def parse_alone(function):
        with one:
            return parse(function)

    if not rehearsal._PARSES_IN_THREADS:
        monkeypatch.setattr(triton.JITFunction, "parse", parse_alone)
    names = ("a8, one token", "quantize int4", "project")
    wanted = [(name, chip) for name in names for chip in ("sm_86", "sm_90")]

    def compile(what):
        kernel, pointers, values, _ = KERNELS[what[0]]
        values = {**values, "ASM": True} if "ASM" in kernel.arg_names else values
        return compile_for(TARGETS[what[1]][0], kernel, pointers, values).asm["ptx"]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "threads"))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(compile, wanted))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "one"))
    assert together == [compile(what) for what in wanted]
    assert len({*together}) == len(wanted)


@pytest.mark.skipif(not NEW, reason="older Triton has another way to ask")
def test_small_tensors_compile_to_the_same():
    """What a rehearsal gives to the compiler, in the place of the arguments: as Triton looks at it."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature
    from triton.tools.tensor_descriptor import TensorDescriptor

    from dirotq.kernels import hopper
    from dirotq.kernels.rehearsal import _small

    @triton.jit
    def kernel(a_ptr, b_ptr, c_desc, n, scale):
        pass

    backend = make_backend(TARGETS["sm_90"][0])
    look = create_function_from_signature(kernel.signature, kernel.params, backend)
    for dtype in (torch.int8, torch.bfloat16, torch.float32):
        large = torch.zeros(4096, 256, dtype=dtype)
        for a in (large, large[0, 1:]):
            for c in (hopper.descriptor(large, 64, 128), TensorDescriptor.from_tensor(large, [64, 128])):
                args = (a, large, c, 48, 0.5)
                assert str(look(*map(_small, args))[1]) == str(look(*args)[1])
        assert str(look(large, large, c, 48, 0.5)[1]) != str(look(large[0, 1:], large, c, 48, 0.5)[1])
