"""What a quantized model consists of: which linears, sharing which input sites, with which tensors."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from .codebooks import PackedFormat, weight_format
from .config import DiRotQConfig
from .methods import WEIGHT_ONLY_FORMAT, method
from .patterns import ModulePatterns
from .transforms import SITE_DTYPES, Transform

logger = logging.getLogger(__name__)

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class SitePlan:
    """An input site: the linears that read one tensor, in module order; the first owns the site's tensors.

    Attributes:
        linears: full module names. in_features: K. out_features: N of each linear.
        rank: r. quantize_input: False for W4A16.
        method: name in `METHODS`; None for a modulation layer, which sees no transform.
        seed: of this site's random signs, derived from its name so that it does not depend on the other sites.
        plain_format: weight format where there is no method.
        activation_bits: of this site, where the configuration gives each its own.
    """

    linears: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    rank: int
    quantize_input: bool
    method: str | None
    seed: int
    plain_format: str = WEIGHT_ONLY_FORMAT
    activation_bits: int | None = None

    @property
    def owner(self) -> str:
        return self.linears[0]

    @property
    def transform(self) -> Transform | None:
        return method(self.method).input_transform if self.method else None

    @property
    def format(self) -> PackedFormat:
        return method(self.method).weights if self.method else weight_format(self.plain_format)

    def bits_of(self, config: DiRotQConfig) -> int:
        """Activation bits that the site starts with under a resolved `config`."""
        return (self.activation_bits or config.activation_bits or 4) if self.quantize_input else 16

    def scheme(self, config: DiRotQConfig) -> str:
        """For example W4A4."""
        return f"W{self.format.label}A{self.bits_of(config)}"

    @property
    def low_features(self) -> int:
        """K', the width of the 4-bit part."""
        t = self.transform
        return t.low_features(self.in_features, self.rank) if t else self.in_features

    @property
    def moment_bytes(self) -> int:
        """Bytes of the input's second moment in float32; of a site without a transform only its diagonal is kept."""
        return 4 * self.in_features ** (1 if self.transform is None else 2)

    def site_spec(self) -> Spec:
        """Shape and dtype of each tensor of the site."""
        t = self.transform
        shapes = t.shapes(self.in_features, self.rank) if t else {}
        return {name: (shape, SITE_DTYPES[name]) for name, shape in shapes.items()}

    def linear_spec(self, out_features: int) -> Spec:
        """Shape and dtype of each tensor of a linear with `out_features` rows, bias excepted."""
        k = self.low_features
        spec: Spec = {"weight": ((out_features, self.format.packed_columns(k)), torch.uint8)}
        if self.rank:
            spec["low_rank"] = ((out_features, self.rank), torch.bfloat16)
        return spec | {name: ((out_features, *tail), dtype) for name, (tail, dtype) in self.format.scales(k).items()}


def linear_at(model: torch.nn.Module, name: str) -> torch.nn.Linear:
    """The linear called `name`, typed as one."""
    return cast(torch.nn.Linear, model.get_submodule(name))


