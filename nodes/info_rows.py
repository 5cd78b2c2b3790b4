"""The rows of Model Info, read from a checkpoint's headers or from the weights of a loaded model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

#: The registered name of our weight layout.
LAYOUT = "DiRotQLayout"


@dataclass(frozen=True)
class Row:
    """One linear. bytes: everything it needs at run time, bias excepted. output_db: SQNR, None if not measured."""

    name: str
    out_features: int
    in_features: int
    scheme: str
    bytes: float
    output_db: float | None = None

    @property
    def bits(self) -> float:
        """Average bits per weight, scales and 16-bit parts counted."""
        return 8 * self.bytes / (self.out_features * self.in_features)

    @property
    def measured(self) -> bool:
        return self.output_db is not None and not math.isnan(self.output_db)


@dataclass(frozen=True)
class Summary:
    """A model: its quantized linears, and bytes and parameters over all of it."""

    title: str
    rows: list[Row]
    total_bytes: float
    parameters: int

    def worst(self) -> list[Row]:
        """The rows, worst first: by signal-to-noise ratio where it was measured, else by bytes."""
        known = [r for r in self.rows if r.measured]
        if known:
            return sorted(known, key=lambda r: r.output_db or 0.0)
        return sorted(self.rows, key=lambda r: -r.bytes)

    def text(self, limit: int) -> str:
        """Totals, then the `limit` worst layers."""
        bits = 8 * self.total_bytes / max(1, self.parameters)
        lines = [
            self.title,
            f"{self.total_bytes / 2**20:.1f} MiB, {bits:.2f} bits per parameter on average "
            f"(16 bit: {2 * self.parameters / 2**20:.1f} MiB)",
        ]
        for scheme in sorted({r.scheme for r in self.rows}):
            rows = [r for r in self.rows if r.scheme == scheme]
            weights = sum(r.out_features * r.in_features for r in rows)
            size = sum(r.bytes for r in rows)
            lines.append(
                f"{scheme}: {len(rows)} linears, {size / 2**20:.1f} MiB, {8 * size / weights:.2f} bits per weight"
            )
        if not self.rows:
            lines.append("no layer is quantized by DiRotQ")
        rows = self.worst()[:limit]
        if rows:
            known = rows[0].measured
            lines += ["", "lowest signal-to-noise ratio:" if known else "largest layers (no report of their quality):"]
            lines += [_line(r) for r in rows]
        return "\n".join(lines)


def _line(r: Row) -> str:
    db = f", {r.output_db:.1f} dB" if r.measured else ""
    return f"{r.name}  {r.out_features} × {r.in_features}, {r.scheme}, {r.bits:.2f} bits{db}"


def of_checkpoint(path: Path) -> Summary:
    """The summary of a checkpoint on disk; its headers are read, its weights are not.

    Raises ValueError (CheckpointError) for anything that is no DiRotQ checkpoint.
    """
    from ..dirotq_core.inspect import inspect_checkpoint
    from ..dirotq_core.single_file import inspect_native

    found = inspect_native(path) if path.is_file() else inspect_checkpoint(path)
    rows = [Row(r.name, r.out_features, r.in_features, r.scheme, r.bytes, r.output_db) for r in found.rows]
    title = f"{found.model_class}, method {found.config.method}, {found.config.activation_bits}-bit activations"
    return Summary(title, rows, found.total_bytes, found.parameters)


def of_model(model: Any) -> Summary:
    """The summary of a MODEL (ModelPatcher), from the tensors that it holds now; patches are not counted.

    Raises ValueError if it has no diffusion model.
    """
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"Model Info cannot read a {type(model).__name__}: it has no diffusion model")
    rows, total, parameters = [], 0.0, 0
    for name, tensor in _tensors(network):
        size = held_bytes(tensor)
        total += size
        parameters += tensor.numel()
        if getattr(tensor, "_layout_cls", None) == LAYOUT:
            n, k = tensor.shape
            rows.append(Row(name.removesuffix(".weight"), n, k, scheme(tensor._params), size))
    return Summary(type(network).__name__, rows, total, parameters)


def _tensors(network: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def held_bytes(tensor: Any) -> int:
    """Bytes in memory; of a quantized tensor, those of its codes and all side tensors."""
    if not hasattr(tensor, "_layout_cls"):
        return tensor.nbytes
    params = tensor._params
    parts = [tensor._qdata, *(getattr(params, f.name) for f in fields(params))]
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def scheme(params: Any) -> str:
    """What a weight with these parameters of the layout is called in the list: "W4A4", "W4A8", "W4A16"."""
    from ..dirotq_core.activations import ACTIVATION_FORMATS

    activation = 16 if params.activation is None else ACTIVATION_FORMATS[params.activation].bits
    return f"W{params.plan.format.label if params.plan else 4}A{activation}"
