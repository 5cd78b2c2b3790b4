"""Model Info: what a DiRotQ checkpoint on disk holds."""

from __future__ import annotations

from comfy_api.latest import io

from ..dirotq_core.inspect import format_table, inspect_checkpoint


class ModelInfo(io.ComfyNode):
    """Scheme, bytes and average bits of every quantized layer, as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQModelInfo",
            display_name="Model Info (DiRotQ)",
            category="DiRotQ",
            description="Lists the layers of a DiRotQ checkpoint: shape, scheme, rank, bytes, average bits, SQNR.",
            inputs=[
                io.String.Input("folder", tooltip="Folder of a saved pipeline or transformer (diffusers layout)."),
                io.Int.Input("limit", default=20, min=0, max=10000, tooltip="Show at most this many layers."),
            ],
            outputs=[io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, folder: str, limit: int) -> io.NodeOutput:
        return io.NodeOutput(format_table(inspect_checkpoint(folder), limit))
