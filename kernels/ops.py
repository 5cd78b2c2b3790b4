"""The ops of namespace `dirotq`: schemas, fake and autograd registrations, a documented function for each.

A linear y = x Wᵀ + b is computed as y = v̂ Ŵᵀ + z Lᵀ + b. Its input site has an orthonormal `basis` U [K, r],
`signs` ±1 D [K] and a block-diagonal normalized Hadamard matrix H:

    z = bf16(x U),  v = (x − z Uᵀ) D H  (v = x − z Uᵀ without signs),  v̂ = s · a

with a on an int8 lattice and one scale s per token. The subspace in 16 bit is DiRotQ's (arXiv 2605.16732); the
codebook and the lattice are this project's own.

Two copies of this package can live in one process (installed, and cloned into ComfyUI's custom_nodes). torch knows
one namespace `dirotq`, so the copy imported first registers the ops and leaves its library object, which has the
attribute `dirotq_api`, on `torch.ops.dirotq`. A later copy of the same API version uses those ops and registers
nothing; a copy of another version raises ImportError naming both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention, checks, gradients, norm, replay
from .addend import together
from .backend import implementation
from .reference import dequantize as _dequantize_reference

API_VERSION = 9
"""Changes whenever a schema or the meaning of an op does."""

SCHEMAS = {
    "rotate_quantize": "(Tensor x, Tensor? basis, Tensor? signs, int block, str mode)"
    " -> (Tensor codes, Tensor scale, Tensor z)",
    "rotate_quantize_parts": "(Tensor[] parts, Tensor? basis, Tensor? signs, int block, str mode)"
    " -> (Tensor codes, Tensor scale, Tensor z)",
    "rotate": "(Tensor x, Tensor? basis, Tensor? signs, int block) -> (Tensor v, Tensor z)",
    "linear_a8": "(Tensor codes, Tensor scale, Tensor? z, Tensor weight, Tensor weight_scale,"
    " Tensor? low_rank, Tensor? bias, int[] table, ScalarType out_dtype, bool gelu=False) -> Tensor",
    "linear_a8_add": "(Tensor codes, Tensor scale, Tensor? z, Tensor weight, Tensor weight_scale,"
    " Tensor? low_rank, Tensor? bias, int[] table, Tensor[] residual, Tensor? gate) -> Tensor",
    "linear_a8_siblings": "(Tensor codes, Tensor scale, Tensor? z, Tensor[] weights, Tensor[] weight_scales,"
    " Tensor[] low_ranks, Tensor[] biases, int[] table, ScalarType out_dtype, bool[] gelu=[]) -> Tensor",
    "linear_a16": "(Tensor x, Tensor? z, Tensor weight, Tensor weight_scale,"
    " Tensor? low_rank, Tensor? bias, int[] table) -> Tensor",
    "linear": "(Tensor x, Tensor? basis, Tensor? signs, int block, str mode, Tensor weight,"
    " Tensor weight_scale, Tensor? low_rank, Tensor? bias, int[] table) -> Tensor",
    "linear_nvfp4": "(Tensor codes, Tensor block_scale, Tensor scale, Tensor? z, Tensor weight,"
    " Tensor weight_block_scale, Tensor weight_scale, Tensor? low_rank, Tensor? bias, ScalarType out_dtype) -> Tensor",
    "dequantize": "(Tensor weight, Tensor weight_scale, int[] table, ScalarType dtype) -> Tensor",
    "qk_norm_rope": attention.ROPE_SCHEMA,
    "attend": attention.SCHEMA,
    "norm_modulate": norm.SCHEMA,
    "modulation_rows": norm.ROWS_SCHEMA,
}


def rotate_quantize(
    x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Project, rotate and quantize the input of a site.

    x [M, K] bf16, fp16 or fp32, rows may be strided; basis [K, r] bf16; signs [K] int8 ±1; block: columns of
    one Hadamard block, a power of two that divides K (unused without signs); K a multiple of 64. Modes:

    - ``codebook``: s = ρ / 36, a the nearest of ±{4, 13, 22, 32, 44, 56, 72, 96} to v / s
    - ``int4``: s = C ρ / 127; per 64 columns an integer step m and offset o, a = m q + o, q in 0..15
    - ``int8``: s = C ρ / 127, a = round(v / s) kept in -127..127

    with ρ = rms(v), taken from K ρ² = ‖x‖² − ‖x U‖², or 2⁻¹⁴ ‖x‖² if that is more: it costs no pass over v. Values
    beyond C ρ saturate, C = max(7, √(K / 128)). The codes are for the s that is returned, whatever its error.

    Returns codes a [M, K] int8, scale s [M] fp32 and z [M, r] bf16. A zero row has scale 0. x must be finite,
    and ‖x‖² within fp32. Not differentiable; `linear` is.
    Raises ValueError naming the argument and the rule it breaks.
    """
    return replay.op("rotate_quantize", _block(signs, block), (x, basis, signs, block, mode))


