"""The transformers that `step.py` times: at their real shape with random weights, and quantized by several packages."""

import copy
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch._inductor.config
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from dirotq.dirotq_core.backend import attach_quantizer
from dirotq.dirotq_core.build import solved_modules, swapped
from dirotq.dirotq_core.codebooks import WeightFormat
from dirotq.dirotq_core.config import DiRotQConfig
from dirotq.dirotq_core.input_site import SiteMemo
from dirotq.dirotq_core.layout import SitePlan, linear_at, plan_sites
from dirotq.dirotq_core.solve import SolvedSite
from dirotq.dirotq_core.transforms import random_signs
from dirotq.kernels import pack_int4

FLUX_DEV: dict[str, Any] = {"guidance_embeds": True}  # the class's defaults are FLUX.1-dev's
FLUX_TINY: dict[str, Any] = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 64, "num_attention_heads": 4,
    "joint_attention_dim": 64, "pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
PIXART_SIGMA: dict[str, Any] = {
    "sample_size": 128, "caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False,
}  # fmt: skip
PIXART_TINY: dict[str, Any] = {
    "sample_size": 16, "caption_channels": 64, "use_additional_conditions": False, "num_attention_heads": 4,
    "attention_head_dim": 64, "num_layers": 3, "cross_attention_dim": 256,
}  # fmt: skip
BLOCKS = {"flux": ("transformer_blocks", "single_transformer_blocks"), "pixart": ("transformer_blocks",)}


def sqnr(y: Tensor, reference: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    y, reference = y.double(), reference.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - y).square().sum().clamp(min=1e-30)))


def setting(*packages: str) -> dict[str, Any]:
    """What a table was measured with: GPU and versions, those of `packages` None where they are not installed."""
    import triton

    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        **dict.fromkeys(packages),
    }
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@torch.no_grad()
def dense(name: str, tiny: bool, device: str) -> nn.Module:
    """The bf16 transformer `name`, its random weights drawn on `device`."""
    cls: Any = FluxTransformer2DModel if name == "flux" else PixArtTransformer2DModel
    config = (FLUX_TINY if tiny else FLUX_DEV) if name == "flux" else (PIXART_TINY if tiny else PIXART_SIGMA)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = cls(**config)
    torch.set_default_dtype(default)
    for key, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5)
        elif key.endswith("bias"):
            p.normal_(0, 0.1)
        else:
            p.fill_(1)
    model._repeated_blocks = sorted({type(block).__name__ for stack in BLOCKS[name] for block in getattr(model, stack)})
    return model.to(torch.bfloat16).eval()


