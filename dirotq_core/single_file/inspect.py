"""What a single file holds, read from its header without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..checkpoint import CheckpointError, check_header, check_names, checkpoint_tensors
from ..files import TensorEntry, read_headers
from ..inspect import Inspection, LinearRow
from ..layout import SitePlan, average_activation_bits
from .convert import from_native
from .read import native_plans, read_config, read_layout, read_metadata
from .write import REPORT_KEY


def inspect_native(path: str | Path) -> Inspection:
    """Inspect a single file; its rows are the native linears, each with a site of its own.

    Raises:
        CheckpointError: it is not a DiRotQ checkpoint, or its tensors do not fit its configuration.
    """
    path = Path(path)
    config = read_config(path)
    quantization, plans, model = read_layout(config, path)
    entries = read_headers([path])
    spec = checkpoint_tensors(model, plans)
    try:
        shapes = {n: torch.empty(e.shape, dtype=e.dtype, device="meta") for n, e in entries.items()}
        found = from_native(shapes, config)
        check_names(found, spec)
        for name, tensor in found.items():
            check_header(name, tensor.shape, tensor.dtype, *spec[name])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    known = file_report(path)
    rows = [
        _row(name, plan, entries, plan.scheme(quantization), known.get(name))
        for name, plan in native_plans(config, plans).items()
    ]
    parameters = sum(p.numel() for p in model.parameters())
    total = sum(e.bytes for e in entries.values())
    bits = average_activation_bits(plans, quantization)
    return Inspection(path, config["_class_name"], quantization, rows, total, parameters, bits)


def _row(
    name: str, plan: SitePlan, entries: Mapping[str, TensorEntry], scheme: str, output_db: float | None
) -> LinearRow:
    n = entries[f"{name}.weight"].shape[0]
    size = sum(e.bytes for key, e in entries.items() if key.startswith(f"{name}.") and key != f"{name}.bias")
    return LinearRow(name, n, plan.in_features, scheme, plan.rank, size, output_db)


def file_report(path: Path) -> dict[str, float]:
    """Native linear → SQNR in dB of its outputs, where it was measured when the file was made."""
    try:
        body = json.loads(read_metadata(path)[0].get(REPORT_KEY, "{}"))
        return {str(name): float(db) for name, db in body.items()}
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the report in its header is no JSON object of numbers: {error}") from error
