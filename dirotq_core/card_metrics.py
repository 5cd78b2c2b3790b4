"""What an evaluation measured of a model, for its card: from the ``report.json`` of a comparison of models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json
from .inspect import bits_text

REPORT = "report.json"
_LABELS = {
    "psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "fid": "FID to the original",
    "fid_real": "FID to real images",
}  # fmt: skip


def evaluation_text(report: str | Path, model: str | Path) -> str:
    """A table of the metrics of `model` against the reference, as Markdown.

    Args:
        report: the file, or its folder: ``rows`` with name, source, ``reference``, ``control`` and ``metrics`` of
            {mean, low, high}. model: the checkpoint; the row is the one of this path, or the only one compared.

    Raises:
        ValueError: it is no such report, or it does not say which of its rows is the model.
    """
    file = Path(report) / REPORT if Path(report).is_dir() else Path(report)
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give the report.json of an evaluation, or its folder")
    result = read_json(file)
    try:
        rows = list(result["rows"])
        reference = next(row for row in rows if row["reference"])
        row = _row_of(rows, Path(model))
        nothing = set(result.get("meaningless") or ())  # of networks with random weights
        metrics = {k: v for k, v in row["metrics"].items() if k not in nothing}
        lines = [f"| {_LABELS.get(k, k)} | {_interval(v)} |" for k, v in metrics.items()]
        if "fid" not in nothing:
            lines += [f"| {_LABELS[k]} | {float(row[k]):.2f} |" for k in ("fid", "fid_real") if k in row]
        count = int(result["prompts"]["count"])
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{file} is no report of an evaluation: {error!r}") from error
    value = row.get("activation_bits")
    bits = f", {bits_text(value)}-bit activations" if isinstance(value, (int, float)) and value else ""
    # Of pictures that another program has drawn the seeds are not known.
    seeds = "" if "images" in (row.get("kind"), reference.get("kind")) else " with the same seeds"
    head = f"Pictures of {count} prompts{bits}, against `{reference['name']}`{seeds}; mean and 95 % interval:"
    return f"{head}\n\n| | |\n|---|---|\n" + "\n".join(lines)


def _row_of(rows: list[Mapping[str, Any]], model: Path) -> Mapping[str, Any]:
    compared = [r for r in rows if not r["reference"] and not r["control"]]
    same = [r for r in compared if Path(str(r["source"])).resolve() == model.resolve()]
    found = same or compared
    if len(found) != 1:
        names = ", ".join(str(r["name"]) for r in found)
        raise ValueError(f"the report does not say which row is {model}: it has {names or 'none to choose from'}")
    return found[0]


def _interval(value: Mapping[str, Any]) -> str:
    mean, low, high = (float(value[k]) for k in ("mean", "low", "high"))
    digits = 3 if abs(mean) < 10 else 2
    ends = "" if math.isnan(low) or math.isnan(high) else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{mean:.{digits}f}{ends}"
