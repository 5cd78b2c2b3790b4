"""What diffusers' pipelines do to all their parts at once, and what they have to know of a quantized one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils

from .diffusers_habits import quantized_parts

#: `from_pipe` casts to float32 if it is given none; its argument has two names by version.
DTYPE_NAME = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"


def cast_all_or_nothing() -> None:
    """A pipeline refuses a dtype that its quantized part cannot take before others are cast; `from_pipe` keeps it.

    Parts are shared between pipelines, and cast in place one after the other: a refusal by the last would leave the
    text encoders in another dtype than the transformer, in the pipeline they came from as well. Idempotent.
    """
    to, from_pipe = DiffusionPipeline.to, DiffusionPipeline.from_pipe.__func__  # type: ignore[attr-defined]
    if hasattr(to, "knows_dirotq"):
        return

    @functools.wraps(to)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = [a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)]
        for name, part in quantized_parts(self).items():
            if wanted and wanted[0] != part.dtype:
                raise ValueError(
                    f"{name} is quantized by dirotq and computes in {part.dtype}, so the pipeline cannot be cast to "
                    f"{wanted[0]}; nothing was. Load the checkpoint with torch_dtype={wanted[0]}, or give from_pipe "
                    f"torch_dtype={part.dtype}"
                )
        return to(self, *args, **kwargs)

    @functools.wraps(from_pipe)
    def keeping(cls: Any, pipeline: Any, **kwargs: Any) -> Any:
        parts = quantized_parts(pipeline)
        if parts and not kwargs.keys() & {"dtype", "torch_dtype"}:
            kwargs[DTYPE_NAME] = next(iter(parts.values())).dtype
        return from_pipe(cls, pipeline, **kwargs)

    checked.knows_dirotq = True  # type: ignore[attr-defined]
    DiffusionPipeline.to = checked  # type: ignore[method-assign]
    DiffusionPipeline.from_pipe = classmethod(keeping)  # type: ignore[assignment,method-assign]
