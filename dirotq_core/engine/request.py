"""What was asked for: checked, and in the form that a later run is compared with."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..config import DiRotQConfig
from .options import SAMPLES, EngineOptions
from .source import Source

#: The work folder's layout; raised when older ones cannot be continued.
WORK_VERSION = 1


def images_of(prompts: Sequence[str], options: EngineOptions) -> list[str]:
    """The prompt of every image that is drawn. ValueError if `prompts` is no list of strings."""
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise ValueError("prompts must be a list of strings")
    count = options.samples or min(len(prompts), SAMPLES)
    return [prompts[i % len(prompts)] for i in range(count)] if prompts else []


def check_call(call: dict[str, Any]) -> None:
    """ValueError unless `call` holds numbers and strings, and nothing that calibration sets itself."""
    for name, value in call.items():
        if name in ("prompt", "generator", "output_type", "num_images_per_prompt"):
            raise ValueError(f"call must not hold {name!r}; calibration sets it for each prompt")
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise ValueError(
                f"call[{name!r}] must be a number or a string, got {type(value).__name__}; pipelines that want an "
                "image are calibrated in memory, with dirotq.quantize"
            )


def fingerprint(
    source: Source, config: DiRotQConfig, images: Sequence[str], call: dict[str, Any], options: EngineOptions
) -> dict[str, Any]:
    """Everything the bytes of the result depend on, machine and versions of other packages aside."""
    package = sys.modules[(__package__ or "").removesuffix(".dirotq_core.engine")]
    texts = json.dumps(list(images)).encode()
    return {
        "work": WORK_VERSION,
        "dirotq": package.__version__,
        "config": config.to_dict(),
        "prompts": f"{len(images)} prompts, {hashlib.sha256(texts).hexdigest()[:16]}" if images else None,
        "call": call if images else None,
        "options": options.of_the_result(),
        "model": source.identity(),
    }
