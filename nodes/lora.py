"""DiRotQ LoRA."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io


class LoRA(io.ComfyNode):
    """A LoRA on a quantized or dense MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQLoRA",
            display_name="DiRotQ LoRA",
            category="DiRotQ",
            description="Adds a LoRA beside the 4-bit weights: exact, nothing is re-quantized. Can be stacked.",
            inputs=[
                io.Model.Input("model", tooltip="From Load DiRotQ Model, Apply DiRotQ or another DiRotQ LoRA."),
                io.Combo.Input("lora_name", folder_paths.get_filename_list("loras"), tooltip="A file of models/loras."),
                io.Float.Input("strength", default=1.0, min=-20.0, max=20.0, step=0.01, tooltip="1 is as trained."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        import comfy.utils

        from .branches import apply_lora
        from .operations import DiRotQLinear

        if not any(isinstance(m, DiRotQLinear) for m in model.model.modules()):
            raise ValueError("this MODEL is not from a DiRotQ node; use ComfyUI's own 'Load LoRA' for it")
        if strength == 0:
            return io.NodeOutput(model)
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        return io.NodeOutput(apply_lora(model, comfy.utils.load_torch_file(path, safe_load=True), strength))
