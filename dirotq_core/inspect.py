"""What a checkpoint holds, read from its configuration and headers without loading a weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import CheckpointError
from .config import DiRotQConfig
from .layout import SitePlan, plan_sites
from .report import QuantizationReport


@dataclass(frozen=True)
class LinearRow:
    """One quantized linear. bytes: its tensors and its share of the site's, bias excepted."""

    name: str
    out_features: int
    in_features: int
    scheme: str
    rank: int
    bytes: float
    output_db: float | None

    @property
    def bits(self) -> float:
        """Average bits per weight, 16-bit parts and scales counted."""
        return 8 * self.bytes / (self.out_features * self.in_features)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint: its rows, and totals over the whole transformer."""

    folder: Path
    model_class: str
    config: DiRotQConfig
    rows: list[LinearRow]
    total_bytes: int
    parameters: int

    @property
    def quantized_bits(self) -> float:
        """Average bits per weight of the quantized linears."""
        weights = sum(r.out_features * r.in_features for r in self.rows)
        return 8 * sum(r.bytes for r in self.rows) / weights

    @property
    def average_bits(self) -> float:
        """Average bits per parameter of the whole transformer."""
        return 8 * self.total_bytes / self.parameters


def find_transformer(path: str | Path) -> Path:
    """The folder with the transformer's config.json: `path` itself or its ``transformer``.

    Raises CheckpointError if neither has one.
    """
    path = Path(path)
    for folder in (path / "transformer", path):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{path} holds no transformer: neither config.json nor transformer/config.json is there")


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Inspect a saved transformer or pipeline on disk.

    Raises:
        CheckpointError: nothing is there, it is not a DiRotQ checkpoint, or its files do not fit its configuration.
    """
    folder = find_transformer(path)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = raw.get("quantization_config") or {}
    if quantization.get("quant_method") != "dirotq":
        raise CheckpointError(
            f"{folder} is not a DiRotQ checkpoint: its config.json has "
            + (f"quant_method {quantization['quant_method']!r}" if quantization else "no quantization_config")
        )
    config = DiRotQConfig.from_dict(quantization).resolved(calibrated=True)
    model = _skeleton(raw)
    plans = plan_sites(model, config)
    sizes = tensor_sizes(folder)
    report = QuantizationReport.load(folder) or QuantizationReport.load(folder.parent)
    known = {r.name: r.output_db for r in report.linears} if report else {}
    rows = [row for plan in plans for row in _rows(plan, config, sizes, known)]
    parameters = sum(p.numel() for p in model.parameters())
    return Inspection(folder, raw.get("_class_name", "?"), config, rows, sum(sizes.values()), parameters)


def _skeleton(raw: dict):
    import diffusers
    from accelerate import init_empty_weights

    name = raw.get("_class_name", "")
    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise CheckpointError(f"config.json names the model class {name!r}, which diffusers does not have")
    with init_empty_weights():
        return cls.from_config({k: v for k, v in raw.items() if k != "quantization_config"})


def tensor_sizes(folder: str | Path) -> dict[str, int]:
    """Tensor name → bytes, from the headers of all safetensors files in `folder`."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors file")
    sizes: dict[str, int] = {}
    for file in files:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise CheckpointError(f"{file} is truncated or no safetensors file")
            header = json.loads(f.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[name] = end - begin
    return sizes


def _rows(plan: SitePlan, config: DiRotQConfig, sizes: Mapping[str, int], known: Mapping[str, float | None]):
    def size(name: str) -> int:
        if name not in sizes:
            raise CheckpointError(f"checkpoint does not fit its configuration: missing tensor {name!r}")
        return sizes[name]

    site = sum(size(f"{plan.owner}.input_site.{k}") for k in plan.site_spec())
    total_out = sum(plan.out_features)
    for name, n in zip(plan.linears, plan.out_features, strict=True):
        own = sum(size(f"{name}.{k}") for k in plan.linear_spec(n))
        bits = config.activation_bits if plan.quantize_input else 16
        yield LinearRow(name, n, plan.in_features, f"W4A{bits}", plan.rank, own + site * n / total_out, known.get(name))


def format_table(result: Inspection, limit: int | None = None) -> str:
    """The inspection as text, at most `limit` rows of linears (None for all)."""
    rows = result.rows if limit is None else result.rows[:limit]
    width = max((len(r.name) for r in rows), default=4)
    lines = [
        f"{result.model_class} in {result.folder}",
        f"method {result.config.method}, {result.config.activation_bits}-bit activations, "
        f"format version {result.config.format_version}",
        "",
        f"{'linear':<{width}}  {'out × in':>13}  scheme  rank      KiB   bits  SQNR dB",
    ]
    for r in rows:
        shape = f"{r.out_features} × {r.in_features}"
        db = "" if r.output_db is None or math.isnan(r.output_db) else f"{r.output_db:.1f}"
        numbers = f"{r.rank:>4}  {r.bytes / 1024:>7.1f}  {r.bits:>5.2f}  {db:>7}"
        lines.append(f"{r.name:<{width}}  {shape:>13}  {r.scheme:<6}  {numbers}".rstrip())
    if len(rows) < len(result.rows):
        lines.append(f"… and {len(result.rows) - len(rows)} more")
    lines += [
        "",
        f"{len(result.rows)} quantized linears, {result.quantized_bits:.2f} bits per weight on average; the whole "
        f"transformer {result.total_bytes / 2**20:.1f} MiB, {result.average_bits:.2f} bits per parameter "
        f"(bf16: {result.parameters * 2 / 2**20:.1f} MiB)",
    ]
    return "\n".join(lines)
