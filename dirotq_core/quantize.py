"""`dirotq.quantize`: calibrate a pipeline in memory and quantize its transformer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .backend import DENSE_DTYPES, attach_quantizer
from .build import quantized_linears, solved_modules, swapped
from .calibrate import Calibration
from .config import DiRotQConfig
from .input_site import SiteMemo
from .layout import SitePlan, linear_at, plan_sites, sparing_float32
from .report import QuantizationReport
from .solve import SolvedSite, solve_site

logger = logging.getLogger(__name__)


def quantize(
    pipeline: Any,
    config: DiRotQConfig | None = None,
    prompts: Sequence[str] | None = None,
    *,
    call: dict[str, Any] | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize `pipeline.transformer` in place, calibrated on `prompts`.

    The pipeline is run on every prompt as a user would run it, second moments of each linear's input are gathered,
    and each input site gets its basis and its rounded weights. The transformer is changed only at the end: an
    error or an interrupt before leaves it as it was. Afterwards `pipeline.transformer.save_pretrained` writes a
    checkpoint that `from_pretrained` loads.

    Args:
        pipeline: a diffusers pipeline with a transformer that has a recipe (FLUX.1, PixArt-Σ).
        config: what to make; None for the default method.
        prompts: calibration prompts; at least 16 are sensible. None or empty: data-free, as with `from_pretrained`.
        call: keyword arguments of the pipeline's call, for example ``{"num_inference_steps": 20}``; pipelines that
            want an image (Fill, Depth, Canny, Kontext) take it here, the same one for every prompt.
        progress: show progress bars.

    Memory: the model as it is, and 4 K² bytes of statistics per input site (FLUX.1-dev: 65 GB in all; PixArt-Σ: 3 GB)
    on the model's device, or in host memory where the device has no room for them.

    Returns:
        The report, one row per linear.

    Raises:
        ValueError: no recipe for the transformer, it is quantized already, or the config asks for what is not there.
    """
    model = getattr(pipeline, "transformer", None)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"pipeline must be a diffusers pipeline with a transformer, got {type(pipeline).__name__}; calibration "
            "runs the whole pipeline, text encoders and scheduler included"
        )
    if quantized_linears(model) or getattr(model, "is_quantized", False):
        raise ValueError(f"{type(model).__name__} is quantized already; load the original weights first")
    if config is not None and not isinstance(config, DiRotQConfig):
        raise ValueError(f"config must be a DiRotQConfig, got {type(config).__name__}")
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts or []):
        raise ValueError("prompts must be a list of strings")
    for name in ("prompt", "generator", "output_type"):
        if name in (call or {}):
            raise ValueError(f"call must not hold {name!r}; calibration sets it for each prompt")
    prompts = list(prompts or [])
    config = sparing_float32((config or DiRotQConfig()).resolved(calibrated=bool(prompts)), model)
    plans = plan_sites(model, config)
    _refuse_unready(model, plans)
    calibration = Calibration(model, plans)
    if prompts:
        calibration.run(pipeline, prompts, call or {}, config.seed, progress)
    report, solved = solve_all(model, plans, config, calibration, progress)
    install_all(model, plans, config, solved)
    pipeline.transformer.hf_quantizer.report = report  # `push_to_hub` saves it beside the model
    for note in report.notes():
        logger.warning("%s", note)
    return report


def _refuse_unready(model: torch.nn.Module, plans: Sequence[SitePlan]) -> None:
    """Modules that offloading or casting has taken hold of would be replaced under its hands."""
    for name in (n for p in plans for n in p.linears):
        module = linear_at(model, name)
        weight = module.weight
        if weight.is_meta or hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
            raise ValueError(
                f"{name} is offloaded or has a hook of its own; quantize first and enable offloading or layerwise "
                "casting then (`dirotq quantize` takes the model from its files)"
            )
        if weight.dtype not in DENSE_DTYPES:
            raise ValueError(
                f"{name}.weight has dtype {weight.dtype}; dirotq quantizes bfloat16, float16 or float32 weights"
            )


def solve_all(
    model: torch.nn.Module, plans: Sequence[SitePlan], config: DiRotQConfig, calibration: Calibration,
    progress: bool = True, consume: bool = False,
) -> tuple[QuantizationReport, list[SolvedSite]]:  # fmt: skip
    """Solve every site from the gathered statistics; `model` is not changed.

    Args:
        consume: free each site's statistics when it is solved; `calibration` is of no more use then.
    """
    solved = []
    report = QuantizationReport(config.method, config.activation_bits or 4)
    held_out = calibration.held_out
    for plan in tqdm(plans, desc="quantizing", unit="site", disable=not progress):
        moment = calibration.moments[plan.owner]
        weights = [linear_at(model, n).weight.data for n in plan.linears]
        if not moment.tokens and calibration.ran:
            raise ValueError(
                f"{plan.owner} saw no token while the pipeline ran on the prompts: nothing calls it, so it "
                "cannot be calibrated; leave it in 16 bit with modules_to_not_convert"
            )
        mean = None
        if moment.tokens:
            mean = (moment.take() if consume else moment.mean()).to(weights[0].device)
        site = solve_site(plan, config, weights, mean, moment.tokens)
        del mean
        if plan.owner in held_out:
            measure_site(model, plan, config, site, held_out[plan.owner])
        solved.append(site)
        report.linears += site.reports
    return report, solved


def install_all(model: Any, plans: Sequence[SitePlan], config: DiRotQConfig, solved: Sequence[SolvedSite]) -> None:
    """Put solved sites into `model` and mark it as quantized for diffusers."""
    memo = SiteMemo()
    dtype = model.dtype
    modules: dict[str, torch.nn.Module] = {}
    for plan, site in zip(plans, solved, strict=True):
        modules |= solved_modules(model, plan, site, config, memo)
    with swapped(model, modules):
        attach_quantizer(model, config, dtype)


@torch.no_grad()
def measure_site(
    model: torch.nn.Module, plan: SitePlan, config: DiRotQConfig, solved: SolvedSite, tokens: torch.Tensor
) -> None:
    """Fill in each report's output SQNR on held-out tokens [M, K], with the linear that will run."""
    modules = solved_modules(model, plan, solved, config, SiteMemo())
    for name, report in zip(plan.linears, solved.reports, strict=True):
        dense = linear_at(model, name)
        x = tokens.to(dense.weight.device)
        signal = dense(x).double()
        noise = signal - modules[name](x).double()
        report.output_db = float(10 * torch.log10(signal.square().sum() / noise.square().sum().clamp(min=1e-300)))
