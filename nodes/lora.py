"""DiRotQ LoRA."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io


class LoRA(io.ComfyNode):
    """A LoRA on a quantized MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQLoRA",
            display_name="DiRotQ LoRA",
            category="DiRotQ",
            description="Adds a LoRA beside the 4-bit layers, exactly: in 16 bit, without quantizing again.",
            inputs=[
                io.Model.Input("model", tooltip="A model with 4-bit layers."),
                io.Combo.Input(
                    "lora_name", folder_paths.get_filename_list("loras"), tooltip="A LoRA file in models/loras."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="Factor of the LoRA; 0 switches it off, negative values subtract it.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA.")],
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
