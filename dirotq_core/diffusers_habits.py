"""What diffusers does to linears by looking inside them, and what it has to know of ours."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .linear import DiRotQLinear
from .register import METHOD

logger = logging.getLogger(__name__)

FUSING = ("fuse_qkv_projections", "unfuse_qkv_projections")


def is_quantized(model: Any) -> bool:
    """Whether diffusers holds `model` for one of this method."""
    return getattr(model, "quantization_method", None) == METHOD


def quantized_parts(pipeline: Any) -> dict[str, ModelMixin]:
    """The quantized models of a pipeline by name."""
    # Not of `components`, which raises where a pipeline of somebody lacks one.
    return {name: part for name, part in vars(pipeline).items() if isinstance(part, ModelMixin) and is_quantized(part)}


def teach_flux_loras() -> None:
    """Let `FluxPipeline.load_lora_weights` see [N, K] where a packed weight is [N, K/2].

    It compares a LoRA's shape with the weight's and "expands" layers that look too small (Control LoRAs widen
    x_embedder so). Idempotent.
    """
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    original = FluxLoraLoaderMixin._calculate_module_shape
    if getattr(original, "knows_dirotq", False):
        return

    @functools.wraps(original)
    def shape(model: nn.Module, base_module: nn.Module | None = None, base_weight_param_name: str | None = None) -> Any:
        module = base_module
        if module is None and base_weight_param_name is not None:
            module = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
        if isinstance(module, DiRotQLinear):
            return module.out_features, module.in_features
        return original(model, base_module, base_weight_param_name)

    shape.knows_dirotq = True  # type: ignore[attr-defined]
    FluxLoraLoaderMixin._calculate_module_shape = staticmethod(shape)  # type: ignore[method-assign]
    expand = FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_.__func__  # type: ignore[attr-defined]

    @functools.wraps(expand)
    def checked(cls: Any, transformer: nn.Module, lora_state_dict: Any = None, *args: Any, **kwargs: Any) -> bool:
        _check_lora_shapes(transformer, lora_state_dict or {}, f"{cls.transformer_name}.")
        return expand(cls, transformer, lora_state_dict, *args, **kwargs)

    FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_ = classmethod(checked)  # type: ignore[method-assign,assignment]


def _check_lora_shapes(model: nn.Module, lora: dict[str, torch.Tensor], prefix: str) -> None:
    """Raise ValueError for a LoRA of quantized layers of other widths: diffusers would pad or widen those."""
    for name, module in model.named_modules():
        key = prefix + name.removesuffix(".base_layer")
        down, up = lora.get(f"{key}.lora_A.weight"), lora.get(f"{key}.lora_B.weight")
        if not isinstance(module, DiRotQLinear) or down is None or up is None:
            continue
        if (down.shape[-1], up.shape[0]) != (module.in_features, module.out_features):
            raise ValueError(
                f"the LoRA has {down.shape[-1]} inputs and {up.shape[0]} outputs for {key}, a quantized linear of"
                f" {module.in_features} and {module.out_features}; it was made for another model"
            )


def count_as_dense() -> None:
    """Let `num_parameters` count the weights that packed ones stand for, as it does for other 4-bit formats.

    Idempotent.
    """
    original = ModelMixin.num_parameters
    if hasattr(original, "knows_dirotq"):
        return

    @functools.wraps(original)
    def count(self: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        packed = [m for m in self.modules() if isinstance(m, DiRotQLinear)]
        more = 0
        if not only_trainable:
            dense = sum(m.in_features * m.out_features for m in packed)
            more = dense - sum(p.numel() for m in packed for n, p in m.named_parameters() if n != "bias")
        return original(self, only_trainable, exclude_embeddings) + more

    count.knows_dirotq = True  # type: ignore[attr-defined]
    ModelMixin.num_parameters = count  # type: ignore[method-assign]


def move_in_own_dtype() -> None:
    """Let ``.to(device, dtype)`` move a quantized model whose dtype that is already, as pipelines and scripts ask.

    diffusers refuses any dtype, which is right for another, and even ``dtype=None``. Idempotent.
    """
    original = ModelMixin.to
    if hasattr(original, "knows_dirotq"):
        return

    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_quantized(self):
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            if dtype == self.dtype or (dtype is None and "dtype" in kwargs):
                return self if device is None else original(self, device, non_blocking=non_blocking)
        return original(self, *args, **kwargs)

    to.knows_dirotq = True  # type: ignore[attr-defined]
    ModelMixin.to = to  # type: ignore[method-assign]


def ignore_fusing(model: nn.Module) -> None:
    """Make `fuse_qkv_projections` of a quantized model do nothing, and say so.

    Scripts call it for speed. Packed weights cannot be concatenated into a dense linear, and there is nothing to win:
    siblings read one quantized input already.
    """
    for name in FUSING:
        if hasattr(model, name):
            setattr(model, name, functools.partial(_ignored, type(model).__name__))


def stop_ignoring_fusing(model: nn.Module) -> None:
    """Give a model its own methods back, for when it is dense again."""
    for name in FUSING:
        model.__dict__.pop(name, None)


def _ignored(model: str) -> None:
    # Not bound to the model: it must survive copying and pickling.
    logger.warning("%s is quantized by dirotq: its q, k and v are one product already; not fused", model)
