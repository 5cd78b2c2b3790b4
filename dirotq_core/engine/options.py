"""What can be chosen of a run of the engine, beside the `DiRotQConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

#: Prompts drawn, if nothing else is said and there are as many.
SAMPLES = 32
#: Steps of each drawing whose inputs are kept.
TIMESTEPS = 4


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is calibrated and on what it is computed. Memory in GB (10⁹ bytes).

    Attributes:
        samples: how many images are drawn, prompts repeating with new noise where there are fewer; None for as many as
            there are prompts, at most 32.
        timesteps: how many steps of each drawing are kept as calibration inputs, spread over the schedule and shifted
            from image to image.
        tokens_per_sample: tokens of each input that enter the statistics, at random; None for all.
        sequential: a block sees inputs that the quantized blocks before it made; False for those of the dense model.
        transformer_only: write the transformer's folder alone, not the pipeline.
        dtype: that the dense weights are read in and the model computes in.
        device: to compute on.
        max_gpu_memory: refuse a plan that is estimated to take more, and let PyTorch allocate no more; None for all.
        max_host_memory: inputs that would take more wait in files; None for half of what is free.
        draw_batch: images drawn at once; each step of a batch reads the whole model once.
        chunk_tokens: tokens that pass through a block at once (at least one image's). The result depends on it in the
            last bit, so it does not follow the memory that happens to be free.
    """

    samples: int | None = None
    timesteps: int = TIMESTEPS
    tokens_per_sample: int | None = None
    sequential: bool = True
    transformer_only: bool = False
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    max_gpu_memory: float | None = None
    max_host_memory: float | None = None
    draw_batch: int = 32
    chunk_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in ("samples", "timesteps", "tokens_per_sample", "draw_batch", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("max_gpu_memory", "max_host_memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be a positive number of GB, got {value!r}")
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}")

    def of_the_result(self) -> dict[str, Any]:
        """What the bytes of the result depend on, JSON-ready."""
        names = ("timesteps", "tokens_per_sample", "sequential", "transformer_only", "draw_batch", "chunk_tokens")
        return {name: getattr(self, name) for name in names} | {"dtype": str(self.dtype).removeprefix("torch.")}
