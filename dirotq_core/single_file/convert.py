"""Tensors from the diffusers layout to the single-file layout and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..checkpoint import CheckpointError
from ..transforms import SITE_DTYPES
from .names import Fusion, fusions

Tensors = Mapping[str, torch.Tensor]

#: Tensors of a linear that have one row per output; everything else of it belongs to its input site.
ROWS = ("weight", "weight_scale", "block_scale", "low_rank", "bias")
SITE = "input_site."


def to_native(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of a transformer under their native names, fused.

    Args:
        tensors: by diffusers name, quantized or not. config: the transformer's config.json.

    Raises:
        CheckpointError: parts of one native linear are quantized in different ways, or a tensor has no native name.
    """
    by_module = _by_module(tensors)
    out: dict[str, torch.Tensor] = {}
    for fusion in fusions(config):
        parts = [by_module.pop(p, {}) for p in fusion.parts]
        if any(parts):
            out |= _fuse(fusion, parts)
    if by_module:
        left = sorted(f"{m}.{f}".strip(".") for m, fields in by_module.items() for f in fields)
        raise CheckpointError(f"no native name is known for {left[0]!r}" + _and_more(left))
    return out


def from_native(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inverse of `to_native`; rows are views where they are contiguous in the fused tensor."""
    left = dict(tensors)
    out: dict[str, torch.Tensor] = {}
    hidden = _hidden(config)
    for fusion in fusions(config):
        prefix = fusion.native + "."
        # A native name may be the beginning of another, but never up to a dot.
        names = [fusion.native] if fusion.parameter == "" else [prefix + f for f in _native_fields(fusion)]
        fields = {n: left.pop(n) for n in names if n in left}
        out |= _split(fusion, fields, hidden)
    if left:
        rest = sorted(left)
        raise CheckpointError(f"tensor {rest[0]!r} is no part of {config.get('_class_name')}" + _and_more(rest))
    return out


def _native_fields(fusion: Fusion) -> Iterable[str]:
    if fusion.parameter:
        return (fusion.parameter,)
    return (*ROWS, *(SITE + s for s in SITE_DTYPES))


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""


def _hidden(config: Mapping[str, Any]) -> int:
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    if not all(isinstance(v, int) and v > 0 for v in (heads, width)):
        raise CheckpointError(
            f"num_attention_heads and attention_head_dim must be positive integers, got {heads!r} and {width!r}"
        )
    return int(heads) * int(width)  # type: ignore[arg-type]


def _by_module(tensors: Tensors) -> dict[str, dict[str, torch.Tensor]]:
    """Module → field → tensor; a parameter of no module stands under its own name with the field ""."""
    out: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, field = name.rpartition(".")
        if module.endswith(".input_site"):
            module, field = module.removesuffix(".input_site"), SITE + field
        if field == "scale_shift_table":
            module, field = name, ""
        out.setdefault(module, {})[field] = tensor
    return out


def _fuse(fusion: Fusion, parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    if fusion.parameter is not None:
        (tensor,) = parts[0].values()
        return {f"{fusion.native}.{fusion.parameter}".rstrip("."): tensor}
    rows = [{f: t for f, t in p.items() if not f.startswith(SITE)} for p in parts]
    same = all(
        r.keys() == rows[0].keys()
        and all(r[f].dtype == rows[0][f].dtype and r[f].shape[1:] == rows[0][f].shape[1:] for f in r)
        for r in rows
    )
    owners = [i for i, p in enumerate(parts) if len(p) > len(rows[i])]
    if not same or owners not in ([], [0]):
        raise CheckpointError(
            f"{', '.join(fusion.parts)} are one linear ({fusion.native}) in the single-file layout, but here they are "
            "not quantized alike; quantize all of them or none"
        )
    out = {f: torch.cat([r[f] for r in rows]) if len(rows) > 1 else rows[0][f] for f in rows[0]}
    if fusion.swapped:
        out = {f: _swap(t) for f, t in out.items()}
    out |= {f: t for f, t in parts[0].items() if f.startswith(SITE)}
    return {f"{fusion.native}.{f}": t for f, t in out.items()}


def _split(fusion: Fusion, fields: Tensors, hidden: int) -> dict[str, torch.Tensor]:
    if not fields:
        return {}
    if fusion.parameter == "":
        return {fusion.parts[0]: fields[fusion.native]}
    fields = {n.removeprefix(fusion.native + "."): t for n, t in fields.items()}
    if fusion.parameter:
        return {f"{fusion.parts[0]}.weight": fields[fusion.parameter]}
    out: dict[str, torch.Tensor] = {}
    for field, tensor in fields.items():
        if field.startswith(SITE):
            out[f"{fusion.parts[0]}.{field}"] = tensor
            continue
        tensor = _swap(tensor) if fusion.swapped else tensor
        count = len(fusion.parts)
        if count > 1:  # all parts but the last are as wide as the model
            sizes = [hidden] * (count - 1) + [tensor.shape[0] - hidden * (count - 1)]
            if sizes[-1] <= 0:
                raise CheckpointError(
                    f"tensor {fusion.native + '.' + field!r} has {tensor.shape[0]} rows, too few for its {count} parts"
                )
            pieces: Iterable[torch.Tensor] = tensor.split(sizes)
        else:
            pieces = (tensor,)
        out |= {f"{part}.{field}": piece for part, piece in zip(fusion.parts, pieces, strict=True)}
    return out


def _swap(rows: torch.Tensor) -> torch.Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])
