"""ComfyUI nodes. Imported by ComfyUI only (through `comfy_entrypoint`)."""

from comfy_api.latest import ComfyExtension, io

from .info import ModelInfo
from .load import LoadModel
from .lora import LoRA
from .quantize import Apply, Quantize


class DiRotQExtension(ComfyExtension):
    """What the pack adds to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadModel, Quantize, Apply, LoRA, ModelInfo]
