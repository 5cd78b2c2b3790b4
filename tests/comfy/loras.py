"""LoRAs for the small FLUX.1, and how ComfyUI's own loader puts them on a MODEL."""

import torch

from . import models

WIDTH = models.FLUX_WIDTH


def lora(seed, scale=0.3, rank=8):
    """diffusers' names: fused q and v of the double block, a v and an MLP of a single block, and unfused linears."""
    g = torch.Generator().manual_seed(seed)
    targets = {
        "transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
        "transformer_blocks.0.attn.to_v": (WIDTH, WIDTH),
        "transformer_blocks.0.ff.net.0.proj": (WIDTH, 4 * WIDTH),
        "single_transformer_blocks.1.attn.to_v": (WIDTH, WIDTH),
        "single_transformer_blocks.1.proj_mlp": (WIDTH, 4 * WIDTH),
        "single_transformer_blocks.0.proj_out": (5 * WIDTH, WIDTH),
    }
    state = {}
    for name, (k, n) in targets.items():
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, k, generator=g) * k**-0.5
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(n, rank, generator=g) * scale
    return state


def with_core_loras(core, patcher, *strengths):
    for seed, strength in enumerate(strengths):
        patcher = core.comfy.sd.load_lora_for_models(patcher, None, lora(seed), strength, 0)[0]
    return patcher
