"""Layers of a quantized model whose elementwise steps run inside our kernels instead of as passes of their own.

GELU ends the product before it, norm and modulation are one pass, and FLUX.1's single blocks put neither text and image
nor attention and MLP together first. Each class is diffusers' own, takes its place in `use_fused_layers`, and computes
diffusers' steps where something else has to see what lies between them: gradients, LoRAs, hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models import activations, normalization
from diffusers.models.transformers import transformer_flux
from torch import nn

from ..kernels import norm_modulate
from .linear import DiRotQLinear


def _observed(module: nn.Module) -> bool:
    """Whether hooks of somebody wait for what goes in or comes out. Those that only bring weights in are others."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _fits(linear: nn.Module, *around: nn.Module) -> bool:
    """Whether `linear` can compute its neighbours' steps, too: it is ours, without a LoRA beside it."""
    return type(linear) is DiRotQLinear and not any(map(_observed, (linear, *around)))


def _plain_norm(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine and not torch.is_grad_enabled()


class GELU(activations.GELU):
    """diffusers' linear with GELU behind it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.approximate == "tanh" and _fits(self.proj):
            return self.proj(hidden_states, gelu=True)
        return super().forward(hidden_states)


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    """diffusers' adaptive layer norm of FLUX.1's double blocks."""

    def forward(self, x: torch.Tensor, *args: Any, emb: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if emb is None or self.emb is not None or not _plain_norm(self.norm) or _observed(self.norm):
            return super().forward(x, *args, emb=emb, **kwargs)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return norm_modulate([x], scale, shift, self.norm.eps), *rest


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """diffusers' single block of FLUX.1."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.norm
        around = norm, norm.norm, self.act_mlp
        if not (_plain_norm(norm.norm) and _fits(self.proj_mlp, *around) and _fits(self.proj_out)):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        parts = [encoder_hidden_states, hidden_states]
        shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, dim=1)
        normed = norm_modulate(parts, scale, shift, norm.norm.eps)
        # The MLP first: its GELU belongs to the product that queries, keys and values are columns of, too.
        mlp = self.proj_mlp(normed, gelu=True)
        attention = self.attn(
            hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        out = gate.unsqueeze(1) * self.proj_out((attention, mlp))
        ends = [part + own for part, own in zip(parts, out.split([p.shape[1] for p in parts], 1), strict=True)]
        if ends[0].dtype == torch.float16:
            ends = [end.clip(-65504, 65504) for end in ends]
        return ends[0], ends[1]


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    cls.__bases__[0]: cls for cls in (GELU, AdaLayerNormZero, FluxSingleTransformerBlock)
}
# diffusers' caches look blocks up by their class.
TransformerBlockRegistry.register(
    FluxSingleTransformerBlock,
    TransformerBlockRegistry.get(transformer_flux.FluxSingleTransformerBlock),
)


def use_fused_layers(model: nn.Module) -> None:
    """Give the layers of `model` that are diffusers' own these classes."""
    _exchange(model, _FUSED)


def use_plain_layers(model: nn.Module) -> None:
    """Give diffusers' own classes back."""
    _exchange(model, {fused: plain for plain, fused in _FUSED.items()})


def _exchange(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
