"""The weights of a dense MODEL, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.lora
import comfy.utils
import torch

from ..dirotq_core.backend import DENSE_DTYPES

PREFIX = "diffusion_model."


class SourceWeights(Mapping[str, torch.Tensor]):
    """Native name → tensor with LoRAs and other weight patches applied, wherever ComfyUI has the weight at the moment.

    Nothing is kept: ComfyUI moves weights between the GPU and the host while a model samples, and a reference to the
    old place would hold that memory.

    Raises ValueError if a weight is quantized already.
    """

    def __init__(self, patcher: Any):
        self.patcher = patcher
        state: Mapping[str, torch.Tensor] = patcher.model.diffusion_model.state_dict()
        for name, tensor in state.items():
            if tensor.dtype not in DENSE_DTYPES:
                raise ValueError(
                    f"{name} has dtype {tensor.dtype}: this MODEL is quantized already. Load the bf16 or fp16 file "
                    "with 'Load Diffusion Model' and weight_dtype default"
                )
        # Original files call the norms' parameter scale; ComfyUI renames it when it loads them.
        self._keys = {name.replace("_norm.weight", "_norm.scale"): PREFIX + name for name in state}
        self.shapes = {n: tuple(state[k.removeprefix(PREFIX)].shape) for n, k in self._keys.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, name: str) -> torch.Tensor:
        key = self._keys[name]
        kept = self.patcher.backup.get(key)  # what stood there before ComfyUI patched it in place
        weight = comfy.utils.get_attr(self.patcher.model, key) if kept is None else kept.weight
        patches = self.patcher.patches.get(key)
        if not patches:
            return weight.detach()
        copied = weight.detach().to(torch.float32, copy=True)  # patches are added in place
        return comfy.lora.calculate_weight(patches, copied, key).to(weight.dtype)
