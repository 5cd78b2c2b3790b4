"""PyTorch reference of every op, on any device, of checked arguments. The equations stand in `ops.py`."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .addend import Addend, addend
from .fp4 import dequantize_nvfp4
from .hadamard import block_hadamard
from .lattice import CODEBOOK_RMS, GROUP, MAGNITUDE_STEPS, MAGNITUDES, MIDPOINTS, decode

# A scale below the smallest normal number has no finite reciprocal; such a row counts as zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def scale_of_rms(mode: str, k: int) -> float:
    """Scale per rms of v. The 8-bit lattice saturates past 7 rms, or past what a single spike becomes when the Hadamard
    matrix spreads it over 128 of the K columns, if that is more."""
    return 1 / CODEBOOK_RMS if mode == "codebook" else max(7.0, (k / 128) ** 0.5) / 127


# The residual's share of a row's energy below which the difference of the two energies is not trusted.
SMALLEST_SHARE = 2.0**-14


def rotate(x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """v = (x − z Uᵀ) D H in x.dtype and z = bf16(x U)."""
    v, z = _rotate(x, basis, signs, block)
    # A copy even where nothing was rotated: an op must not return its input.
    return v.to(x.dtype, copy=True, memory_format=torch.contiguous_format), z


def _rotate(x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """v and z, v in fp32."""
    z = project(x, basis)
    return residual(x, z, basis, signs, block), z


def project(x: Tensor, basis: Tensor | None) -> Tensor:
    """z = bf16(x U)."""
    if basis is None:
        return x.new_empty((x.shape[0], 0), dtype=torch.bfloat16)
    return (x.float() @ basis.float()).bfloat16()


def residual(x: Tensor, z: Tensor, basis: Tensor | None, signs: Tensor | None, block: int) -> Tensor:
    """v = (x − z Uᵀ) D H in fp32."""
    v = x.float()
    if basis is not None:
        v = v - z.float() @ basis.float().T
    if signs is not None:
        v = block_hadamard(v * signs, block)
    return v


def rotate_quantize(
    x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """v of `rotate`, then the prologue named `mode`."""
    v, z = _rotate(x, basis, signs, block)
    scale = row_scale(x, basis, mode)
    return quantize(v, scale, mode), scale, z


def rotate_quantize_parts(
    parts: Sequence[Tensor], basis: Tensor | None, signs: Tensor | None, block: int, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate_quantize` of the parts side by side."""
    return rotate_quantize(torch.cat(list(parts), 1), basis, signs, block, mode)


def row_scale(x: Tensor, basis: Tensor | None, mode: str) -> Tensor:
    """Scale fp32 [M]: a fixed multiple of rms(v), of which ‖v‖² = ‖x‖² − ‖x U‖²."""
    x = x if x.dtype == torch.float64 else x.float()
    energy = x.square().sum(1)
    residual_energy = energy
    if basis is not None:
        explained = (x @ basis.to(x.dtype)).square().sum(1)
        residual_energy = torch.maximum(energy - explained, energy * SMALLEST_SHARE)
    scale = (residual_energy / x.shape[1]).sqrt() * scale_of_rms(mode, x.shape[1])
    return torch.where(scale >= SMALLEST_SCALE, scale, 0)


def quantize(v: Tensor, scale: Tensor, mode: str) -> Tensor:
    """Codes int8 [M, K] of v [M, K] for scale [M] by the prologue `mode`."""
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return {"codebook": _codebook, "int4": _int4, "int8": _int8}[mode](v * inverse[:, None])


def _codebook(units: Tensor) -> Tensor:
    size = units.abs()
    magnitude = torch.full(units.shape, MAGNITUDES[0], dtype=torch.int8, device=units.device)
    for midpoint, rise in zip(MIDPOINTS, MAGNITUDE_STEPS, strict=True):
        magnitude += (size > midpoint).to(torch.int8) * rise
    return torch.where(units < 0, -magnitude, magnitude)


def _int4(units: Tensor) -> Tensor:
    units = units.unflatten(1, (-1, GROUP))
    low = units.amin(2, keepdim=True).clamp(min=-128)
    high = units.amax(2, keepdim=True).clamp(max=127)
    step = ((high - low) / 15 + 0.5).floor().clamp(1, 17)
    offset = ((low + high) / 2 - 7.5 * step + 0.5).floor()
    offset = torch.minimum(offset.clamp(min=-128), 127 - 15 * step)
    q = ((units - offset) / step + 0.5).floor().clamp(0, 15)
    return (step * q + offset).flatten(1).to(torch.int8)


def _int8(units: Tensor) -> Tensor:
    return (units + 0.5).floor().clamp(-127, 127).to(torch.int8)


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
    """y = s_m t_n Σ_k a_mk w_nk + Σ_j z_mj L_nj + b_n, or GELU of it; the sum over k is exact."""
    y = int8_matmul(codes, decode(weight, table)).float()
    y *= scale[:, None]
    y *= weight_scale
    y = _finish(y, z, low_rank, bias)
    return (torch.nn.functional.gelu(y, approximate="tanh") if gelu else y).to(out_dtype)


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
    """residual + gate · y, y that of `linear_a8` in the residual's dtype."""
    y = linear_a8(codes, scale, z, weight, weight_scale, low_rank, bias, table, residual[0].dtype)
    return _added(y, addend(residual, gate))


