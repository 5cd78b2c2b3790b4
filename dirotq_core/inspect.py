"""What a checkpoint holds, read from its configuration and headers without loading a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architectures import recipe_for
from .checkpoint import CheckpointError, checkpoint_tensors
from .config import DiRotQConfig
from .files import TensorEntry, check_headers, checkpoint_files, read_headers, read_json
from .layout import SitePlan, average_activation_bits, plan_sites
from .report import REPORT_NAME, QuantizationReport

#: Bounds on a configuration, far above any model's. Values of the table of positions: 1 GiB in float64.
MAX_LAYERS, MAX_SIZE, MAX_POSITIONS = 128, 2**20, 2**27


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
    """A checkpoint: its rows, and totals over the whole transformer.

    activation_bits: the average over layers where sites have bits of their own.
    """

    folder: Path
    model_class: str
    config: DiRotQConfig
    rows: list[LinearRow]
    total_bytes: int
    parameters: int
    activation_bits: float | None

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
    """Inspect a saved transformer or pipeline on disk, or a single file of ComfyUI's layout.

    Raises:
        CheckpointError: nothing is there, it is not a DiRotQ checkpoint, or its files do not fit its configuration.
    """
    if Path(path).is_file():
        from .single_file.inspect import inspect_native

        return inspect_native(path)
    folder = find_transformer(path)
    file = folder / "config.json"
    raw = read_json(file)
    quantization = raw.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{file}: quantization_config must be a JSON object, got {quantization!r}")
    if quantization.get("quant_method") != "dirotq":
        raise CheckpointError(
            f"{folder} is not a DiRotQ checkpoint: its config.json has "
            + (f"quant_method {quantization.get('quant_method')!r}" if quantization else "no quantization_config")
        )
    config, plans, model = sites_of(raw, file)
    entries = read_headers(checkpoint_files(folder))
    check_headers(entries, checkpoint_tensors(model, plans))
    where = report_folder(folder)
    report = QuantizationReport.load(where) if where else None
    known = {r.name: r.output_db for r in report.linears} if report else {}
    rows = [row for plan in plans for row in _rows(plan, config, entries, known)]
    parameters = sum(p.numel() for p in model.parameters())
    total = sum(e.bytes for e in entries.values())
    return Inspection(
        folder, raw["_class_name"], config, rows, total, parameters, average_activation_bits(plans, config)
    )


def sites_of(raw: dict[str, Any], where: Path) -> tuple[DiRotQConfig, list[SitePlan], Any]:
    """Of a quantized config.json: resolved quantization, sites, and the dense model on the meta device.

    Raises CheckpointError, which names `where`, if the values do not make a model.
    """
    try:
        config = DiRotQConfig.from_dict(raw["quantization_config"]).resolved(calibrated=True)
        model = skeleton(raw)
        return config, plan_sites(model, config), model
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def report_folder(folder: Path) -> Path | None:
    """Where the report of a transformer is: beside it, or beside the pipeline that it is part of; None without one."""
    if (folder / REPORT_NAME).is_file():
        return folder
    folder = folder.resolve()
    beside = folder.name == "transformer" and (folder.parent / "model_index.json").is_file()
    return folder.parent if beside and (folder.parent / REPORT_NAME).is_file() else None


def skeleton(raw: dict) -> Any:
    """The model that a config.json describes, dense, its parameters on the meta device. ValueError if it cannot be."""
    import diffusers
    from accelerate import init_empty_weights

    name = raw.get("_class_name")
    try:
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
    except (ImportError, RuntimeError):  # a class whose own requirements are not installed
        found = None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ValueError(f"_class_name is {name!r}, which is no model class of diffusers")
    cls: Any = found
    recipe_for(cls)
    _check_sizes(raw)
    try:
        with init_empty_weights():
            return cls.from_config({k: v for k, v in raw.items() if k != "quantization_config"})
    except Exception as error:  # another project's constructor: what it raises for values of any type is open
        raise ValueError(f"{name} cannot be made with these values: {type(error).__name__}: {error}") from error


def _check_sizes(raw: Mapping[str, Any]) -> None:
    """ValueError for a model so large that even its empty skeleton would take the machine's memory or hours."""
    for name, value in raw.items():
        limit = MAX_LAYERS if name.startswith("num_") and name.endswith("layers") else MAX_SIZE
        if isinstance(value, int) and abs(value) > limit:
            raise ValueError(f"{name} is {str(value)[:30]}; at most {limit} is supported")
    # PixArt computes its table of positions when it is made: (sample_size / patch_size)² rows.
    numbers = [raw.get(n) for n in ("sample_size", "patch_size", "num_attention_heads", "attention_head_dim")]
    size, patch, heads, width = (
        n if isinstance(n, int) and n > 0 else d for n, d in zip(numbers, (1, 2, 16, 72), strict=True)
    )
    if (size // patch) ** 2 * heads * width > MAX_POSITIONS:
        raise ValueError(f"sample_size {size} with patch_size {patch} makes a table of positions too large to hold")


def _rows(
    plan: SitePlan, config: DiRotQConfig, entries: Mapping[str, TensorEntry], known: Mapping[str, float | None]
) -> Iterator[LinearRow]:
    site = sum(entries[f"{plan.owner}.input_site.{k}"].bytes for k in plan.site_spec())
    total_out = sum(plan.out_features)
    for name, n in zip(plan.linears, plan.out_features, strict=True):
        own = sum(entries[f"{name}.{k}"].bytes for k in plan.linear_spec(n))
        scheme = plan.scheme(config)
        yield LinearRow(name, n, plan.in_features, scheme, plan.rank, own + site * n / total_out, known.get(name))


def bits_text(bits: float | None) -> str:
    """Bits for people: a whole number, or an average with two digits."""
    return f"{bits:.2f}" if isinstance(bits, float) and not bits.is_integer() else f"{bits:g}" if bits else ""


def format_table(result: Inspection, limit: int | None = None) -> str:
    """The inspection as text, at most `limit` rows of linears (None for all). ValueError if it is negative."""
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    rows = result.rows if limit is None else result.rows[:limit]
    width = max((len(r.name) for r in rows), default=4)
    lines = [
        f"{result.model_class} in {result.folder}",
        f"method {result.config.method}, {bits_text(result.activation_bits)}-bit activations, "
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
