"""PixArt's blocks with norm and modulation in one pass, and gate and residual at the end of the products before them.

As in `fused_layers`: diffusers' own class and processor, which compute diffusers' steps where these do not apply.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from ..kernels import attend, modulation_rows, norm_modulate
from .fusible import attended, attention_is_pytorchs, fits_mlp, fits_norm, fits_sum, mlp, no_dropout, skippable
from .linear import Added

_PLAIN = attention.BasicTransformerBlock.forward


class DiRotQAttnProcessor(AttnProcessor2_0):
    """`AttnProcessor2_0` that can end with what its result is added to, where it is `simple`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        add: Added | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Arguments and results are those of `AttnProcessor2_0`; add: as in `DiRotQLinear.forward`."""
        if add is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, length, _ = context.shape
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in projected)
        by_key = attention_mask is None or (
            attention_mask.shape == (batch, 1, length) and attention_mask.dtype == query.dtype
        )
        if by_key and attention_is_pytorchs():
            out = attend(query, key, value, None if attention_mask is None else attention_mask[:, 0])
        else:
            if attention_mask is not None:
                attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
                attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
            out = out.transpose(1, 2)
        return attn.to_out[0](out.flatten(2).to(query.dtype), add=add)


def simple(attn: Attention, residual: torch.Tensor) -> bool:
    """Whether attention is projections and a softmax, and its last linear can end with the residual."""
    return (
        type(attn.processor) is DiRotQAttnProcessor
        and skippable(attn)
        and all(norm is None for norm in (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k))
        and not attn.norm_cross
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and no_dropout(attn.to_out[1])
        and fits_sum(attn.to_out[0], [residual], residual)
    )


def _attended(attn: nn.Module, **arguments: Any) -> torch.Tensor:
    return attended(attn, Attention, DiRotQAttnProcessor, None, **arguments)


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """diffusers' block, that of PixArt (`ada_norm_single`)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        x = hidden_states
        if timestep is None or cross_attention_kwargs or not self._fits(x, timestep):
            return _PLAIN(
                self, x, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        x = x.contiguous()  # the embedding of patches leaves columns apart, which two ops would copy
        rows = modulation_rows(self.scale_shift_table, timestep.reshape(len(x), -1))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = rows.unbind(1)
        normed = norm_modulate([x], scale, shift, self.norm1.eps)
        x = _attended(self.attn1, hidden_states=normed, attention_mask=attention_mask, add=([x], gate))
        if self.attn2 is not None:
            x = _attended(
                self.attn2, hidden_states=x, encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask, add=([x], None),
            )  # fmt: skip
        return mlp(self.ff, norm_modulate([x], scale_mlp, shift_mlp, self.norm2.eps), x, gate_mlp)

    def _fits(self, x: torch.Tensor, timestep: torch.Tensor) -> bool:
        known = self.norm_type == "ada_norm_single" and x.ndim == 3 and self.pos_embed is None
        if not known or self.only_cross_attention or self._chunk_size is not None:
            return False
        return (
            timestep.dtype == x.dtype == self.scale_shift_table.dtype
            and fits_norm(self.norm1, [x], x)
            and fits_norm(self.norm2, [x], x)
            and simple(self.attn1, x)
            and (self.attn2 is None or simple(self.attn2, x))
            and fits_mlp(self.ff, x, x)
        )
