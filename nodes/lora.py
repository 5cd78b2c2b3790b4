"""DiRotQ LoRA."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from .folders import stamp

#: What ComfyUI's reader raises on files that are none, by format and version.
_UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError,
)  # fmt: skip


def read_lora(path: str) -> dict[str, Any]:
    """The tensors of a LoRA file; ValueError names it if ComfyUI cannot read it."""
    import comfy.utils
    import torch
    from safetensors import SafetensorError

    try:
        found = comfy.utils.load_torch_file(path, safe_load=True)
    except (SafetensorError, *_UNREADABLE) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path} is no readable LoRA: {reason}") from error
    if not found:
        raise ValueError(f"{path} is no readable LoRA: it is empty")
    if not all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in found.items()):
        raise ValueError(f"{path} is no readable LoRA: it holds something else than tensors by name")
    return found


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
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> object:
        """The file's time and size, so that one written anew is read anew. None: computed by the graph."""
        path = None if lora_name is None else folder_paths.get_full_path("loras", lora_name)
        return None if path is None else tuple(stamp(Path(path))) or None  # execute says what is wrong with a name

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        from .branches import apply_lora
        from .operations import DiRotQLinear

        if not any(isinstance(m, DiRotQLinear) for m in model.model.modules()):
            raise ValueError("this MODEL is not from a DiRotQ node; use ComfyUI's own 'Load LoRA' for it")
        if strength == 0:
            return io.NodeOutput(model)
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        return io.NodeOutput(apply_lora(model, read_lora(path), strength))
