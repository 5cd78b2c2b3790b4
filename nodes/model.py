"""From a checkpoint in memory to ComfyUI's MODEL."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.sd
import torch

from ..dirotq_core.layout import SitePlan
from ..dirotq_core.single_file import NativeCheckpoint
from ..kernels import backend
from .choices import ACTIVATION_BITS, BACKENDS, LORA_MODES
from .operations import Settings, make_operations

#: What FLUX.1 and PixArt compute in, best first.
_DTYPES = [torch.bfloat16, torch.float16, torch.float32]

logger = logging.getLogger(__name__)


def make_settings(checkpoint: NativeCheckpoint, bits: str, kernels: str, lora: str) -> Settings:
    """The settings of one load.

    Args:
        bits: one of `ACTIVATION_BITS`. kernels: of `BACKENDS`. lora: of `LORA_MODES`.

    Raises:
        ValueError: a value is none of these.
        RuntimeError: Triton is asked for and cannot run here.
    """
    for name, value, choices in (
        ("activation_bits", bits, ACTIVATION_BITS), ("backend", kernels, BACKENDS), ("lora", lora, LORA_MODES),
    ):  # fmt: skip
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    device = comfy.model_management.get_torch_device()
    if kernels == "triton":
        obstacle = backend.obstacle(device)
        if obstacle:
            raise RuntimeError(f"backend 'triton' cannot run: {obstacle}")
    config = checkpoint.quantization
    wanted = (config.activation_bits or 4) if bits == "default" else int(bits)

    def activation(plan: SitePlan) -> str | None:
        return config.activation(wanted) if plan.quantize_input else None

    activations = {name: activation(plan) for name, plan in checkpoint.plans.items()}
    return Settings(activations, kernels == "pytorch", lora == "side branch")


def make_model(checkpoint: NativeCheckpoint, settings: Settings, disable_dynamic: bool = False) -> Any:
    """A ModelPatcher with the checkpoint's weights; nothing of `checkpoint` is changed.

    Raises ValueError if ComfyUI does not recognize the architecture.
    """
    tensors = checkpoint.tensors
    dtype = comfy.model_management.unet_dtype(
        model_params=_parameters(checkpoint), supported_dtypes=_DTYPES, weight_dtype=torch.bfloat16
    )
    operations = make_operations(checkpoint.plans, settings, dtype)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(tensors),
        model_options={"custom_operations": operations, "dtype": dtype},
        disable_dynamic=disable_dynamic,
    )
    if patcher is None:
        raise ValueError(f"ComfyUI does not recognize {checkpoint.config.get('_class_name')} in these tensors")
    # ComfyUI makes a second, plain patcher with it where dynamic VRAM is not wanted.
    patcher.cached_patcher_init = (make_model, (checkpoint, settings))
    patcher.set_attachments("dirotq", checkpoint.config)
    return patcher


def _parameters(checkpoint: NativeCheckpoint) -> int:
    packed = {f"{name}.weight" for name in checkpoint.plans}
    return sum(t.numel() * (2 if name in packed else 1) for name, t in checkpoint.tensors.items())


def native_weights(patcher: Any, memory_required: float = 0) -> dict[str, torch.Tensor]:
    """Weights of a dense MODEL by native name; `in_host_memory` gives the values, LoRAs and other patches included.

    Good until something else is loaded or sampled. memory_required: bytes on the GPU that are to stay free for work.

    Raises ValueError if a weight is quantized already.
    """
    network = patcher.model.diffusion_model
    for name, tensor in network.state_dict().items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}: this MODEL is quantized already. Load the bf16 or fp16 file with "
                "'Load Diffusion Model' and weight_dtype default"
            )
    # This patcher's patches and no other clone's must be the applied ones. Forcing all of them into the weights is not
    # possible with dynamic VRAM, so those that wait are applied one weight at a time, as ComfyUI does when it saves.
    comfy.model_management.load_models_gpu([patcher], memory_required=memory_required)
    state: Mapping[str, torch.Tensor] = patcher.model_state_dict_for_saving(network, "diffusion_model.")
    # Original files call them scale; ComfyUI renames them on loading.
    return {n.replace("_norm.weight", "_norm.scale"): t for n, t in state.items()}


def in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The value of one of `native_weights`, patched. It may share memory with the model."""
    # Of a weight with patches waiting, .to is the only method that applies them, and it ignores the device.
    return tensor.to("cpu").detach().cpu()