def site_seed(name: str, seed: int) -> int:
    """A 31-bit seed for the site called `name`; the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def sparing_float32(config: DiRotQConfig, model: torch.nn.Module) -> DiRotQConfig:
    """`config` for quantizing `model`, without the linears that its class asks diffusers to keep in float32.

    They go into `modules_to_not_convert` and so into the checkpoint, which must not change when a class's list does.
    """
    wanted = getattr(type(model), "_keep_in_fp32_modules", None) or []
    parts = {p for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) for p in n.split(".")}
    entries = list(config.modules_to_not_convert or [])
    more = [w for w in wanted if w in parts and w not in entries]
    return replace(config, modules_to_not_convert=entries + more) if more else config


def plan_sites(model: torch.nn.Module, config: DiRotQConfig) -> list[SitePlan]:
    """The sites of `model` under a resolved `config`, in module order.

    Raises:
        ValueError: the model's class has no recipe (the message names those that have), a LoRA is loaded into it, its
            projections are fused, or nothing is left to quantize.
    """
    from .architectures import recipe_for

    recipe = recipe_for(model)
    _refuse_adapted(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = ModulePatterns(config.modules_to_not_convert or [], model, "modules_to_not_convert")
    weight_only = ModulePatterns(config.weight_only_modules or [], model, "weight_only_modules")
    plans = []
    for group, modulation in recipe.groups(linears):
        if modulation and not config.quantize_modulation:
            continue
        kept = [n for n in group if n not in names]
        for members, quantize_input in _split(kept, weight_only, modulation):
            plan = _plan(members, linears, config, quantize_input, modulation)
            if plan is not None:
                plans.append(plan)
    plans = _with_bits(plans, config.site_activation_bits)
    if not plans:
        raise ValueError(
            f"no linear of {type(model).__name__} is left to quantize: every one is excluded by "
            "modules_to_not_convert or its width is not a multiple of 64"
        )
    clipped = {(p.in_features, p.rank) for p in plans if p.method and p.rank < (config.rank or 0)}
    if clipped:
        widths = ", ".join(f"{r} for {k} columns" for k, r in sorted(clipped))
        logger.warning("rank %d is more than half of some inputs' width; there it is %s", config.rank, widths)
    return plans


def average_activation_bits(plans: Sequence[SitePlan], config: DiRotQConfig) -> float | None:
    """Those of the configuration; where sites have their own, the mean over the linears with quantized inputs."""
    if config.site_activation_bits is None:
        return config.activation_bits
    bits = [plan.bits_of(config) for plan in plans if plan.quantize_input for _ in plan.linears]
    return sum(bits) / len(bits)


def _with_bits(plans: list[SitePlan], digits: str | None) -> list[SitePlan]:
    """The sites with activation bits of their own: one digit for each that quantizes its input, in order."""
    if digits is None:
        return plans
    quantized = sum(p.quantize_input for p in plans)
    if len(digits) != quantized:
        raise ValueError(
            f"site_activation_bits has {len(digits)} digits; the model has {quantized} sites with quantized inputs, "
            "and each needs one"
        )
    left = iter(digits)
    return [replace(p, activation_bits=int(next(left))) if p.quantize_input else p for p in plans]


def _refuse_adapted(model: torch.nn.Module) -> None:
    """The recipe's names would miss wrapped or fused linears, and leave them dense without a word."""
    for name, module in model.named_modules():
        if name.endswith(".base_layer"):
            raise ValueError(
                f"{name.removesuffix('.base_layer')} has a LoRA adapter; quantize first and load the adapter then, or "
                "merge it before (fuse_lora, then unload_lora_weights)"
            )
        if getattr(module, "fused_projections", False):
            raise ValueError(f"the projections of {name} are fused; call unfuse_qkv_projections() before quantizing")


def _split(kept: list[str], weight_only: ModulePatterns, modulation: bool) -> Iterator[tuple[list[str], bool]]:
    if modulation:
        yield kept, False
        return
    yield [n for n in kept if n not in weight_only], True
    yield [n for n in kept if n in weight_only], False


def _plan(
    members: list[str], linears: dict, config: DiRotQConfig, quantize_input: bool, modulation: bool
) -> SitePlan | None:
    if not members:
        return None
    k = linears[members[0]].in_features
    if any(linears[n].in_features != k for n in members):
        raise ValueError(f"linears of one site must have one input width: {members}")
    if k % 64:
        return None
    return SitePlan(
        linears=tuple(members),
        in_features=k,
        out_features=tuple(linears[n].out_features for n in members),
        rank=0 if modulation else config.site_rank(k),
        quantize_input=quantize_input,
        method=None if modulation else config.method,
        seed=site_seed(members[0], config.seed),
        plain_format=method(config.method).modulation_format,
    )
