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


# --- formats of files ---------------------------------------------------------------------------------------------

#: Fused linears and others of FLUX.1 in the names of its original repository → inputs and outputs, in widths.
FLUX_LAYERS = {
    "double_blocks.0.img_attn.qkv": (1, 3),
    "double_blocks.0.txt_attn.qkv": (1, 3),
    "double_blocks.0.img_mlp.2": (4, 1),
    "double_blocks.0.img_mod.lin": (1, 6),
    "single_blocks.0.linear1": (1, 7),
    "single_blocks.1.linear1": (1, 7),
    "single_blocks.1.linear2": (5, 1),
}
#: Linears of PixArt in the names of its original repository, and in those of diffusers.
PIXART_WIDTH = 1152
PIXART_LAYERS = {"blocks.0.attn.qkv": (1, 3), "blocks.1.cross_attn.kv_linear": (1, 2), "blocks.1.mlp.fc2": (4, 1)}
PIXART_DIFFUSERS = {
    "transformer_blocks.0.attn1.to_q": (1, 1),
    "transformer_blocks.0.attn1.to_v": (1, 1),
    "transformer_blocks.1.attn2.to_q": (1, 1),
    "transformer_blocks.1.attn2.to_k": (1, 1),
    "transformer_blocks.1.ff.net.0.proj": (1, 4),
}


def factors(layers, width, rank=8, scale=0.3, seed=0):
    """Name → (A [rank, K], B [N, rank]) for layers of (inputs, outputs) in widths."""
    g = torch.Generator().manual_seed(seed)
    for name, (k, n) in layers.items():
        a, b = torch.randn(rank, k * width, generator=g), torch.randn(n * width, rank, generator=g)
        yield name, a * (k * width) ** -0.5, b * scale


def peft(layers, width, prefix, scale=0.4):
    """lora_A and lora_B behind a prefix: `transformer.`, `diffusion_model.`, `base_model.model.`."""
    state = {}
    for name, a, b in factors(layers, width, scale=scale):
        state |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
    return state


def kohya(layers, width, prefix="lora_unet_", scale=0.8):
    """Names joined by underscores, with a strength in each layer."""
    state = {}
    for name, a, b in factors(layers, width, scale=scale):
        key = prefix + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(4.0)}
    return state


def lokr(layers, width, prefix="lycoris_", rank=None, scale=1.0):
    """Kronecker products of full rank; with `rank` the larger factor is itself a product."""
    g = torch.Generator().manual_seed(5)
    state = {}
    for name, (k, n) in layers.items():
        key = prefix + name.replace(".", "_")
        state[f"{key}.lokr_w1"] = torch.randn(n * 8, 4, generator=g) * 0.5
        rows, columns = width // 8, k * width // 4
        if rank is None:
            state[f"{key}.lokr_w2"] = torch.randn(rows, columns, generator=g) * scale * (4 * columns) ** -0.5
        else:
            state[f"{key}.lokr_w2_a"] = torch.randn(rows, rank, generator=g) * scale / 4
            state[f"{key}.lokr_w2_b"] = torch.randn(rank, columns, generator=g) * (4 * columns) ** -0.5
            state[f"{key}.alpha"] = torch.tensor(2.0 * rank)
    return state


def loha(layers, width, prefix="lora_unet_", rank=4):
    """The elementwise product of two LoRAs."""
    state = {}
    pairs = zip(factors(layers, width, rank, 1.0, 1), factors(layers, width, rank, 0.3, 2), strict=True)
    for (name, a1, b1), (_, a2, b2) in pairs:
        key = prefix + name.replace(".", "_")
        state |= {f"{key}.hada_w1_a": b1, f"{key}.hada_w1_b": a1, f"{key}.hada_w2_a": b2}
        state |= {f"{key}.hada_w2_b": a2 * a2.shape[1] ** 0.5, f"{key}.alpha": torch.tensor(float(rank))}
    return state


def control(width, channels, head=128):
    """A Control LoRA as Black Forest Labs writes it: biases, norms, and an input of twice the channels."""
    state = {}
    for name, a, b in factors(FLUX_LAYERS, width):
        state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_B.bias": 0.1 * b[:, 0]}
    g = torch.Generator().manual_seed(6)
    state["img_in.lora_A.weight"] = torch.randn(8, channels, generator=g) * channels**-0.5
    state["img_in.lora_B.weight"] = torch.randn(width, 8, generator=g) * 0.3
    state["img_in.lora_B.bias"] = torch.randn(width, generator=g) * 0.1
    for block in ("double_blocks.0.img_attn.", "double_blocks.0.txt_attn.", "single_blocks.0."):
        for which in ("query", "key"):
            state[f"{block}norm.{which}_norm.scale"] = torch.linspace(0.5, 1.5, head)
    return state
