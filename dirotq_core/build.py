"""Putting quantized modules into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .config import DiRotQConfig
from .input_site import InputSite, SiteMemo
from .layout import SitePlan, linear_at
from .linear import DiRotQLinear
from .solve import SolvedSite


def activation_for(config: DiRotQConfig, plan: SitePlan) -> str | None:
    """The activation format the site starts with; None for weight-only sites."""
    return config.activation(plan.bits_of(config)) if plan.quantize_input else None


def replace_linears(
    model: nn.Module, plans: list[SitePlan], config: DiRotQConfig, dtype: torch.dtype,
    device: torch.device | str = "meta",
) -> dict[str, DiRotQLinear]:  # fmt: skip
    """Swap every planned linear of `model` for an empty `DiRotQLinear` on `device`; returns them by name."""
    memo = SiteMemo()
    made: dict[str, DiRotQLinear] = {}
    for plan in plans:
        made |= zip(plan.linears, _site_modules(model, plan, config, memo, dtype, device), strict=True)
    for name, module in made.items():
        model.set_submodule(name, module)
    return made


def _site_modules(
    model: nn.Module, plan: SitePlan, config: DiRotQConfig, memo: SiteMemo, dtype: torch.dtype,
    device: torch.device | str,
) -> list[DiRotQLinear]:  # fmt: skip
    site = InputSite(plan, activation_for(config, plan), memo, device)
    return [
        DiRotQLinear(plan, i, site, linear_at(model, n).bias is not None, dtype, device)
        for i, n in enumerate(plan.linears)
    ]


def solved_modules(
    model: nn.Module, plan: SitePlan, solved: SolvedSite, config: DiRotQConfig, memo: SiteMemo
) -> dict[str, DiRotQLinear]:
    """Quantized linears of one site holding `solved`, by name, on the devices of the dense ones; `model` stays."""
    dense = [linear_at(model, n) for n in plan.linears]
    modules = _site_modules(model, plan, config, memo, dense[0].weight.dtype, "meta")
    for old, new, tensors in zip(dense, modules, solved.linears, strict=True):
        assign(new, {k: t.to(old.weight.device) for k, t in tensors.items()})
        if old.bias is not None:
            assign(new, {"bias": old.bias.data})
        new.train(old.training)
    assign(modules[0].site, {k: t.to(dense[0].weight.device) for k, t in solved.site.items()})
    return dict(zip(plan.linears, modules, strict=True))


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `modules` into `model` by name; if the block inside ends in an error, put the old ones back."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    except BaseException:  # an interrupt as well: a model that is half one thing is neither
        for name, module in before.items():
            model.set_submodule(name, module)
        raise


def assign(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Set parameters of a quantized module, frozen."""
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def quantized_linears(model: nn.Module) -> dict[str, DiRotQLinear]:
    """All `DiRotQLinear` of a model by full name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, DiRotQLinear)}


def set_activation_bits(model: Any, bits: int) -> None:
    """Run the quantized linears of a model (or of a pipeline's transformer) with 4-, 8- or 16-bit activations.

    With some methods also 3 or 6 bits.

    A run-time choice on one and the same checkpoint: weights are untouched. Weight-only linears stay at 16. Sites that
    had activation bits of their own have the same as all others then.

    Raises:
        ValueError: the method has no format of `bits`, or nothing in `model` is quantized.
    """
    model = getattr(model, "transformer", model)
    linears = quantized_linears(model)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no DiRotQ linears; quantize or load it first")
    config: DiRotQConfig = model.hf_quantizer.quantization_config
    if type(bits) is not int or bits not in config.activation_choices:  # 8.0 would be saved, and refused when loaded
        raise ValueError(f"activation_bits must be one of {config.activation_choices}, got {bits!r}")
    for module in linears.values():
        if module.plan.quantize_input:
            module.site.activation = config.activation(bits)
    config.activation_bits, config.site_activation_bits = bits, None


def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every `DiRotQLinear` by the dense `nn.Linear` it stands for, in `dtype`."""
    for name, module in quantized_linears(model).items():
        weight = module.dequantized_weight()
        dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta", dtype)
        dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
        model.set_submodule(name, dense)
