"""Compiling kernels for GPUs that are not here, and what a compiled kernel may need of one."""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton does not compile while it interprets", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

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
# The 16-bit one; sm_90 and sm_100 multiply tiles of fewer than 64 rows with that of sm_80.
_OF_WARPS = r"mma\.sync\S*f32\.(bf16|f16)"
FLOAT_MATRIX = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), _OF_WARPS),
    "sm_90": rf"wgmma\.mma_async\S*f32\.(bf16|f16)|{_OF_WARPS}",
    "sm_100": rf"tcgen05\.mma\S*kind::f16|{_OF_WARPS}",
    "gfx1100": r"v_wmma_f32",
    "gfx942": r"v_mfma_f32",
}


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
                if name in ("norm", "factor", "eps", "query_scale")
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


def listed(compiled, folder, tool, option):
    """What a tool that comes with Triton says of a kernel compiled for NVIDIA."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, option, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spilled(compiled, target, folder):
    """Bytes (NVIDIA) or registers (AMD) that the compiled kernel keeps in memory for want of registers."""
    if target.backend == "hip":
        counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert counts
        return sum(map(int, counts))
    (stack,) = re.findall(r"REG:\d+ STACK:(\d+)", listed(compiled, folder, "cuobjdump", "--dump-resource-usage"))
    return int(stack)


def loop(compiled, matrix, folder):
    """Names of the instructions in the loop with most instructions `matrix` of a compiled kernel, in order."""
    listing = listed(compiled, folder, "nvdisasm", "-c").splitlines()
    labels = {found[1]: i for i, line in enumerate(listing) if (found := re.match(r"(\.L_x_\d+):", line))}
    loops = []
    for end, line in enumerate(listing):
        target = re.search(r"BRA[^`]*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], end) < end:
            body = "\n".join(listing[labels[target[1]] : end])
            loops.append(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", body, re.M))
    return max(loops, key=lambda names: names.count(matrix))


def check(compiled, target, shared_memory, folder, most_spilled=0, known=None):
    """known: why this kernel spills on this chip; then it fails once it does not."""
    assert compiled.metadata.shared <= shared_memory
    count = spilled(compiled, target, folder)
    if known and count:
        pytest.xfail(f"spills: {known}")
    assert not (known and NEW), "spills no more: that is no longer known of it"
    assert count <= most_spilled or not NEW


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
