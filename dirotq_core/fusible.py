"""Whether layers that follow one another can run in one of our kernels: nobody misses what lies between them."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from .linear import DiRotQLinear
from .offloading import attribute

#: diffusers' hooks that only move or cast a module's own weights.
_MOVERS = {
    "group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading", "layerwise_casting",
    "peft_autocast_disable",
}  # fmt: skip

#: PyTorch's own, whatever this module finds in its place when it is imported.
_ATTENTION = torch._C._nn.scaled_dot_product_attention


def attention_is_pytorchs() -> bool:
    """Whether nobody put a function in the place of PyTorch's attention, or watches for it in a mode, as packages for
    other attentions and for attention over several GPUs do."""
    if nn.functional.scaled_dot_product_attention is not _ATTENTION:
        return False
    if torch.compiler.is_compiling():  # of PyTorch's compilers, only 2.13's is known to trace the question below
        return True
    return all(type(mode) is DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of torch wait for what goes in or comes out."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def skippable(module: nn.Module) -> bool:
    """Whether nobody misses a call of `module`: no hooks but those that bring weights in, and no other `forward`."""
    registry: Any = attribute(module, "_diffusers_hook")
    if has_hooks(module) or (registry is not None and not _MOVERS.issuperset(registry.hooks)):
        return False
    if registry is not None or attribute(module, "_hf_hook") is not None:
        return True
    own = vars(module).get("forward")  # accelerate leaves the class's own behind when it takes its hooks off
    return own is None or getattr(own, "__func__", None) is type(module).forward


_CALLED = ("_diffusers_hook", "_hf_hook", "forward")


def watched(module: nn.Module) -> bool:
    """Whether a call of `module` is more than its class's `forward`: hooks, even on all modules, or another one."""
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(everywhere) or has_hooks(module) or any(vars(module).get(name) is not None for name in _CALLED)


def bare(module: nn.Module) -> bool:
    """Whether a call of `module` is its class's `forward` and nothing else: no hooks, and not compiled."""
    return not watched(module) and vars(module).get("_compiled_call_impl") is None


def attended(attn: Any, cls: type[nn.Module], processor: type, more: dict[str, Any] | None, **arguments: Any) -> Any:
    """`attn(**arguments, **more)`: by its processor itself if nobody waits for the call of diffusers' `cls`.

    Its `forward` looks the processor's signature up every time, for what in `more` that does not know. processor: one
    of ours, which knows all `arguments`. Compiled, the call costs nothing, and the compiler watches who waits for it.
    """
    known = type(attn) is cls and type(attn.processor) is processor
    if torch.compiler.is_compiling() or more or not known or not bare(attn):
        return attn(**arguments, **(more or {}))
    call: Any = attn.processor  # which a type checker takes for one of the module's tensors
    return call(attn, **arguments)


def fits(linear: nn.Module) -> bool:
    """Whether `linear` can compute its neighbours' steps, too: it is ours, without a LoRA beside it."""
    return type(linear) is DiRotQLinear and not has_hooks(linear)


def fits_gelu(act: nn.Module) -> bool:
    return type(act) is nn.GELU and act.approximate == "tanh" and skippable(act)


def fits_norm(norm: nn.Module, parts: list[torch.Tensor], emb: torch.Tensor) -> bool:
    """Whether `norm_modulate` computes it. It has no gradient, and neither casts nor broadcasts."""
    return (
        type(norm) is nn.LayerNorm
        and not norm.elementwise_affine
        and skippable(norm)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(emb.device.type)  # under which layer norms are float32
        and all(part.dtype == emb.dtype and len(part) == len(emb) for part in parts)
    )


def fits_sum(linear: nn.Module, parts: list[torch.Tensor], gate: torch.Tensor) -> bool:
    """Whether `linear` can end with the gate and the residual: they have no gradient there, and one dtype."""
    return (
        fits(linear)
        and skippable(linear)  # nobody looks at what it returns
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(gate.device.type)
        and all(part.dtype == gate.dtype and len(part) == len(gate) for part in parts)
    )


def no_dropout(module: nn.Module) -> bool:
    return type(module) is nn.Dropout and skippable(module) and (module.p == 0 or not module.training)


def fits_mlp(ff: nn.Module, x: torch.Tensor, emb: torch.Tensor) -> bool:
    if type(ff) is not FeedForward or not skippable(ff):
        return False
    net = list(cast(nn.ModuleList, ff.net))
    return len(net) == 3 and no_dropout(net[1]) and fits_sum(net[2], [x], emb)


def mlp(ff: FeedForward, x: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return ff.net[2](ff.net[0](x), add=([residual], gate))
