"""The pipeline around the transformer, in little GPU memory: text encoders come and go, a few prompts at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .options import EngineOptions
from .source import Source

#: Prompts that a text encoder sees at once. T5-XXL takes 9.5 GB, and its attention 0.1 GB more for each.
ENCODER_ROWS = 4


def load_pipeline(source: Source, transformer: Any, options: EngineOptions) -> Any:
    """The pipeline of `source` with `transformer`; on a GPU its other parts come there only while they compute."""
    from accelerate import cpu_offload_with_hook
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        str(source.root), transformer=transformer, torch_dtype=options.dtype, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    others = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module) and n != "transformer"}
    for name, part in others.items():
        if name.startswith("text_encoder"):
            part.forward = partial(in_rows, part.forward)
    if options.device != "cpu":
        hooks = [cpu_offload_with_hook(part, options.device)[1] for part in others.values()]

        def make_room(*_: Any) -> None:
            """Text encoders have done their work when the transformer is called."""
            for hook in hooks:
                hook.offload()

        transformer.register_forward_pre_hook(make_room)
    return pipeline


def in_rows(forward: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
    """`forward(ids, **kwargs)`, `ENCODER_ROWS` rows of the batch at a time."""
    rows = len(ids)
    if rows <= ENCODER_ROWS:
        return forward(ids, **kwargs)
    parts = []
    for start in range(0, rows, ENCODER_ROWS):
        some = slice(start, start + ENCODER_ROWS)
        batched = {k: isinstance(v, torch.Tensor) and v.ndim > 0 and len(v) == rows for k, v in kwargs.items()}
        parts.append(forward(ids[some], **{k: v[some] if batched[k] else v for k, v in kwargs.items()}))
    return _join(parts)


def _join(parts: Sequence[Any]) -> Any:
    """One output of the outputs for parts of a batch."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return type(first)(**{k: _join([p[k] for p in parts]) for k in first})
    if isinstance(first, (tuple, list)):
        return type(first)(_join(column) for column in zip(*parts, strict=True))
    return first
