"""Attention processors of a quantized model in place of diffusers' own."""

from __future__ import annotations

from typing import Any

from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn

from .flux_attention import DiRotQFluxAttnProcessor
from .pixart_layers import DiRotQAttnProcessor

_FUSED: dict[type, dict[type, type]] = {
    FluxAttention: {FluxAttnProcessor: DiRotQFluxAttnProcessor},
    Attention: {AttnProcessor2_0: DiRotQAttnProcessor},
}
# diffusers' guiders, which skip attention, look processors up by their class.
for _pairs in _FUSED.values():
    for _own, _ours in _pairs.items():
        AttentionProcessorRegistry.register(_ours, AttentionProcessorRegistry.get(_own))


def use_fused_attention(model: nn.Module) -> None:
    """Give every attention of `model` that has diffusers' own processor ours."""
    _exchange(model, _FUSED)


def use_plain_attention(model: nn.Module) -> None:
    """Give diffusers' own processors back."""
    _exchange(model, {of: {ours: own for own, ours in pairs.items()} for of, pairs in _FUSED.items()})


def _exchange(model: nn.Module, classes: dict[type, dict[type, type]]) -> None:
    for module in model.modules():
        attn: Any = module
        for of, pairs in classes.items():
            if isinstance(module, of) and type(attn.processor) in pairs:
                attn.set_processor(_like(attn.processor, pairs[type(attn.processor)]()))


def _like(old: Any, new: Any) -> Any:
    """`new` with the attention backend and the parallelism that were set on `old`."""
    vars(new).update(vars(old))
    return new
