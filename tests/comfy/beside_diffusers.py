"""The diffusers backend on the same checkpoints: made there, drawing in a loop of its own, and what equality means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import dirotq
from dirotq.dirotq_core.single_file import NativeCheckpoint, fusions

from . import models
from .core import relative
from .training import image_ids, packed

#: Codes are decided by comparisons, so a unit in one of the last places of float32 moves some of them, which moves the
#: output by 0.4 % at 8 bit and 2 % at 4. What equality means there is: no further apart than the same model with inputs
#: that differ by as little. With 16-bit activations only the 16-bit part z is rounded, to bfloat16.
LAST_PLACES = [1 + sign * 2**-power for power in (22, 20, 18, 17) for sign in (1, -1)]


def assert_equal(ours: torch.Tensor, model_on: Callable, x: torch.Tensor, bits: int, slack: float = 2) -> None:
    """`ours` is what `model_on` makes of x, but for rounding."""
    theirs = model_on(x)
    least = 2**-8 if bits == 16 else 0  # a unit in bfloat16's last place, by which z may differ
    found, moved = relative(ours, theirs), [relative(model_on(x * p), theirs) for p in LAST_PLACES]
    assert found < max(least, slack * max(moved)), f"other inputs move the result by {moved}"


def assert_same_linears(core: SimpleNamespace, model: torch.nn.Module, checkpoint: NativeCheckpoint, bits: str) -> None:
    """Each quantized linear computes the same bits in ComfyUI's model as its parts do in the diffusers `model`."""
    patcher = core.model.make_model(checkpoint, core.model.make_settings(checkpoint, bits, "auto", "side branch"))
    core.comfy.model_management.load_models_gpu([patcher])
    parts = {f.native: f.parts for f in fusions(checkpoint.config)}
    assert len(checkpoint.plans) > 5
    for name in checkpoint.plans:
        ours = patcher.model.diffusion_model.get_submodule(name)
        x = torch.randn(2, 33, ours.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            theirs = torch.cat([model.get_submodule(part)(x) for part in parts[name]], -1)
            assert torch.equal(ours(x), theirs), name


def unpacked(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    return x.view(len(x), h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, h, w)


def drawing(core: SimpleNamespace, patcher: Any, model: torch.nn.Module, given: Mapping, steps: int) -> Callable:
    """Noise [1, 16, 8, 8] → the latent of ComfyUI's sampler "euler" and schedule "simple" with the diffusers `model`.

    patcher: any FLUX.1 MODEL of ComfyUI, for the schedule and the scale of latents. given: `core.condition`'s keys.
    """
    from comfy.samplers import calculate_sigmas

    sigmas = calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
    txt_ids = torch.zeros(given["context"].shape[1], 3)

    @torch.no_grad()
    def draw(noise: torch.Tensor) -> torch.Tensor:
        x = packed(noise * sigmas[0])
        for now, then in pairwise(sigmas):
            velocity = model(
                hidden_states=x, encoder_hidden_states=given["context"], pooled_projections=given["y"],
                timestep=now[None], img_ids=image_ids(), txt_ids=txt_ids, guidance=given["guidance"],
            ).sample  # fmt: skip
            x = x + (then - now) * velocity
        return patcher.get_model_object("latent_format").process_out(unpacked(x, 8, 8))

    return draw


def calibrated_flux(config: dirotq.DiRotQConfig) -> FluxTransformer2DModel:
    """The small FLUX.1, quantized on 24 forwards with random inputs."""
    from dirotq.dirotq_core.calibrate import Calibration
    from dirotq.dirotq_core.layout import plan_sites
    from dirotq.dirotq_core.quantize import install_all, solve_all

    model = models.flux()
    config = config.resolved(calibrated=True)
    plans = plan_sites(model, config)
    calibration = Calibration(model, plans)
    calibration.ran = True
    ids = image_ids()
    with torch.no_grad(), calibration.recording():
        for i in range(24):
            g = torch.Generator().manual_seed(i)
            model(
                hidden_states=torch.randn(1, 16, 64, generator=g).bfloat16(),
                encoder_hidden_states=torch.randn(1, 12, 4096, generator=g).bfloat16(),
                pooled_projections=torch.randn(1, 768, generator=g).bfloat16(),
                timestep=torch.tensor([i / 24]).bfloat16(),
                img_ids=ids,
                txt_ids=torch.zeros(12, 3),
                guidance=torch.tensor([3.5]),
            )
    install_all(model, plans, config, solve_all(model, plans, config, calibration, progress=False)[1])
    return model