def _added(y: Tensor, add: Addend) -> Tensor:
    """residual + gate · y for y [M, N] of the residual's dtype, in fp32 and rounded once."""
    product = y.float()
    if add.gate is not None:
        product = (product.reshape(len(add.gate), add.image, -1) * add.gate.float()[:, None]).reshape(y.shape)
    return (add.residual.float() + product).to(y.dtype)


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
    parts = []
    for i, weight in enumerate(weights):
        low_rank, bias = low_ranks[i] if low_ranks else None, biases[i] if biases else None
        curved = bool(gelu) and gelu[i]
        parts.append(linear_a8(codes, scale, z, weight, weight_scales[i], low_rank, bias, table, out_dtype, curved))
    return torch.cat(parts, 1)


def linear_a16(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
) -> Tensor:
    """y = x Ŵᵀ + z Lᵀ + b, Ŵ = table[code] · scale; all in fp32, rounded once."""
    y = x.float() @ dequantize(weight, weight_scale, table, torch.float32).T
    return _finish(y, z, low_rank, bias).to(x.dtype)


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
    """y = s_m t_n Σ_k â_mk ŵ_nk + Σ_j z_mj L_nj + b_n; all in fp32, rounded once."""
    y = dequantize_nvfp4(codes, block_scale) @ dequantize_nvfp4(weight, weight_block_scale).T
    return _finish(y * scale[:, None] * weight_scale, z, low_rank, bias).to(out_dtype)


def _finish(y: Tensor, z: Tensor | None, low_rank: Tensor | None, bias: Tensor | None) -> Tensor:
    if z is not None and low_rank is not None:
        y += z.float() @ low_rank.float().T
    if bias is not None:
        y += bias.float()
    return y


def dequantize(weight: Tensor, weight_scale: Tensor, table: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Weight [N, K] in `dtype` from codes uint8 [N, K/2] and scales [N] or [N, G]; rounded once."""
    values = decode(weight, table)
    groups = weight_scale.float().reshape(values.shape[0], -1, 1)
    return (values.unflatten(1, (groups.shape[1], -1)) * groups).flatten(1).to(dtype)


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    """Exact int32 product a wᵀ of int8 a [M, K] and w [N, K]."""
    if a.device.type == "cpu" and _cpu_int_mm_is_exact():
        return torch._int_mm(a, w.T)
    # |a w| <= 128 · 127, so 1024 terms stay below 2^24, where fp32 (and tf32) sums of integers are exact.
    total = torch.zeros(a.shape[0], w.shape[0], dtype=torch.int32, device=a.device)
    for a_part, w_part in zip(a.split(1024, 1), w.split(1024, 1), strict=True):
        total += (a_part.float() @ w_part.float().T).to(torch.int32)
    return total


@lru_cache(maxsize=1)
def _cpu_int_mm_is_exact() -> bool:
    """Whether torch's integer product is fast (AVX-512) and does not saturate (it does without VNNI)."""
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not (avx512 and torch.backends.mkldnn.is_available()):
        return False
    a = torch.full((32, 128), -128, dtype=torch.int8)
    w = torch.full((33, 128), 127, dtype=torch.int8)
    return bool((torch._int_mm(a, w.T) == -128 * 127 * 128).all())


def round_columns(
    work: Tensor, factor: Tensor, scale: Tensor, midpoints: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """GPTQ's inner loop: table entries and compensated errors of B columns; `work` is overwritten."""
    divisors = torch.where(scale > 0, scale, torch.inf)  # of an all-zero row: what is divided becomes zero
    entries = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    errors = torch.empty(work.shape, dtype=torch.float32, device=work.device)
    pivots = factor.diagonal()
    for i in range(work.shape[1]):
        column = work[:, i]
        entry = torch.bucketize(column / divisors[:, i], midpoints, out_int32=True)
        entries[:, i] = entry
        errors[:, i] = (column - values[entry] * scale[:, i]) / pivots[i]
        work[:, i + 1 :] -= torch.outer(errors[:, i], factor[i, i + 1 :])
    return entries, errors


def qk_norm_rope(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    query_weights: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm per head, parts side by side, columns turned by their position's angles; values side by side."""
    value = torch.cat(list(values), 1) if values else queries[0].new_empty(0)
    turned = _norm_rope(queries, query_weights, cos, sin, eps, query_scale)
    return turned, _norm_rope(keys, key_weights, cos, sin, eps, 1.0), value


def _norm_rope(
    parts: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor, sin: Tensor, eps: float, scale: float
) -> Tensor:
    normed = [
        torch.nn.functional.rms_norm(x, x.shape[-1:], w.to(x.dtype), eps) for x, w in zip(parts, weights, strict=True)
    ]
    x = torch.cat(normed, 1)
    even, odd = x.unflatten(3, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(3)
    return ((x.float() * cos[:, None] + turned.float() * sin[:, None]) * scale).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """PyTorch's own, [B, S, H, D] each."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if bias is not None:
        bias = bias[:, None, None]
    y = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return y.transpose(1, 2).contiguous()


def norm_modulate(parts: Sequence[Tensor], scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Parts side by side, layer norm over their columns in fp32, times 1 + scale, plus shift."""
    x = torch.cat(list(parts), 1).float()
    x = x - x.mean(-1, keepdim=True)
    x -= x.mean(-1, keepdim=True)  # what the rounded mean of a row far from zero has left
    x *= (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x * (1 + scale[:, None].float()) + shift[:, None].float()).to(scale.dtype)
