"""Tiny transformers of both architectures, random weights, saved dense and quantized without data."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

import dirotq


def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=256,
        sample_size=16,
        caption_channels=64,
        use_additional_conditions=False,
    )


def flux():
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


def inputs(model, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    if type(model).__name__ == "PixArtTransformer2DModel":
        return {
            "hidden_states": randn(1, 4, 16, 16),
            "encoder_hidden_states": randn(1, 7, 64),
            "timestep": torch.tensor([500]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    return {
        "hidden_states": randn(1, 64, 16),
        "encoder_hidden_states": randn(1, 7, 64),
        "pooled_projections": randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def run(model):
    with torch.no_grad():
        return model(**inputs(model, model.dtype))[0]


def sqnr(y, reference):
    reference, y = reference.double(), y.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - y).square().sum()))


class Case:
    """One architecture: its class, its dense folder, its data-free quantized folder."""

    def __init__(self, make, folder):
        torch.manual_seed(0)
        model = make().to(torch.bfloat16)
        self.cls = type(model)
        self.dense = folder / "dense"
        self.quantized = folder / "quantized"
        model.save_pretrained(self.dense)
        self.on_the_fly().save_pretrained(self.quantized)

    def on_the_fly(self, config=None, **kwargs):
        return self.cls.from_pretrained(
            self.dense, quantization_config=config or dirotq.DiRotQConfig(), torch_dtype=torch.bfloat16, **kwargs
        )

    def load(self, folder=None, **kwargs):
        return self.cls.from_pretrained(folder or self.quantized, **{"torch_dtype": torch.bfloat16, **kwargs})


@pytest.fixture(scope="session", params=[pixart, flux], ids=["pixart", "flux"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="session")
def pixart_case(tmp_path_factory):
    return Case(pixart, tmp_path_factory.mktemp("pixart-only"))


@pytest.fixture(scope="session")
def flux_case(tmp_path_factory):
    return Case(flux, tmp_path_factory.mktemp("flux-only"))


@pytest.fixture(scope="session")
def helpers():
    """`run(model)` → output on fixed inputs; `sqnr(y, reference)` in dB; `inputs(model)`."""
    from types import SimpleNamespace

    return SimpleNamespace(run=run, sqnr=sqnr, inputs=inputs)
