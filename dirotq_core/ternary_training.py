"""Straight-through training of ternary weights (RobuQ, arXiv 2509.23582): into a model, and out into a checkpoint.

sites = insert(model, plans, config)      # linears become trainable `TernaryLinear`s
…                                         # any training loop
install_all(model, plans, config, solved(model, plans, config))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import hadamard_matrix
from .activations import ACTIVATION_FORMATS, quantize_to_table
from .build import activation_for
from .config import DiRotQConfig
from .layout import SitePlan, linear_at
from .solve import SolvedSite, solve_site
from .ternary import Ternary
from .transforms import SiteStatistics, hadamard_block


class TernarySite(nn.Module):
    """The input of a site's linears while they are trained: v̂ and z of x, gradients straight through.

    Attributes:
        basis: U [K, r], trained. signs: D, fixed. activation: key of `ACTIVATION_FORMATS`, None for 16 bit.
    """

    signs: torch.Tensor
    hadamard: torch.Tensor

    def __init__(self, site: Mapping[str, torch.Tensor], activation: str | None, device: torch.device):
        super().__init__()
        self.basis = nn.Parameter(site["basis"].to(device, torch.float32))
        self.register_buffer("signs", site["signs"].to(device))
        block = hadamard_block(len(self.signs))
        self.register_buffer("hadamard", hadamard_matrix(block, device=device), persistent=False)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v̂ [M, K] and z [M, r] of x [M, K]."""
        with torch.autocast(x.device.type, enabled=False):  # as the checkpoint's rotation: float32
            v = (x.float() * self.signs).unflatten(1, (-1, len(self.hadamard))) @ self.hadamard
            v = v.flatten(1)
        if self.activation is not None:
            codes, scale = quantize_to_table(v.detach(), ACTIVATION_FORMATS[self.activation])
            v = v + (codes * scale[:, None] - v).detach()
        return v, x @ self.basis


class TernaryLinear(nn.Linear):
    """y = v̂ Ŵᵀ + z Lᵀ + b; `weight` holds W_res [N, K], of which Ŵ is the ternary value, straight through."""

    def __init__(self, weight: torch.Tensor, low_rank: torch.Tensor, bias: torch.Tensor | None, site: TernarySite):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight)
        self.low_rank = nn.Parameter(low_rank)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.site = site  # shared with the siblings; `parameters` counts it once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, z = self.site(x.reshape(-1, self.in_features))
        w = self.weight
        y = F.linear(v, w + (ternary_values(w) - w).detach(), self.bias) + F.linear(z, self.low_rank)
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)


@torch.no_grad()
def ternary_values(w: torch.Tensor) -> torch.Tensor:
    """γ · clamp(round(w / γ), −1, 1), γ the mean magnitude of a row of w [N, K]."""
    fmt = Ternary()
    rounded = fmt.nearest(w, None)
    return fmt.values(rounded.codes, rounded.scales, w.dtype)


def insert(model: nn.Module, plans: Sequence[SitePlan], config: DiRotQConfig) -> dict[str, TernarySite]:
    """Make the linears of `plans` with quantized inputs trainable, from their present weights; the sites by owner.

    Linears of other plans (modulation) are trained as they are and quantized at the end. `config` is resolved, of
    method "robuq".

    Raises ValueError for another method or a rank of 0.
    """
    if config.method != "robuq" or not config.rank:
        raise ValueError(f"method 'robuq' with a rank is needed, got {config.method!r} with rank {config.rank}")
    sites = {}
    for plan in plans:
        if not plan.quantize_input or plan.transform is None:
            continue
        dense = [linear_at(model, n) for n in plan.linears]
        weights = [m.weight.data.float() for m in dense]
        tensors = plan.transform.prepare(SiteStatistics(plan.in_features, weights, plan.seed, plan.rank, "pca", None))
        target, low_rank = plan.transform.fold(torch.cat(weights), tensors)
        sites[plan.owner] = site = TernarySite(tensors, activation_for(config, plan), target.device)
        parts = zip(
            plan.linears, dense, target.split(plan.out_features), low_rank.split(plan.out_features), strict=True
        )
        for name, old, own, branch in parts:
            bias = None if old.bias is None else old.bias.data.float()
            model.set_submodule(name, TernaryLinear(own.clone(), branch.clone(), bias, site))
    return sites


@torch.no_grad()
def solved(model: nn.Module, plans: Sequence[SitePlan], config: DiRotQConfig) -> list[SolvedSite]:
    """What `install_all` wants, from the trained modules; the rest is rounded to nearest. `model` is not changed."""
    out = []
    for plan in plans:
        modules = [linear_at(model, n) for n in plan.linears]
        trained = [m for m in modules if isinstance(m, TernaryLinear)]
        if not trained:
            out.append(solve_site(plan, config, [m.weight.data for m in modules], None))
            continue
        linears, fmt = [], plan.format
        for module in trained:
            rounded = fmt.nearest(module.weight.data, None)
            linears.append({
                "weight": fmt.pack(rounded.codes).cpu(),
                "weight_scale": rounded.scale.flatten().cpu(),
                "low_rank": module.low_rank.data.to("cpu", torch.bfloat16),
            })  # fmt: skip
        site = trained[0].site
        tensors = {"signs": site.signs.cpu(), "basis": site.basis.data.to("cpu", torch.bfloat16)}
        out.append(SolvedSite(tensors, linears, []))
    return out
