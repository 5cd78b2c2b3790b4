"""Quantizing one input site: from second moments and weights to packed tensors and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from .codebooks import Rounded, WeightFormat
from .config import DiRotQConfig
from .layout import SitePlan
from .rounding import round_gptq, round_nearest
from .subspace import EXACT_WIDTH, captured_energy
from .transforms import SiteStatistics, Tensors, transformed_moment

#: Second moments and GPTQ overfit below about this many tokens per input column; a rule of thumb for the warning.
TOKENS_PER_COLUMN = 8


@dataclass
class LinearReport:
    """What happened to one linear. Decibels; None where it was not measured."""

    name: str
    tokens: int
    energy: float | None
    weight_db: float | None
    note: str | None = None
    output_db: float | None = None
    weight_only: bool = False

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class SolvedSite:
    """Tensors of the site and, per linear, of the linear (bias excepted), as `SitePlan` specifies them."""

    site: dict[str, torch.Tensor]
    linears: list[dict[str, torch.Tensor]]
    reports: list[LinearReport]


@torch.no_grad()
def solve_site(
    plan: SitePlan,
    config: DiRotQConfig,
    weights: Sequence[torch.Tensor],
    moment: torch.Tensor | None,
    tokens: int = 0,
) -> SolvedSite:
    """Quantize the linears of one site.

    Args:
        plan, config: what to make. config is resolved.
        weights: W [N, K] of each linear in `plan.linears`, any float dtype, all on the device to compute on.
        moment: C [K, K] of the input, its diagonal [K] for a modulation layer, or None without calibration.
        tokens: how many tokens `moment` averages.

    Raises:
        ValueError: a weight holds NaN or infinity, or the method needs a moment and there is none.
    """
    for name, w in zip(plan.linears, weights, strict=True):
        if not torch.isfinite(w).all():
            raise ValueError(f"{name}.weight holds NaN or infinity; it cannot be quantized")
    energy = None
    if plan.transform is None:
        site: Tensors = {}
        rounded = round_nearest(torch.cat([w.float() for w in weights]), plan.format, moment)
        target = torch.cat([w.to(_precision(plan)) for w in weights])
        low_rank = None
        low_moment = None if moment is None else moment.double().to(target.device)
    else:
        statistics = SiteStatistics(plan.in_features, weights, plan.seed, plan.rank, config.basis or "pca", moment)
        site = plan.transform.prepare(statistics)
        target, low_rank = plan.transform.fold(torch.cat([w.to(_precision(plan)) for w in weights]), site)
        if "basis" in site and "smooth" not in site and moment is not None:  # a basis of x itself
            energy = captured_energy(moment, torch.linalg.qr(site["basis"].double())[0])
        low_moment = None if moment is None else transformed_moment(plan.transform, moment.to(target.device), site)
        rounded = _round(target, plan, config, low_moment)
    return SolvedSite(
        site={k: t.cpu() for k, t in site.items()},
        linears=_split(plan, rounded, low_rank),
        reports=_reports(plan, target, rounded, low_moment, tokens, energy),
    )


def _precision(plan: SitePlan) -> torch.dtype:
    """Of W_res = W − L Uᵀ and the report: float32 is plenty, float64 is what small sites can be compared in."""
    return torch.float64 if plan.in_features <= EXACT_WIDTH else torch.float32


def _round(target: torch.Tensor, plan: SitePlan, config: DiRotQConfig, moment: torch.Tensor | None) -> Rounded:
    if config.rounding == "gptq" and moment is not None and isinstance(plan.format, WeightFormat):
        return round_gptq(target, plan.format, moment)
    return round_nearest(target, plan.format, None if moment is None else moment.diagonal())


def _split(plan: SitePlan, rounded: Rounded, low_rank: torch.Tensor | None) -> list[dict[str, torch.Tensor]]:
    out, start = [], 0
    for n in plan.out_features:
        rows = slice(start, start + n)
        spec = plan.linear_spec(n)
        tensors = {"weight": plan.format.pack(rounded.codes[rows]), **{k: t[rows] for k, t in rounded.scales.items()}}
        if low_rank is not None and plan.rank:
            tensors["low_rank"] = low_rank[rows]
        out.append({k: t.to("cpu", spec[k][1]).reshape(spec[k][0]).contiguous() for k, t in tensors.items()})
        start += n
    return out


def _reports(
    plan: SitePlan, target: torch.Tensor, rounded: Rounded, moment: torch.Tensor | None, tokens: int,
    energy: float | None,
) -> list[LinearReport]:  # fmt: skip
    fmt = plan.format
    error = fmt.values(rounded.codes, rounded.scales, target.dtype) - target
    moment = None if moment is None else moment.to(target)
    remarks = [rounded.fallback] if rounded.fallback else []
    enough = TOKENS_PER_COLUMN * plan.in_features
    if plan.quantize_input and 0 < tokens < enough:
        remarks.append(
            f"{tokens} calibration tokens for {plan.in_features} columns are few; at least {enough} are better"
        )
    note = "; ".join(remarks) or None
    reports, start = [], 0
    for name, n in zip(plan.linears, plan.out_features, strict=True):
        e, w = error[start : start + n], target[start : start + n]
        ratio = _energy(w, moment) / max(_energy(e, moment), 1e-300)
        reports.append(LinearReport(name, tokens, energy, _db(ratio), note, weight_only=not plan.quantize_input))
        start += n
    return reports


def _energy(w: torch.Tensor, moment: torch.Tensor | None) -> float:
    """E‖v Wᵀ‖² for v of the given second moment (or its diagonal), of white v without one."""
    if moment is None:
        return float(w.square().sum(dtype=torch.float64))
    if moment.ndim == 1:
        return float((w.square() * moment).sum(dtype=torch.float64))
    return float(((w @ moment) * w).sum(dtype=torch.float64))


def _db(ratio: float) -> float:
    return float(10 * torch.log10(torch.tensor(max(ratio, 1e-30), dtype=torch.float64)))
