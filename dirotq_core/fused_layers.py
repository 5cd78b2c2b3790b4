"""Layers of a quantized model whose elementwise steps run inside our kernels instead of as passes of their own.

GELU ends the product before it, as do gate and residual; norm and modulation are one pass; FLUX.1's single blocks put
neither text and image nor attention and MLP together first. Each class is diffusers' own, takes its place in
`use_fused_layers`, and computes diffusers' steps where something else has to see what lies between them or asks for
more than our kernels do: gradients, LoRAs, hooks, autocast. Those are called as functions: a hook may keep a `forward`
of these classes when `use_plain_layers` has given diffusers' back.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models import activations, normalization
from diffusers.models.transformers import transformer_flux
from torch import nn

from ..kernels import norm_modulate
from .flux_attention import DiRotQFluxAttnProcessor, applies
from .fusible import attended, fits, fits_gelu, fits_mlp, fits_norm, fits_sum, mlp, no_dropout, skippable
from .pixart_layers import BasicTransformerBlock

# Plain functions: the compiler knows no way through a method of diffusers' class, which it keeps in the graph whole.
_PLAIN_GELU = activations.GELU.forward
_PLAIN_NORM = normalization.AdaLayerNormZero.forward
_PLAIN_DOUBLE = transformer_flux.FluxTransformerBlock.forward
_PLAIN_SINGLE = transformer_flux.FluxSingleTransformerBlock.forward


def _attended(attn: nn.Module, more: dict[str, Any] | None, **arguments: Any) -> Any:
    return attended(attn, transformer_flux.FluxAttention, DiRotQFluxAttnProcessor, more, **arguments)


class GELU(activations.GELU):
    """diffusers' linear with GELU behind it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.approximate == "tanh" and fits(self.proj):
            return self.proj(hidden_states, gelu=True)
        return _PLAIN_GELU(self, hidden_states)


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    """diffusers' adaptive layer norm of FLUX.1's double blocks."""

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if emb is None or self.emb is not None or not fits_norm(self.norm, [x], emb):
            return _PLAIN_NORM(self, x, timestep, class_labels, hidden_dtype, emb)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
        return norm_modulate([x], scale, shift, self.norm.eps), gate, shift_mlp, scale_mlp, gate_mlp


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    """diffusers' double block of FLUX.1."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = hidden_states, encoder_hidden_states
        if not self._fits(image, text, temb, image_rotary_emb):
            return _PLAIN_DOUBLE(self, image, text, temb, image_rotary_emb, joint_attention_kwargs)
        own, gate, shift, scale, gate_mlp = self.norm1(image, emb=temb)
        own_text, gate_text, shift_text, scale_text, gate_mlp_text = self.norm1_context(text, emb=temb)
        image, text = _attended(
            self.attn, joint_attention_kwargs, hidden_states=own, encoder_hidden_states=own_text,
            image_rotary_emb=image_rotary_emb, add=(([image], gate), ([text], gate_text)),
        )  # fmt: skip
        image = mlp(self.ff, norm_modulate([image], scale, shift, self.norm2.eps), image, gate_mlp)
        own_text = norm_modulate([text], scale_text, shift_text, self.norm2_context.eps)
        text = mlp(self.ff_context, own_text, text, gate_mlp_text)
        return text.clip(-65504, 65504) if text.dtype == torch.float16 else text, image

    def _fits(self, image: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, rotary: Any) -> bool:
        attn = self.attn
        if type(attn.processor) is not DiRotQFluxAttnProcessor or not skippable(attn) or not applies(attn, rotary):
            return False
        return (
            no_dropout(attn.to_out[1])
            and fits_sum(attn.to_out[0], [image], temb)
            and fits_sum(attn.to_add_out, [text], temb)
            and fits_norm(self.norm2, [image], temb)
            and fits_norm(self.norm2_context, [text], temb)
            and fits_mlp(self.ff, image, temb)
            and fits_mlp(self.ff_context, text, temb)
        )


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
        norm, parts = self.norm, [encoder_hidden_states, hidden_states]
        known = type(norm) is normalization.AdaLayerNormZeroSingle and skippable(norm)
        if not known or not fits_norm(norm.norm, parts, temb):
            return _PLAIN_SINGLE(
                self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, dim=1)
        normed = norm_modulate(parts, scale, shift, norm.norm.eps)
        # The MLP first: its GELU ends the product that queries, keys and values are columns of, too.
        if fits(self.proj_mlp) and fits_gelu(self.act_mlp):
            inner = self.proj_mlp(normed, gelu=True)
        else:
            inner = self.act_mlp(self.proj_mlp(normed))
        attention = _attended(
            self.attn, joint_attention_kwargs, hidden_states=normed, image_rotary_emb=image_rotary_emb
        )
        both = attention, inner
        sizes = [part.shape[1] for part in parts]
        if fits_sum(self.proj_out, parts, gate):
            text, image = self.proj_out(both, add=(parts, gate)).split(sizes, 1)
        else:
            out = gate.unsqueeze(1) * self.proj_out(both if fits(self.proj_out) else torch.cat(both, 2))
            text, image = (part + own for part, own in zip(parts, out.split(sizes, 1), strict=True))
        if text.dtype == torch.float16:
            return text.clip(-65504, 65504), image.clip(-65504, 65504)
        return text, image


_BLOCKS = (FluxTransformerBlock, FluxSingleTransformerBlock, BasicTransformerBlock)
_FUSED: dict[type[nn.Module], type[nn.Module]] = {cls.__bases__[0]: cls for cls in (GELU, AdaLayerNormZero, *_BLOCKS)}
# diffusers' caches look blocks up by their class.
for _block in _BLOCKS:
    TransformerBlockRegistry.register(_block, copy(TransformerBlockRegistry.get(_block.__bases__[0])))


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
