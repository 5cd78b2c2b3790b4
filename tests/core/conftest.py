"""Tiny transformers of both families, and data-free quantized copies of them."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

from dirotq import DiRotQConfig
from dirotq.dirotq_core.calibrate import Calibration
from dirotq.dirotq_core.layout import plan_sites
from dirotq.dirotq_core.quantize import install_all, solve_all

TINY = {
    "flux": (
        FluxTransformer2DModel,
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": [8, 12, 12],
        },
    ),
    "pixart": (
        PixArtTransformer2DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "sample_size": 8,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        },
    ),
}


@pytest.fixture(scope="session")
def tiny():
    """tiny(family): a new model with seeded random weights."""

    def make(family):
        torch.manual_seed(0)
        cls, config = TINY[family]
        return cls.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def quantized(tiny):
    """quantized(family, **config): (model, plans) without calibration data."""

    def make(family, **arguments):
        model = tiny(family)
        config = DiRotQConfig(**arguments).resolved(calibrated=False)
        plans = plan_sites(model, config)
        _, solved = solve_all(model, plans, config, Calibration(model, plans), progress=False)
        install_all(model, plans, config, solved)
        return model, plans

    return make


@pytest.fixture(scope="session")
def run():
    """run(model): one seeded forward of a tiny model of either family."""

    @torch.no_grad()
    def forward(model, seed=0):
        g = torch.Generator().manual_seed(seed)
        if type(model).__name__.startswith("Flux"):
            return model(
                hidden_states=torch.randn(1, 12, 16, generator=g),
                encoder_hidden_states=torch.randn(1, 5, 32, generator=g),
                pooled_projections=torch.randn(1, 32, generator=g),
                timestep=torch.tensor([0.5]),
                guidance=torch.tensor([3.5]),
                img_ids=torch.arange(36.0).reshape(12, 3),
                txt_ids=torch.zeros(5, 3),
            ).sample
        return model(
            hidden_states=torch.randn(2, 4, 8, 8, generator=g),
            encoder_hidden_states=torch.randn(2, 5, 32, generator=g),
            timestep=torch.tensor([10, 10]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample

    return forward


@pytest.fixture(scope="session")
def reload():
    """reload(model, folder): a float32 model of that class from `folder`, in memory of its own.

    A mapped file's tensors are aligned as it happens, and float32 products on a CPU differ in the last bit with that.
    """

    def load(model, folder):
        again = type(model).from_pretrained(folder, torch_dtype=torch.float32)
        for p in again.parameters():
            p.data = p.data.clone()
        return again

    return load