def rotate_quantize_parts(
    parts: Sequence[Tensor], basis: Tensor | None, signs: Tensor | None, block: int, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate_quantize` of `torch.cat(parts, 1)`, to the last bit.

    parts [M, K_i], at least one, of one dtype and device, rows may be strided; K = Σ K_i is a multiple of 64, any K_i
    will do. Hopper's kernels of the common site read two bf16 parts where they lie if K_0 and K are multiples of 128
    (`triton_site.reads_apart`); elsewhere the parts are concatenated first. Not differentiable.
    Raises ValueError naming the argument and the rule it breaks.
    """
    return replay.op("rotate_quantize_parts", _block(signs, block), (parts, basis, signs, block, mode))


def rotate(x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """v [M, K] in x.dtype and z [M, r] bf16; arguments as in `rotate_quantize`. Differentiable in x."""
    return torch.ops.dirotq.rotate.default(x, basis, signs, block)


def linear_a8(
    codes: Tensor,
    scale: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
    out_dtype: torch.dtype,
    gelu: bool = False,
) -> Tensor:
    """y [M, N] = s_m t_n Σ_k a_mk w_nk + Σ_j z_mj L_nj + b_n in `out_dtype` (bf16, fp16, fp32), rounded once.

    codes a [M, K] int8, scale s [M] fp32, z [M, r] bf16; weight [N, K/2] uint8 of 4-bit codes (`pack_int4`)
    whose lattice values are the 16 integers of `table`, in [-127, 127]; weight_scale t [N] fp32; low_rank L
    [N, r] bf16; bias b [N]. The integer sum is exact; it is multiplied by s, then by t, in fp32. With `gelu` the
    result is GELU(y) in its tanh form, rounded once as well. Not differentiable; `linear` is.
    Raises ValueError naming the argument and the rule it breaks.
    """
    args = codes, scale, z, weight, weight_scale, low_rank, bias, table, out_dtype, gelu
    return replay.op("linear_a8", 1, args)


def linear_a8_add(
    codes: Tensor,
    scale: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
    residual: Sequence[Tensor],
    gate: Tensor | None,
) -> Tensor:
    """residual + gate · y [M, N] for the y of `linear_a8` in the residual's dtype; in fp32, then rounded to it.

    residual: parts [B, S_i, N], side by side along S, M = B ΣS_i; parts of one tensor that lie there side by side, as
    what this op returns is split into, are not moved. gate [B, N] of that dtype, or None for 1. Not differentiable.
    Raises ValueError naming the argument and the rule it breaks.
    """
    args = codes, scale, z, weight, weight_scale, low_rank, bias, table, residual, gate
    return replay.op("linear_a8_add", 1, args, _residual_together)


def linear_a8_siblings(
    codes: Tensor,
    scale: Tensor,
    z: Tensor | None,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    low_ranks: Sequence[Tensor],
    biases: Sequence[Tensor],
    table: Sequence[int],
    out_dtype: torch.dtype,
    gelu: Sequence[bool] = (),
) -> Tensor:
    """The outputs of `linear_a8` for several linears of one input, side by side: y [M, ΣN], as one product.

    low_ranks, biases and gelu: one for each of `weights`, or none at all.
    """
    args = codes, scale, z, weights, weight_scales, low_ranks, biases, table, out_dtype, gelu
    return replay.op("linear_a8_siblings", 1, args)


def linear_a16(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
) -> Tensor:
    """y [M, N] = x Ŵᵀ + z Lᵀ + b in x.dtype: 4-bit weights, 16-bit activations, fp32 accumulation.

    x [M, K] bf16, fp16 or fp32; weight_scale [N, 1] or [N, K/64] fp32 or bf16; Ŵ = table[code] · scale, not
    rounded; the rest as in `linear_a8`. A kernel may round a single row of bf16 to 2⁻¹⁵ of the largest of 32 neighbours
    and make NaN of what is not finite. Differentiable in x and z.
    """
    return replay.op("linear_a16", 1, (x, z, weight, weight_scale, low_rank, bias, table))


def linear(
    x: Tensor,
    basis: Tensor | None,
    signs: Tensor | None,
    block: int,
    mode: str,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
) -> Tensor:
    """`rotate_quantize`, then `linear_a8` with out_dtype = x.dtype.

    Differentiable in x with the straight-through estimator: v̂ counts as v. Weights get no gradient.
    """
    return torch.ops.dirotq.linear.default(
        x, basis, signs, block, mode, weight, weight_scale, low_rank, bias, list(table)
    )


def linear_nvfp4(
    codes: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_block_scale: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, N] = s_m t_n Σ_k â_mk ŵ_nk + Σ_j z_mj L_nj + b_n in `out_dtype`, both sides in NVFP4 (see `fp4`).

    codes uint8 [M, K/2], block_scale uint8 [M, K/16] (bits of e4m3), scale s fp32 [M]; weight, weight_block_scale and
    weight_scale t likewise with N rows; the rest as in `linear_a8`. Sums in fp32. Not differentiable.
    """
    return torch.ops.dirotq.linear_nvfp4.default(
        codes, block_scale, scale, z, weight, weight_block_scale, weight_scale, low_rank, bias, out_dtype
    )


def dequantize(weight: Tensor, weight_scale: Tensor, table: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Ŵ [N, K] = table[code] · scale, rounded once to `dtype`.

    weight [N, K/2] uint8; weight_scale fp32 [N], or fp32 or bf16 [N, 1] or [N, K/64]; table as in `linear_a8`.
    """
    return torch.ops.dirotq.dequantize.default(weight, weight_scale, list(table), dtype)


# --- what the ops run ----------------------------------------------------------------------------------


def _rotate_quantize(*args):
    return replay.call(checks.rotate_quantize, "rotate_quantize", _block(args[2], args[3]), args)


def _rotate_quantize_parts(*args):
    return replay.call(checks.rotate_quantize_parts, "rotate_quantize_parts", _block(args[2], args[3]), args)


def _rotate(x, basis, signs, block):
    checks.rotation(x, basis, signs, block)
    return implementation("rotate", x.device, _block(signs, block))(x, basis, signs, block)


def _linear_a8(*args):  # without what equals the schema's default: so PyTorch calls it
    return replay.call(checks.linear_a8, "linear_a8", 1, args if len(args) == 10 else (*args, False))


def _residual_together(args):
    return together(args[8])


def _linear_a8_add(*args):
    return replay.call(checks.linear_a8_add, "linear_a8_add", 1, args, _residual_together)


def _linear_a8_siblings(*args):
    return replay.call(checks.linear_a8_siblings, "linear_a8_siblings", 1, args if len(args) == 10 else (*args, []))


def _linear_a16(*args):
    return replay.call(checks.linear_a16, "linear_a16", 1, args)


def _linear_nvfp4(*args):
    checks.linear_nvfp4(*args)
    return implementation("linear_nvfp4", args[0].device)(*args)


def _linear(x, basis, signs, block, mode, weight, weight_scale, low_rank, bias, table):
    checks.linear(x, basis, signs, block, mode, weight, weight_scale, low_rank, bias, table)
    quantize = implementation("rotate_quantize", x.device, _block(signs, block))
    multiply = implementation("linear_a8", x.device)
    codes, scale, z = quantize(x, basis, signs, block, mode)
    return multiply(codes, scale, z, weight, weight_scale, low_rank, bias, table, x.dtype)


def _dequantize(weight, weight_scale, table, dtype):
    checks.dequantize(weight, weight_scale, table, dtype)
    return _dequantize_reference(weight, weight_scale, table, dtype)


def _block(signs: Tensor | None, block: int) -> int:
    return 1 if signs is None else block


# --- shapes for tracing --------------------------------------------------------------------------------


def _rank(basis: Tensor | None) -> int:
    return 0 if basis is None else basis.shape[1]


def _fake_rotate_quantize(x, basis, signs, block, mode):
    checks.rotate_quantize(x, basis, signs, block, mode)
    return _fake_quantized(x, x.shape[1], basis)


def _fake_quantized(x, k, basis):
    return (
        x.new_empty((x.shape[0], k), dtype=torch.int8),
        x.new_empty(x.shape[:1], dtype=torch.float32),
        x.new_empty((x.shape[0], _rank(basis)), dtype=torch.bfloat16),
    )


def _fake_rotate_quantize_parts(parts, basis, signs, block, mode):
    checks.rotate_quantize_parts(parts, basis, signs, block, mode)
    return _fake_quantized(parts[0], sum(part.shape[1] for part in parts), basis)


def _fake_rotate(x, basis, signs, block):
    checks.rotation(x, basis, signs, block)
    return x.new_empty(x.shape), x.new_empty((x.shape[0], _rank(basis)), dtype=torch.bfloat16)


def _fake_linear_a8(codes, scale, z, weight, weight_scale, low_rank, bias, table, out_dtype, gelu=False):
    checks.linear_a8(codes, scale, z, weight, weight_scale, low_rank, bias, table, out_dtype, gelu)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=out_dtype)


def _fake_linear_a8_add(*args):
    checks.linear_a8_add(*args)
    codes, weight, residual = args[0], args[3], args[8]
    return residual[0].new_empty((codes.shape[0], weight.shape[0]))


def _fake_linear_a8_siblings(codes, scale, z, weights, weight_scales, low_ranks, biases, table, out_dtype, gelu=()):
    checks.linear_a8_siblings(codes, scale, z, weights, weight_scales, low_ranks, biases, table, out_dtype, gelu)
    return codes.new_empty((codes.shape[0], sum(w.shape[0] for w in weights)), dtype=out_dtype)


def _fake_linear_a16(x, z, weight, weight_scale, low_rank, bias, table):
    checks.linear_a16(x, z, weight, weight_scale, low_rank, bias, table)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_linear_nvfp4(*args):
    checks.linear_nvfp4(*args)
    codes, weight, out_dtype = args[0], args[4], args[-1]
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=out_dtype)


def _fake_linear(x, basis, signs, block, mode, weight, weight_scale, low_rank, bias, table):
    checks.linear(x, basis, signs, block, mode, weight, weight_scale, low_rank, bias, table)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_dequantize(weight, weight_scale, table, dtype):
    checks.dequantize(weight, weight_scale, table, dtype)
    return weight.new_empty((weight.shape[0], 2 * weight.shape[1]), dtype=dtype)


# --- registration --------------------------------------------------------------------------------------


_LIBRARY = "_library"

# name: what runs, its shapes, and (what backward keeps, backward) if differentiable
_OPS: dict[str, tuple[Any, Any, Any]] = {
    "rotate_quantize": (_rotate_quantize, _fake_rotate_quantize, None),
    "rotate_quantize_parts": (_rotate_quantize_parts, _fake_rotate_quantize_parts, None),
    "rotate": (_rotate, _fake_rotate, (gradients.setup_rotate, gradients.backward_rotate)),
    "linear_a8": (_linear_a8, _fake_linear_a8, None),
    "linear_a8_add": (_linear_a8_add, _fake_linear_a8_add, None),
    "linear_a8_siblings": (_linear_a8_siblings, _fake_linear_a8_siblings, None),
    "linear_a16": (_linear_a16, _fake_linear_a16, (gradients.setup_linear_a16, gradients.backward_linear_a16)),
    "linear_nvfp4": (_linear_nvfp4, _fake_linear_nvfp4, None),
    "linear": (_linear, _fake_linear, (gradients.setup_linear, gradients.backward_linear)),
    "dequantize": (_dequantize, _fake_dequantize, None),
    "qk_norm_rope": (attention.run_rope, attention.fake_rope, None),
    "attend": (attention.run_attend, attention.fake_attend, None),
    "norm_modulate": (norm.run, norm.fake, None),
    "modulation_rows": (norm.run_rows, norm.fake_rows, None),
}


def _register() -> None:
    library = torch.library.Library("dirotq", "FRAGMENT")
    library.dirotq_api = API_VERSION  # type: ignore[attr-defined]
    for name, (body, fake, gradient) in _OPS.items():
        library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dirotq::{name}", fake, lib=library)
        if gradient is not None:
            setup, backward = gradient
            torch.library.register_autograd(f"dirotq::{name}", backward, setup_context=setup, lib=library)
    # Held by torch, not by this module: the ops must outlive a copy of the package that is unloaded.
    setattr(torch.ops.dirotq, _LIBRARY, library)


def _registered_version() -> int | None:
    library = getattr(torch.ops.dirotq, _LIBRARY, None)
    return None if library is None else library.dirotq_api


if _registered_version() is None:
    _register()
elif _registered_version() != API_VERSION:
    raise ImportError(
        f"this copy of dirotq ({__file__}) has ops of API version {API_VERSION}, but another copy in this process"
        f" has registered version {_registered_version()}; keep one copy, or update both to one version"
    )
