"""Small models in the shapes that ComfyUI accepts: a trained FLUX.1, a random PixArt and random VAEs.

ComfyUI fixes FLUX.1's head width (128), RoPE axes and latent channels (16), and PixArt's width (1152) and heads (16),
so the embedded trained models do not fit; only depth, FLUX.1's width and its text widths are free.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import save_file

import dirotq

from .training import train

FLUX, PIXART = "tiny-flux.safetensors", "tiny-pixart.safetensors"
#: Diffusers folders under models/diffusion_models, quantized without data.
FLUX_4BIT, PIXART_4BIT = "tiny-flux-dirotq", "tiny-pixart-dirotq"
VAE_16, VAE_4 = "tiny-vae-16.safetensors", "tiny-vae-4.safetensors"
LORA = "tiny-lora.safetensors"
FLUX_WIDTH = 256


def make_all(models: Path) -> None:
    """Write every model below into ComfyUI's `models` folder."""
    for folder in ("diffusion_models", "vae", "loras"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    _transformer(flux(), models / "diffusion_models", FLUX, FLUX_4BIT)
    _transformer(pixart(), models / "diffusion_models", PIXART, PIXART_4BIT)
    save_file(vae(16), models / "vae" / VAE_16)
    save_file(vae(4), models / "vae" / VAE_4)
    save_file(lora(), models / "loras" / LORA)


def _transformer(model: torch.nn.Module, folder: Path, dense: str, quantized: str) -> None:
    # ComfyUI's loader converts diffusers' names by itself.
    save_file(model.state_dict(), folder / dense)
    source = folder.parent / "dense" / quantized
    model.save_pretrained(source)
    config = dirotq.DiRotQConfig()
    model = type(model).from_pretrained(source, quantization_config=config, torch_dtype=torch.bfloat16)
    model.save_pretrained(folder / quantized)


def flux() -> FluxTransformer2DModel:
    """One double and two single blocks, 2 heads, 16 latent channels in patches of 2 × 2; bf16, trained on `scenes`."""
    model = _flux()
    model.load_state_dict(_trained())
    return model.to(torch.bfloat16)


@cache
def _trained() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _flux()
        *_, loss = train(model)
    assert loss < 0.3, f"training ended at a loss of {loss}"
    return model.state_dict()


def _flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=FLUX_WIDTH // 128,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )


def pixart() -> PixArtTransformer2DModel:
    """Two blocks at the only width that ComfyUI knows, 1152; bf16, 57 million parameters."""
    model = PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=1152,
        sample_size=64,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    return _randomize(model)


def _randomize(model):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "scale_shift_table" not in name:
                p.normal_(generator=g).mul_(p[0].numel() ** -0.5)
            elif name.endswith("bias") or "scale_shift_table" in name:
                p.normal_(generator=g).mul_(0.02)
    return model.to(torch.bfloat16)


def vae(latent_channels: int) -> dict[str, torch.Tensor]:
    """TAESD's layers (factor 8, width 64), which ComfyUI's VAELoader reads from one file; random."""
    g = torch.Generator().manual_seed(latent_channels)
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, n_in: int, n_out: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(n_out, n_in, 3, 3, generator=g) * (2 / (9 * n_in)) ** 0.5
        if bias:
            state[f"{name}.bias"] = torch.zeros(n_out)

    def block(name: str) -> None:
        for i in (0, 2, 4):
            conv(f"{name}.conv.{i}", 64, 64)
        state[f"{name}.conv.4.weight"] *= 0.3  # keeps a dozen residual blocks from growing

    # Position in the Sequential → what stands there; the gaps are activations and upsamplings.
    conv("taesd_encoder.0", 3, 64)
    for i in range(1, 14):
        if i in (2, 6, 10):
            conv(f"taesd_encoder.{i}", 64, 64, bias=False)
        else:
            block(f"taesd_encoder.{i}")
    conv("taesd_encoder.14", 64, latent_channels)
    conv("taesd_decoder.1", latent_channels, 64)
    for i in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        block(f"taesd_decoder.{i}")
    for i in (7, 12, 17):
        conv(f"taesd_decoder.{i}", 64, 64, bias=False)
    conv("taesd_decoder.19", 64, 3)
    state["taesd_decoder.19.weight"] *= 0.3
    state["taesd_decoder.19.bias"] += 0.5  # mid-grey rather than clipped
    state["vae_scale"], state["vae_shift"] = torch.ones(()), torch.zeros(())
    return state


def lora(rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA for `flux` in diffusers' names: split q, k, v of the double block, and a single block's q and proj_mlp."""
    g = torch.Generator().manual_seed(7)
    targets = {f"transformer_blocks.0.attn.to_{k}": FLUX_WIDTH for k in "qkv"}
    targets |= {"single_transformer_blocks.0.attn.to_q": FLUX_WIDTH, "transformer_blocks.0.attn.to_out.0": FLUX_WIDTH}
    targets["single_transformer_blocks.0.proj_mlp"] = 4 * FLUX_WIDTH
    state = {}
    for name, out_features in targets.items():
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, FLUX_WIDTH, generator=g) * FLUX_WIDTH**-0.5
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(out_features, rank, generator=g) * 0.3
    return {k: v.to(torch.bfloat16) for k, v in state.items()}
