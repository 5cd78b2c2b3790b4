"""The report of a quantization run, saved beside the checkpoint as ``dirotq_report.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .solve import LinearReport

REPORT_NAME = "dirotq_report.json"


@dataclass
class QuantizationReport:
    """Per-linear results. `output_db` is the signal-to-quantization-noise ratio on held-out tokens."""

    method: str
    activation_bits: int
    linears: list[LinearReport] = field(default_factory=list)

    @property
    def median_output_db(self) -> float | None:
        """Median over W4A4 linears, None if nothing was measured."""
        known = [r.output_db for r in self.linears if r.output_db is not None and not r.weight_only]
        return median(known) if known else None

    def notes(self) -> list[str]:
        """One line per distinct remark, with how many linears it concerns and the first of them."""
        by_note: dict[str, list[str]] = {}
        for r in self.linears:
            if r.note:
                by_note.setdefault(r.note, []).append(r.name)
        count = {note: f"{len(names)} linear{'s' * (len(names) > 1)}" for note, names in by_note.items()}
        return [f"{note} ({count[note]}, first {names[0]})" for note, names in by_note.items()]

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "activation_bits": self.activation_bits,
            "median_output_db": self.median_output_db,
            "linears": [r.to_dict() for r in self.linears],
        }

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / REPORT_NAME
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> QuantizationReport | None:
        """The report in `folder`, None if there is none. ValueError names the file if it is no report."""
        path = Path(folder) / REPORT_NAME
        if not path.is_file():
            return None
        try:
            body = json.loads(path.read_bytes())
            return cls(body["method"], body["activation_bits"], [LinearReport(**r) for r in body["linears"]])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no report of a quantization: {error!r}") from error
