"""Model Info: what a quantized model holds, in memory or on disk, as text and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from .info_plot import plot
from .info_rows import Summary, of_checkpoint, of_model


class ModelInfo(io.ComfyNode):
    """Scheme, bytes and average bits of a model, and its worst layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQModelInfo",
            display_name="Model Info (DiRotQ)",
            category="DiRotQ",
            description="Lists what a quantized model holds: scheme, bytes, average bits, worst layers.",
            search_aliases=["inspect", "model size", "bits per weight"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "checkpoint",
                    default="",
                    tooltip="A checkpoint on disk, absolute or under models/diffusion_models. Empty: the model input.",
                ),
                io.Int.Input(
                    "limit", default=10, min=0, max=10000, tooltip="List at most this many of the worst layers."
                ),
                io.Model.Input("model", optional=True, tooltip="A loaded model; used if no checkpoint is named."),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="Totals, then the worst layers."),
                io.Image.Output("plot", display_name="plot", tooltip="Signal-to-noise ratio and bits of every layer."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, limit: int | None, model: Any = None) -> Any:
        """The files' times and sizes, so that a checkpoint written anew is read anew. None: computed by the graph."""
        if checkpoint is None or not checkpoint.strip():
            return None
        try:
            path = find_checkpoint(checkpoint)
        except ValueError:
            return None
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        return [(str(f), f.stat().st_mtime, f.stat().st_size) for f in files if f.is_file()]

    @classmethod
    def execute(cls, checkpoint: str, limit: int, model: Any = None) -> io.NodeOutput:
        summary = _summary(checkpoint, model)
        text = summary.text(limit)
        return io.NodeOutput(text, plot(summary), ui=ui.PreviewText(text))


def _summary(checkpoint: str, model: Any) -> Summary:
    if checkpoint.strip():
        return of_checkpoint(find_checkpoint(checkpoint))
    if model is not None:
        return of_model(model)
    raise ValueError("Model Info needs a model or the name of a checkpoint")


def find_checkpoint(name: str) -> Path:
    """The file or folder `name`: absolute, or in one of ComfyUI's folders of diffusion models.

    Raises ValueError that says where it was looked for.
    """
    path = Path(name.strip()).expanduser()
    folders = [Path(f) for f in folder_paths.get_folder_paths("diffusion_models")]
    candidates = [path] if path.is_absolute() else [f / path for f in folders]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ValueError(f"no file or folder {name.strip()!r}; looked for {', '.join(map(str, candidates))}")