def inputs(name: str, tiny: bool, pixels: int, batch: int, device: str) -> dict[str, Any]:
    """Arguments of one step at pixels × pixels; PixArt runs both branches of guidance, so twice the batch."""
    make = torch.Generator(device).manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=device).bfloat16()

    if name == "flux":
        side, text = (8, 32) if tiny else (pixels // 16, 512)
        channels, joint, pooled = (16, 64, 64) if tiny else (64, 4096, 768)
        ids = torch.zeros(side * side, 3, device=device)
        ids[:, 1] = torch.arange(side, device=device).repeat_interleave(side)
        ids[:, 2] = torch.arange(side, device=device).repeat(side)
        return {
            "hidden_states": randn(batch, side * side, channels),
            "encoder_hidden_states": randn(batch, text, joint),
            "pooled_projections": randn(batch, pooled),
            "timestep": torch.full((batch,), 0.5, device=device).bfloat16(),
            "guidance": torch.full((batch,), 3.5, device=device),
            "img_ids": ids.bfloat16(),
            "txt_ids": torch.zeros(text, 3, device=device).bfloat16(),
            "return_dict": False,
        }
    side, text, channels = (16, 12, 64) if tiny else (pixels // 8, 300, 4096)
    mask = torch.ones(2 * batch, text, device=device)
    mask[:batch, text // 4 :] = 0  # the negative prompt is short
    return {
        "hidden_states": randn(2 * batch, 4, side, side),
        "encoder_hidden_states": randn(2 * batch, text, channels),
        "encoder_attention_mask": mask.bfloat16(),
        "timestep": torch.full((2 * batch,), 500, device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


# --- this package -------------------------------------------------------------------------------------------------


@torch.no_grad()
def dirotq(model: nn.Module, config: DiRotQConfig) -> nn.Module:
    """`model` with its linears quantized in place: random subspaces, weights rounded to nearest.

    What calibration would choose better is random; shapes, formats, modules and memory are those of a calibrated model.
    """
    config = replace(config, rounding="nearest").resolved(calibrated=True)
    memo = SiteMemo()
    for plan in plan_sites(model, config):
        weights = [linear_at(model, n).weight for n in plan.linears]
        with swapped(model, solved_modules(model, plan, random_site(plan, weights), config, memo)):
            pass
    attach_quantizer(model, config, torch.bfloat16)
    return model.eval()


def random_site(plan: SitePlan, weights: list[Tensor]) -> SolvedSite:
    """What a solver would make of the site's weights [N, K], with a random subspace and weights rounded to nearest."""
    device, k, r = weights[0].device, plan.in_features, plan.rank
    site: dict[str, Tensor] = {}
    for name, (shape, dtype) in plan.site_spec().items():
        if name == "signs":
            site[name] = random_signs(k, plan.seed).to(device)
        elif name == "basis":
            site[name] = (
                torch.linalg.qr(torch.randn(shape, device=device))[0].to(dtype).contiguous()
            )  # as a file has it
        else:  # the published rotation: the complement of the subspace in a random basis of everything
            full = _orthogonal(k, str(device))
            site = {"rotation": full[:, : k - r].contiguous(), "basis": full[:, k - r :].contiguous()}
            break
    linears = []
    for n, w in zip(plan.out_features, weights, strict=True):
        target, low_rank = w.float(), None
        if plan.transform is not None:
            target, low_rank = plan.transform.fold(target, site)
        spec = plan.linear_spec(n)
        tensors = _nearest(target, plan.format)
        if low_rank is not None and r:
            tensors["low_rank"] = low_rank
        linears.append({key: t.to(spec[key][1]).reshape(spec[key][0]).contiguous() for key, t in tensors.items()})
    return SolvedSite(site, linears, [])


@cache
def _orthogonal(k: int, device: str) -> Tensor:
    return torch.linalg.qr(torch.randn(k, k, device=device))[0].bfloat16()


def _nearest(target: Tensor, fmt: WeightFormat) -> dict[str, Tensor]:
    groups = target.unflatten(1, (fmt.scale_columns(target.shape[1]), -1))
    scale = groups.square().mean(2, keepdim=True).sqrt() / fmt.rms
    codes = torch.cat([fmt.encode(rows.flatten(1)) for rows in (groups / scale).split(1024)])
    return {"weight": pack_int4(codes), "weight_scale": scale.squeeze(2)}


@torch.no_grad()
def dequantized(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """A copy of the dense `model` with the weights that `quantized` stands for."""
    twin = copy.deepcopy(model)
    for name, module in quantized.named_modules():
        if hasattr(module, "dequantized_weight"):
            linear_at(twin, name).weight.copy_(module.dequantized_weight())
    return twin


# --- what people would use instead --------------------------------------------------------------------------------


# What torchao sets for the whole process when it quantizes (tuned elementwise kernels, minutes to compile, not ten
# seconds): for its models only, here.
TORCHAO_INDUCTOR = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
    "triton.unique_kernel_names": True,
}


def inductor(name: str) -> Any:
    """The compiler's settings that the model `name` is compiled with, as a context."""
    return torch._inductor.config.patch(TORCHAO_INDUCTOR if name.startswith("torchao") else {})


def _torchao(model: nn.Module, config: Any, chosen: set[str]) -> nn.Module:
    from torchao.quantization import quantize_

    with inductor("torchao"):  # and restored after it
        quantize_(model, config, filter_fn=lambda module, name: name in chosen)
    return model


def torchao_fp8(model: nn.Module, chosen: set[str]) -> nn.Module:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return _torchao(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), chosen)


def torchao_int8(model: nn.Module, chosen: set[str]) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(model, Int8DynamicActivationInt8WeightConfig(), chosen)


def bnb_nf4(model: nn.Module, chosen: set[str]) -> nn.Module:
    """All linears of the blocks, modulation included, as `BitsAndBytesConfig(load_in_4bit=True)` has it."""
    inside = {n for stacks in BLOCKS.values() for n in stacks}
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and name.split(".")[0] in inside:
            model.set_submodule(name, nf4_linear(old))
    return model


def nf4_linear(old: nn.Linear) -> nn.Module:
    """bitsandbytes' linear with the weight of `old` in NF4."""
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        old.in_features, old.out_features, old.bias is not None, torch.bfloat16, quant_type="nf4", device="meta"
    )
    weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
    new.weight = weight._quantize(old.weight.device)
    new.bias = old.bias
    return new


PEERS: dict[str, Callable[[nn.Module, set[str]], nn.Module]] = {
    "torchao-fp8": torchao_fp8,
    "torchao-int8": torchao_int8,
    "bnb-nf4": bnb_nf4,
}


def four_bit_linears(model: nn.Module) -> set[str]:
    """The linears that this package multiplies with quantized activations; torchao gets the same."""
    plans = plan_sites(model, DiRotQConfig().resolved(calibrated=True))
    return {name for plan in plans if plan.quantize_input for name in plan.linears}
