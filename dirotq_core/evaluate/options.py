"""What can be chosen of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .bootstrap import RESAMPLES


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How models are compared.

    Attributes:
        metrics: of `METRICS`. real: a folder of real images, for the second FID. real_by_id: of them only those
            that are named by the prompts' ids.
        call: arguments of the pipelines: steps, size, guidance, …
        batch: pictures drawn at once. dtype: of what is not quantized. offload: keep on the device only the part of the
            pipeline that computes.
        activation_bits: draw every DiRotQ checkpoint with each of these; empty for its own.
        control: draw the reference once more with other seeds.
        resamples: of the bootstrap.
        shown: prompts in the page's grid of images.
        stand_in: the networks of metrics and of the judge are stand-ins, as of random weights: the report says that
            their numbers mean nothing.
    """

    metrics: tuple[str, ...] = ("psnr", "ssim")
    real: Path | None = None
    real_by_id: bool = False
    call: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    offload: bool = False
    activation_bits: tuple[int, ...] = ()
    control: bool = False
    resamples: int = RESAMPLES
    shown: int = 8
    stand_in: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        from .draw import OWN_ARGUMENTS
        from .metrics import METRICS

        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}, expected {', '.join(METRICS)}")
        for name, value in self.call.items():
            if name in OWN_ARGUMENTS:
                raise ValueError(f"call must not hold {name!r}; it is set for each prompt")
            if not (value is None or isinstance(value, (bool, int, float, str))):
                raise ValueError(f"call[{name!r}] must be a number or a string, got {type(value).__name__}")
        for name in ("batch", "resamples"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if self.real is not None and "fid" not in self.metrics:
            raise ValueError("real images serve FID; add fid to the metrics")
        if self.real_by_id and self.real is None:
            raise ValueError("real_by_id chooses among real images; give their folder")


def meaningless(options: EvaluationOptions, judged: bool) -> list[str]:
    """Of which stand-ins the numbers are: metrics with networks, and "judge" if there was one."""
    from .metrics import METRICS

    if not options.stand_in:
        return []
    return [name for name, metric in METRICS.items() if name in options.metrics and metric.modules] + ["judge"] * judged
