"""Argument checks of the ops, made once at op entry and before anything is computed.

Every error is a ValueError that names the argument, its value and the rule.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .fp4 import FP4_BLOCK
from .lattice import GROUP

MODES = ("codebook", "int4", "int8")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """`expected` holds a size, or a letter that stands for any."""
    shape = tensor.shape
    if shape == expected:  # told at once: this runs a dozen times per op
        return
    fits = len(shape) == len(expected)
    if fits:
        for size, want in zip(shape, expected, strict=True):
            if type(want) is not str and size != want:
                fits = False
    if not fits:
        raise ValueError(f"{name} has shape {list(shape)}; expected [{', '.join(map(str, expected))}]")


def _dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")


def _device(first: str, tensor: Tensor, **others: Tensor | None) -> None:
    device = tensor.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{name} is on {other.device}, {first} on {tensor.device}; one device is needed")


def _columns(name: str, k: int) -> None:
    if k == 0 or k % GROUP:
        raise ValueError(f"{name} has {k} columns; a positive multiple of {GROUP} is needed")


def rotation(x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int) -> None:
    _shape("x", x, "M", "K")
    _dtype("x", x, *FLOATS)
    _columns("x", x.shape[1])
    _site("x", x.shape[1], basis, signs, block)
    _device("x", x, basis=basis, signs=signs)


def rotate_quantize_parts(
    parts: Sequence[Tensor], basis: Tensor | None, signs: Tensor | None, block: int, mode: str
) -> None:
    if not parts:
        raise ValueError("parts is empty; at least one is needed")
    first = parts[0]
    _shape("parts[0]", first, "M", "K_0")
    _dtype("parts[0]", first, *FLOATS)
    for i, part in enumerate(parts):
        _shape(f"parts[{i}]", part, first.shape[0], f"K_{i}")
        _dtype(f"parts[{i}]", part, first.dtype)
        _device("parts[0]", first, **{f"parts[{i}]": part})
    k = sum(part.shape[1] for part in parts)
    _columns("parts, side by side,", k)
    _site("parts", k, basis, signs, block)
    _device("parts[0]", first, basis=basis, signs=signs)
    quantization(mode)


def _site(name: str, k: int, basis: Tensor | None, signs: Tensor | None, block: int) -> None:
    if basis is not None:
        _shape("basis", basis, k, "r")
        _dtype("basis", basis, torch.bfloat16)
    if signs is not None:
        _shape("signs", signs, k)
        _dtype("signs", signs, torch.int8)
        if block < 1 or block & (block - 1) or k % block:
            raise ValueError(f"block is {block}; a power of two that divides the {k} columns of {name} is needed")


def quantization(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; one of {', '.join(MODES)} is needed")


def rotate_quantize(x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int, mode: str) -> None:
    rotation(x, basis, signs, block)
    quantization(mode)


def weights(k: int, weight: Tensor, low_rank: Tensor | None, bias: Tensor | None, table: Sequence[int]) -> None:
    _shape("weight", weight, "N", k // 2)
    branch(weight, low_rank, bias)
    lattice(table)


def lattice(table: Sequence[int]) -> None:
    if len(table) != 16 or min(table) < -127 or max(table) > 127:
        raise ValueError(f"table is {list(table)}; 16 integers in [-127, 127] are needed")


def branch(weight: Tensor, low_rank: Tensor | None, bias: Tensor | None) -> None:
    _dtype("weight", weight, torch.uint8)
    if low_rank is not None:
        _shape("low_rank", low_rank, weight.shape[0], "r")
        _dtype("low_rank", low_rank, torch.bfloat16)
    if bias is not None:
        _shape("bias", bias, weight.shape[0])
        _dtype("bias", bias, *FLOATS)


def output_dtype(out_dtype: torch.dtype) -> None:
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}; allowed: {', '.join(map(str, FLOATS))}")


def row_scale(weight: Tensor, weight_scale: Tensor) -> None:
    _shape("weight_scale", weight_scale, weight.shape[0])
    _dtype("weight_scale", weight_scale, torch.float32)


def group_scale(k: int, weight: Tensor, weight_scale: Tensor) -> None:
    _dtype("weight_scale", weight_scale, torch.float32, torch.bfloat16)
    n, groups = weight.shape[0], k // GROUP
    if weight_scale.ndim != 2 or weight_scale.shape[0] != n or weight_scale.shape[1] not in (1, groups):
        raise ValueError(
            f"weight_scale has shape {list(weight_scale.shape)}; expected [{n}, 1] or [{n}, {groups}] (K / {GROUP})"
        )


def low_rank_input(m: int, z: Tensor | None, low_rank: Tensor | None) -> None:
    if z is None or low_rank is None:
        if (z is not None and z.shape[1]) or (low_rank is not None and low_rank.shape[1]):
            given, missing = ("z", "low_rank") if low_rank is None else ("low_rank", "z")
            raise ValueError(f"{given} is given without {missing}; the low-rank branch needs both")
        return
    _shape("z", z, m, low_rank.shape[1])
    _dtype("z", z, torch.bfloat16)


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
) -> None:
    _quantized_input(codes, scale, z, table, out_dtype)
    _quantized_weight(codes, z, weight, weight_scale, low_rank, bias)


def _quantized_input(
    codes: Tensor, scale: Tensor, z: Tensor | None, table: Sequence[int], out_dtype: torch.dtype
) -> None:
    _shape("codes", codes, "M", "K")
    _dtype("codes", codes, torch.int8)
    _columns("codes", codes.shape[1])
    _shape("scale", scale, codes.shape[0])
    _dtype("scale", scale, torch.float32)
    lattice(table)
    output_dtype(out_dtype)
    _device("codes", codes, scale=scale, z=z)


def _quantized_weight(
    codes: Tensor, z: Tensor | None, weight: Tensor, weight_scale: Tensor, low_rank: Tensor | None, bias: Tensor | None
) -> None:
    _shape("weight", weight, "N", codes.shape[1] // 2)
    branch(weight, low_rank, bias)
    row_scale(weight, weight_scale)
    low_rank_input(codes.shape[0], z, low_rank)
    _device("codes", codes, weight=weight, weight_scale=weight_scale, low_rank=low_rank, bias=bias)


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
) -> None:
    if not residual:
        raise ValueError("residual is empty; at least one part is needed")
    first, n = residual[0], weight.shape[0]
    linear_a8(codes, scale, z, weight, weight_scale, low_rank, bias, table, first.dtype)
    for i, part in enumerate(residual):
        _shape(f"residual[{i}]", part, "B" if i == 0 else first.shape[0], f"S_{i}", n)
        _dtype(f"residual[{i}]", part, first.dtype)
        _device("codes", codes, **{f"residual[{i}]": part})
    tokens = first.shape[0] * sum(part.shape[1] for part in residual)
    if tokens != codes.shape[0]:
        raise ValueError(f"residual has {tokens} tokens, codes have {codes.shape[0]}; as many are needed")
    if gate is not None:
        _shape("gate", gate, first.shape[0], n)
        _dtype("gate", gate, first.dtype)
        _device("codes", codes, gate=gate)


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
) -> None:
    if not weights:
        raise ValueError("weights is empty; at least one is needed")
    if gelu and len(gelu) != len(weights):
        raise ValueError(f"gelu has {len(gelu)} values for {len(weights)} weights")
    for name, own in (("weight_scales", weight_scales), ("low_ranks", low_ranks), ("biases", biases)):
        if len(own) != len(weights) and (own or name == "weight_scales"):
            raise ValueError(f"{name} has {len(own)} tensors for {len(weights)} weights")
    _quantized_input(codes, scale, z, table, out_dtype)
    for i, weight in enumerate(weights):
        low_rank, bias = low_ranks[i] if low_ranks else None, biases[i] if biases else None
        _quantized_weight(codes, z, weight, weight_scales[i], low_rank, bias)


def linear_a16(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
) -> None:
    _shape("x", x, "M", "K")
    _dtype("x", x, *FLOATS)
    _columns("x", x.shape[1])
    weights(x.shape[1], weight, low_rank, bias, table)
    group_scale(x.shape[1], weight, weight_scale)
    low_rank_input(x.shape[0], z, low_rank)
    _device("x", x, z=z, weight=weight, weight_scale=weight_scale, low_rank=low_rank, bias=bias)


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
) -> None:
    _shape("codes", codes, "M", "K/2")
    k = 2 * codes.shape[1]
    _columns("codes, unpacked,", k)
    _shape("weight", weight, "N", k // 2)
    for name, tensor, rows in (
        ("block_scale", block_scale, codes.shape[0]), ("weight_block_scale", weight_block_scale, weight.shape[0])
    ):  # fmt: skip
        _shape(name, tensor, rows, k // FP4_BLOCK)
        _dtype(name, tensor, torch.uint8)
    _dtype("codes", codes, torch.uint8)
    _shape("scale", scale, codes.shape[0])
    _dtype("scale", scale, torch.float32)
    branch(weight, low_rank, bias)
    row_scale(weight, weight_scale)
    low_rank_input(codes.shape[0], z, low_rank)
    output_dtype(out_dtype)
    _device("codes", codes, block_scale=block_scale, scale=scale, z=z, weight=weight, low_rank=low_rank, bias=bias)
    _device("codes", codes, weight_block_scale=weight_block_scale, weight_scale=weight_scale)


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
) -> None:
    rotation(x, basis, signs, block)
    quantization(mode)
    weights(x.shape[1], weight, low_rank, bias, table)
    row_scale(weight, weight_scale)
    rank = 0 if basis is None else basis.shape[1]
    if (0 if low_rank is None else low_rank.shape[1]) != rank:
        found = "missing" if low_rank is None else f"of shape {list(low_rank.shape)}"
        raise ValueError(f"low_rank is {found}; the basis has {rank} columns and low_rank needs as many")
    _device("x", x, weight=weight, weight_scale=weight_scale, low_rank=low_rank, bias=bias)


def dequantize(weight: Tensor, weight_scale: Tensor, table: Sequence[int], dtype: torch.dtype) -> None:
    _shape("weight", weight, "N", "K/2")
    k = 2 * weight.shape[1]
    _columns("the unpacked weight", k)
    weights(k, weight, None, None, table)
    if weight_scale.ndim == 1:
        row_scale(weight, weight_scale)
    else:
        group_scale(k, weight, weight_scale)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}; allowed: {', '.join(map(str, FLOATS))}")
    _device("weight", weight, weight_scale=weight_scale)


def modulation_rows(table: Tensor, timestep: Tensor) -> None:
    _shape("table", table, "R", "D")
    _dtype("table", table, *FLOATS)
    _shape("timestep", timestep, "B", table.numel())
    _dtype("timestep", timestep, table.dtype)
    _device("table", table, timestep=timestep)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> None:
    _shape("query", query, "B", "S", "H", "D")
    _dtype("query", query, *FLOATS)
    batch, _, heads, d = query.shape
    _shape("key", key, batch, "T", heads, d)
    _shape("value", value, batch, key.shape[1], heads, d)
    if not key.shape[1] or not d:
        raise ValueError(f"key has shape {list(key.shape)}; a key and a column at least are needed")
    if bias is not None:
        _shape("bias", bias, batch, key.shape[1])
        _dtype("bias", bias, query.dtype)
    _dtype("key", key, query.dtype)
    _dtype("value", value, query.dtype)
    _device("query", query, key=key, value=value, bias=bias)
    if scale is not None:
        _positive("scale", scale)


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
) -> None:
    if not queries:
        raise ValueError("queries is empty; at least one part is needed")
    first = queries[0]
    _shape("queries[0]", first, "B", "S", "H", "D")
    _dtype("queries[0]", first, *FLOATS)
    batch, _, heads, d = first.shape
    if d < 2 or d & (d - 1):
        raise ValueError(f"queries[0] has {d} columns a head; a power of two is needed")
    for name, parts in (("keys", keys), ("query_weights", query_weights), ("key_weights", key_weights)):
        if len(parts) != len(queries):
            raise ValueError(f"{name} has {len(parts)} tensors for {len(queries)} queries")
    for i, (q, k, wq, wk) in enumerate(zip(queries, keys, query_weights, key_weights, strict=True)):
        _shape(f"queries[{i}]", q, batch, "S", heads, d)
        _shape(f"keys[{i}]", k, batch, q.shape[1], heads, d)
        _dtype(f"queries[{i}]", q, first.dtype)
        _dtype(f"keys[{i}]", k, first.dtype)
        for weight, whose in ((wq, "query_weights"), (wk, "key_weights")):
            _shape(f"{whose}[{i}]", weight, d)
            _dtype(f"{whose}[{i}]", weight, *FLOATS)
        _device("queries[0]", first, **{f"queries[{i}]": q, f"keys[{i}]": k})
        _device("queries[0]", first, **{f"query_weights[{i}]": wq, f"key_weights[{i}]": wk})
    if len(values) not in (0, len(queries)):
        raise ValueError(f"values has {len(values)} tensors for {len(queries)} queries")
    for i, (q, v) in enumerate(zip(queries, values, strict=False)):
        _shape(f"values[{i}]", v, *q.shape)
        _dtype(f"values[{i}]", v, first.dtype)
        _device("queries[0]", first, **{f"values[{i}]": v})
    length = sum(q.shape[1] for q in queries)
    for name, angles in (("cos", cos), ("sin", sin)):
        _shape(name, angles, length, d)
        _dtype(name, angles, torch.float32)
    _device("queries[0]", first, cos=cos, sin=sin)
    _positive("query_scale", query_scale)


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; a positive number is needed")


def norm_modulate(parts: Sequence[Tensor], scale: Tensor, shift: Tensor, eps: float) -> None:
    if not parts:
        raise ValueError("parts is empty; at least one is needed")
    first = parts[0]
    _shape("parts[0]", first, "B", "S", "D")
    _dtype("parts[0]", first, *FLOATS)
    batch, _, d = first.shape
    if not d:
        raise ValueError("parts[0] has 0 columns; at least one is needed")
    for i, x in enumerate(parts[1:], 1):
        _shape(f"parts[{i}]", x, batch, "S", d)
        _dtype(f"parts[{i}]", x, first.dtype)
        _device("parts[0]", first, **{f"parts[{i}]": x})
    for name, row in (("scale", scale), ("shift", shift)):
        _shape(name, row, batch, d)
        _dtype(name, row, first.dtype)
    _device("parts[0]", first, scale=scale, shift=shift)
    _positive("eps", eps)
