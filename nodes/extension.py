"""The node list. Nothing heavy is imported here: a node loads what it needs when it runs."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import requirements
from .compare import Compare
from .info import ModelInfo
from .load import LoadModel
from .lora import LoRA
from .quantize import Apply, Quantize


class DiRotQExtension(ComfyExtension):
    """What the pack adds to ComfyUI."""

    async def on_load(self) -> None:
        from comfy.model_management import get_torch_device

        requirements.log_notices(gpu=get_torch_device().type == "cuda")

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadModel, Quantize, Apply, LoRA, Compare, ModelInfo]
