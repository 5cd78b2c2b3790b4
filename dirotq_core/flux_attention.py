"""FLUX.1's attention with norms, rotary embedding and the joining of text and image in one pass.

What diffusers computes in four operations per tensor (eight kernels a block even when compiled) is a pass over memory:
on a GPU where 8-bit products are fast, a tenth of a step. The attention is `attend`, unless somebody chose another.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn

from ..kernels import POWERS_OF_TWO, attend, powers_scale, qk_norm_rope
from .fusible import attention_is_pytorchs
from .linear import Added
from .offloading import attribute


class DiRotQFluxAttnProcessor(FluxAttnProcessor):
    """`FluxAttnProcessor` with `qk_norm_rope`; its own steps where that does not apply (see `applies`)."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        add: tuple[Added, Added] | None = None,
    ) -> Any:
        """Arguments and results are those of `FluxAttnProcessor`.

        add: what the results are added to, image and text, where this class `applies` (`DiRotQLinear.forward`).
        """
        if not applies(attn, image_rotary_emb):
            assert add is None, "what asks for the sum has looked"
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        assert image_rotary_emb is not None
        inputs: list[tuple[Any, ...]] = [(hidden_states, attn.to_q, attn.to_k, attn.to_v)]
        norms = [(attn.norm_q, attn.norm_k)]
        if attn.added_kv_proj_dim is not None:  # text first
            inputs.insert(0, (encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
            norms.insert(0, (attn.norm_added_q, attn.norm_added_k))
        heads = (-1, attn.head_dim)
        projected = [[projection(x).unflatten(-1, heads) for projection in linears] for x, *linears in inputs]
        queries, keys, values = ([part[i] for part in projected] for i in range(3))
        cos, sin = (angles.to(queries[0].device) for angles in image_rotary_emb)
        ours = attention_mask is None and self._nobody_chose()
        # Hopper's kernel takes weights as powers of two of q kᵀ: with the factor in q, it multiplies no score.
        powers = ours and queries[0].dtype == torch.bfloat16 and attn.head_dim == 128
        query, key, value = qk_norm_rope(
            queries, keys, values if len(values) > 1 else [], [_weight(n) for n, _ in norms],
            [_weight(n) for _, n in norms], cos, sin, attn.norm_q.eps,
            query_scale=powers_scale(attn.head_dim) if powers else 1.0,
        )  # fmt: skip
        if len(values) == 1:
            value = values[0]
        if ours:
            out = attend(query, key, value, scale=POWERS_OF_TWO if powers else None)
        else:
            out = dispatch_attention_fn(
                query, key, value,
                attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config,
            )  # fmt: skip
        out = out.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        if add is not None:
            return attn.to_out[0](image.contiguous(), add=add[0]), attn.to_add_out(text.contiguous(), add=add[1])
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())

    def _nobody_chose(self) -> bool:
        """Whether attention is neither split over GPUs nor somebody's choice (`set_attention_backend("native")` is)."""
        return (
            self._attention_backend is None
            and self._parallel_config is None
            and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
            and attention_is_pytorchs()
        )


def applies(attn: FluxAttention, rotary: Any) -> bool:
    """Whether `qk_norm_rope` computes what the attention module asks for.

    Not while gradients are recorded (it has none), for merged projections, without positions, or with norms of another
    kind.
    """
    added = attn.added_kv_proj_dim is not None
    norms = [attn.norm_q, attn.norm_k, *((attn.norm_added_q, attn.norm_added_k) if added else ())]
    return (
        isinstance(rotary, tuple)
        and not torch.is_grad_enabled()
        and not getattr(attn, "fused_projections", False)
        and attn.head_dim & (attn.head_dim - 1) == 0
        and all(isinstance(n, nn.RMSNorm) and n.weight is not None and n.eps == attn.norm_q.eps for n in norms)
        and attn.norm_q.eps is not None
    )


def _weight(norm: nn.RMSNorm) -> torch.Tensor:
    """The norm's weight. Hooks of accelerate and diffusers, which keep it elsewhere, bring it in for a forward only."""
    registry, hook = attribute(norm, "_diffusers_hook"), attribute(norm, "_hf_hook")
    hooks = [] if registry is None else [registry.hooks[name] for name in reversed(registry._hook_order)]
    if hook is not None:
        hooks.append(hook)
    if not hooks:
        return norm.weight
    for hook in hooks:
        hook.pre_forward(norm)
    weight = norm.weight.clone()  # its memory is another stream's to fill again once the hooks have let it go
    for hook in reversed(hooks):
        hook.post_forward(norm, ())
    return weight
