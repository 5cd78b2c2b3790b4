"""From a checkpoint in memory to ComfyUI's MODEL."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sd
import torch

from ..dirotq_core.backend import DENSE_DTYPES
from ..dirotq_core.build import activation_for
from ..dirotq_core.layout import SitePlan
from ..dirotq_core.single_file import NativeCheckpoint
from ..kernels import backend
from .choices import ACTIVATION_BITS, BACKENDS, LORA_MODES
from .hooks import refuse_weight_hooks
from .operations import Settings, make_operations
from .size import count_when_loaded


def make_settings(checkpoint: NativeCheckpoint, bits: str, kernels: str, lora: str) -> Settings:
    """The settings of one load.

    Args:
        bits: one of `ACTIVATION_BITS`. kernels: of `BACKENDS`. lora: of `LORA_MODES`.

    Raises:
        ValueError: a value is none of these, or the checkpoint's method has no activations of so many bits.
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
    if bits != "default" and int(bits) not in config.activation_choices:
        known = [b for b in ACTIVATION_BITS if b == "default" or int(b) in config.activation_choices]
        raise ValueError(
            f"this checkpoint's method {config.method!r} has no {bits}-bit activations; choose {' or '.join(known)}"
        )

    def activation(plan: SitePlan) -> str | None:
        if bits == "default":
            return activation_for(config, plan)
        return config.activation(int(bits)) if plan.quantize_input else None

    activations = {name: activation(plan) for name, plan in checkpoint.plans.items()}
    return Settings(activations, kernels == "pytorch", lora == "side branch")


def make_model(checkpoint: NativeCheckpoint, settings: Settings, disable_dynamic: bool = False) -> Any:
    """A ModelPatcher with the checkpoint's weights; nothing of `checkpoint` is changed.

    Raises ValueError if ComfyUI does not recognize the architecture.
    """
    tensors = checkpoint.tensors
    dtype = comfy.model_management.unet_dtype(
        model_params=_parameters(checkpoint), supported_dtypes=list(DENSE_DTYPES), weight_dtype=torch.bfloat16
    )
    if dtype not in DENSE_DTYPES:  # --fp8_e4m3fn-unet and the like, which are for dense weights
        dtype = torch.bfloat16
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
    count_when_loaded(patcher)
    refuse_weight_hooks(patcher)
    return patcher


def _parameters(checkpoint: NativeCheckpoint) -> int:
    packed = {f"{name}.weight" for name in checkpoint.plans}
    return sum(t.numel() * (2 if name in packed else 1) for name, t in checkpoint.tensors.items())
