"""Calibration of a MODEL by really sampling with it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import psutil
import torch

from ..dirotq_core.calibrate import HELD_OUT_TOKENS, Calibration, held_out_prompts
from ..dirotq_core.config import DiRotQConfig
from ..dirotq_core.layout import SitePlan
from ..dirotq_core.quantize import measure_site
from ..dirotq_core.solve import SolvedSite, solve_site
from .progress import Progress
from .source import SourceWeights

#: Share of free memory that second moments of one pass may take.
MEMORY_SHARE = 0.5
#: Matrices [K, K] in float64 that solving a site takes at a time, roughly.
SOLVER_MATRICES = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """Images to draw: `model` on each of `conditionings` in turn, `samples` times, each with noise of its own."""

    model: Any
    conditionings: list[Any]
    negative: Any
    samples: int
    steps: int
    cfg: float
    width: int
    height: int
    seed: int

    def draw(self, index: int, callback: Any) -> None:
        """Sample image `index` for its activations; the latent is thrown away."""
        latent_format = self.model.get_model_object("latent_format")
        shape = (1, latent_format.latent_channels, self.height // 8, self.width // 8)
        latent = torch.zeros(shape, device=comfy.model_management.intermediate_device())
        latent = comfy.sample.fix_empty_latent_channels(self.model, latent)
        noise = comfy.sample.prepare_noise(latent, self.seed * 1_000_003 + index)
        positive = self.conditionings[index % len(self.conditionings)]
        comfy.sample.sample(
            self.model, noise, self.steps, self.cfg, "euler", "simple", positive, self.negative or positive, latent,
            denoise=1.0, seed=self.seed + index, disable_pbar=True, callback=callback,
        )  # fmt: skip


def calibrated_sites(
    sampling: Sampling, weights: SourceWeights, plans: list[SitePlan], config: DiRotQConfig, node_id: str | None = None
) -> dict[str, SolvedSite]:
    """Every site solved on statistics of its input, by owner.

    Second moments take 4 K² bytes a site, 65 GB for FLUX.1: sites that do not fit into memory together are calibrated
    in several passes over the same images.

    Raises:
        ValueError: a site saw no token.
        InterruptProcessingException: ComfyUI's interrupt, at the next step or site.
    """
    passes = list(_passes(plans))
    if len(passes) > 1:
        logger.info("second moments of all sites do not fit into memory; calibrating in %d passes", len(passes))
    solved: dict[str, SolvedSite] = {}
    with Progress(len(passes) * sampling.samples * sampling.steps + len(plans), node_id) as progress:
        for group in passes:
            calibration = _run(sampling, group, progress)
            solved |= _solve(weights, group, config, calibration, progress)
    return solved


def _passes(plans: list[SitePlan]) -> Iterator[list[SitePlan]]:
    device = comfy.model_management.get_torch_device()
    budget = MEMORY_SHARE * psutil.virtual_memory().available
    if device.type == "cuda":
        budget = max(budget, MEMORY_SHARE * comfy.model_management.get_free_memory(device))
    group: list[SitePlan] = []
    taken = 0.0
    for plan in plans:
        if group and taken + plan.moment_bytes > budget:
            yield group
            group, taken = [], 0.0
        group.append(plan)
        taken += plan.moment_bytes
    if group:
        yield group


def _run(sampling: Sampling, plans: list[SitePlan], progress: Progress) -> Calibration:
    calibration = Calibration(sampling.model.model.diffusion_model, plans)
    calibration.ran = True
    held = held_out_prompts(sampling.samples)
    calibration.rows_per_call = max(1, -(-HELD_OUT_TOKENS // (max(held, 1) * sampling.steps)))

    def callback(*_: Any) -> None:
        progress.step(f"calibrating, image {image + 1} of {sampling.samples}")

    image = 0
    with calibration.recording():
        for image in range(sampling.samples):
            calibration.holding_out = image >= sampling.samples - held
            sampling.draw(image, callback)
    return calibration


def _solve(
    weights: SourceWeights, plans: list[SitePlan], config: DiRotQConfig, calibration: Calibration, progress: Progress
) -> dict[str, SolvedSite]:
    device = comfy.model_management.get_torch_device()
    widest = max((p.in_features for p in plans if p.transform is not None), default=0)
    if device.type != "cpu":
        comfy.model_management.free_memory(SOLVER_MATRICES * 8 * widest**2, device)
    held_out, solved = calibration.held_out, {}
    for plan in plans:
        moment = calibration.moments.pop(plan.owner)  # freed as the sites are done
        if not moment.tokens:
            raise ValueError(f"{plan.owner} saw no token while sampling; is it used by this model at all?")
        weight = weights[f"{plan.owner}.weight"].to(device)
        site = solve_site(plan, config, [weight], moment.mean().to(device), moment.tokens)
        if plan.owner in held_out:
            _measure(weight, plan, config, site, held_out[plan.owner].to(weight.dtype))
        solved[plan.owner] = site
        progress.step(f"quantizing {plan.owner}")
    return solved


def _measure(
    weight: torch.Tensor, plan: SitePlan, config: DiRotQConfig, site: SolvedSite, tokens: torch.Tensor
) -> None:
    """`measure_site` of one linear that need not be on the GPU in the model itself. The bias does not matter."""
    alone = torch.nn.Module()
    alone.linear = torch.nn.Linear(plan.in_features, len(weight), bias=False, device="meta")
    alone.linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    measure_site(alone, dataclasses.replace(plan, linears=("linear",)), config, site, tokens)
