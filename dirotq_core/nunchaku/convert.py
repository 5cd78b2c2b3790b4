"""Nunchaku's tensors → ours, site by site.

Nunchaku computes y = Q(x / λ) (q ∘ s)ᵀ + (x A) Bᵀ + b: that is our method `nunchaku`, with λ as `smooth`, A as `basis`,
B as `low_rank`; codes and scales are taken as they are. Three of its habits become ours:

- Behind GELU it quantizes x / λ + c, c = 0.171875 / λ, with unsigned codes, and b makes up for c. Here c is `shift`,
  which is taken off after rounding, so its share goes back to the bias: b + Σ_k q_k s_k c_k. The sum is the same.
- FLUX.1's single blocks have two linears where diffusers has one `proj_out`: their columns side by side.
- Modulation layers are stored with the rows of (shift, scale, gate, …) interleaved and with 1 added to the scales'
  biases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checkpoint import CheckpointError, check_names, check_tensor, checkpoint_tensors
from ..codebooks import GROUP_SIZE, PackedFormat
from ..config import DiRotQConfig
from ..inspect import skeleton
from ..layout import SitePlan, linear_at, plan_sites
from .packing import unpack_codes, unpack_down, unpack_rows, unpack_up, unpack_weight_only
from .source import GELU_SHIFT, NunchakuSource, open_nunchaku

logger = logging.getLogger(__name__)

METHOD = "nunchaku"
#: Ranks are kept in multiples of this.
RANK_STEP = 16
#: The zero point of weight-only codes: they stand for (u − 7) s.
ZERO_POINT = 7

#: Linear of a block → the stored linears that hold its columns, and whether they follow GELU. A stored linear may be
#: the rows of several.
_DOUBLE: dict[str, tuple[tuple[str, bool], ...]] = {
    **{f"attn.{n}": (("qkv_proj", False),) for n in ("to_q", "to_k", "to_v")},
    **{f"attn.{n}": (("qkv_proj_context", False),) for n in ("add_q_proj", "add_k_proj", "add_v_proj")},
    "attn.to_out.0": (("out_proj", False),),
    "attn.to_add_out": (("out_proj_context", False),),
    "ff.net.0.proj": (("mlp_fc1", False),),
    "ff.net.2": (("mlp_fc2", True),),
    "ff_context.net.0.proj": (("mlp_context_fc1", False),),
    "ff_context.net.2": (("mlp_context_fc2", True),),
}
_SINGLE: dict[str, tuple[tuple[str, bool], ...]] = {
    **{f"attn.{n}": (("qkv_proj", False),) for n in ("to_q", "to_k", "to_v")},
    "proj_mlp": (("mlp_fc1", False),),
    "proj_out": (("out_proj", False), ("mlp_fc2", True)),
}
_THIRDS = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
_BLOCKS = {
    "transformer_blocks": _DOUBLE,
    "single_transformer_blocks": _SINGLE,
}
#: Linear of a block → how many parameters of the block its rows hold, interleaved.
_MODULATION = {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3}
#: Norms of a block that Nunchaku keeps outside of its attention.
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


@dataclass(frozen=True)
class Linear:
    """A W4A4 linear, unpacked: codes uint8 [N, K], scale [N, K/64], smooth [K], down [K, r], up [N, r], bias [N].

    The bias is float64 until it is complete. shift: c [K], 0 where codes have a sign.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    smooth: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True)
class Imported:
    """tensors: under diffusers' names. config: the transformer's config.json, with quantization."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]


def import_nunchaku(path: str | Path, progress: bool = True) -> Imported:
    """Read a checkpoint of Nunchaku's, or of ``nunchaku_lite``, as a DiRotQ checkpoint of the method `nunchaku`.

    Raises:
        CheckpointError: it is damaged, NVFP4, no FLUX.1, or has something that our format has no place for.
    """
    source = open_nunchaku(Path(path))
    try:
        return _import(source, progress)
    except (ValueError, RuntimeError, LookupError) as error:  # shapes that cannot be unpacked, tensors that are missing
        what = f"tensor {error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{source.path}: {what}") from error


def _import(source: NunchakuSource, progress: bool) -> Imported:
    model = skeleton(source.config)
    probe = plan_sites(model, DiRotQConfig(method=METHOD, rank=RANK_STEP).resolved(calibrated=True))
    used: set[str] = set()
    modulation = {
        p.owner: _modulation(source, p.owner, linear_at(model, p.owner), p.format, used)
        for p in probe
        if p.method is None
    }
    exact = all(m is not None for m in modulation.values())
    if not exact:
        logger.warning(
            "%s: its modulation layers have zero points of their own, which dirotq's 4-bit formats lack; they are kept "
            "in 16 bit", source.path,
        )  # fmt: skip
    sites = {p.owner: _site(source, model, p, used) for p in tqdm(probe, "unpacking", disable=not progress) if p.method}
    rank = max(site["basis"].shape[1] for site, _ in sites.values())
    config = DiRotQConfig(method=METHOD, rank=rank, quantize_modulation=exact, activation_bits=4)
    config = config.resolved(calibrated=True)
    tensors: dict[str, torch.Tensor] = {}
    for plan in plan_sites(model, config):
        if plan.rank != rank and plan.method:
            raise CheckpointError(f"the low-rank branches need rank {rank}, more than half of {plan.owner}'s inputs")
        if plan.method:
            tensors |= _named(plan, *sites[plan.owner])
        else:
            found = modulation[plan.owner]
            assert found is not None
            tensors |= {f"{plan.owner}.{k}": t for k, t in found.items()}
    if not exact:
        tensors |= _dense_modulation(source, model, probe)
    tensors |= _rest(source, model, tensors, used)
    spec = checkpoint_tensors(model, plan_sites(model, config))
    check_names(tensors, spec)
    for name, tensor in tensors.items():
        check_tensor(name, tensor, *spec[name])
    return Imported(tensors, source.config | {"quantization_config": config.to_dict()})


def _named(plan: SitePlan, site: dict[str, torch.Tensor], linears: list[dict]) -> dict[str, torch.Tensor]:
    """Our tensors of a site, its branch padded with zeros to the model's rank."""
    out: dict[str, torch.Tensor] = {}
    for name, n, linear in zip(plan.linears, plan.out_features, linears, strict=True):
        spec = plan.linear_spec(n)
        linear = linear | {"low_rank": _padded(linear["low_rank"], plan.rank)}
        out |= {f"{name}.{k}": linear[k].to(spec[k][1]) for k in spec}
        out[f"{name}.bias"] = linear["bias"].to(linear["low_rank"].dtype)
    site = site | {"basis": _padded(site["basis"], plan.rank)}
    spec = plan.site_spec()
    return out | {f"{plan.owner}.input_site.{k}": site[k].to(spec[k][1]) for k in spec}


def _padded(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, rank - matrix.shape[1])).contiguous()


# --- W4A4 ---


def _site(
    source: NunchakuSource, model: torch.nn.Module, plan: SitePlan, used: set[str]
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Tensors of the site and of each linear. Branches that read the same input stand side by side."""
    linears = [_linear(source, name, linear_at(model, name), used) for name in plan.linears]
    smooth = linears[0].smooth
    for name, linear in zip(plan.linears, linears, strict=True):
        if not torch.equal(linear.smooth, smooth):
            raise CheckpointError(
                f"{plan.owner} and {name} read one input but smooth it differently; our format has one `smooth` for it"
            )
    branches: list[torch.Tensor] = []
    place = []
    for linear in linears:
        at = next((i for i, b in enumerate(branches) if torch.equal(b, linear.down)), len(branches))
        if at == len(branches):
            branches.append(linear.down)
        place.append(at)
    starts = [sum(b.shape[1] for b in branches[:i]) for i in range(len(branches) + 1)]
    out: list[dict[str, torch.Tensor]] = []
    for linear, at in zip(linears, place, strict=True):
        low_rank = linear.up.new_zeros(len(linear.up), starts[-1])
        low_rank[:, starts[at] : starts[at + 1]] = linear.up
        packed = plan.format.pack(linear.codes)
        out.append({"weight": packed, "weight_scale": linear.scale, "low_rank": low_rank, "bias": linear.bias})
    return {"smooth": smooth, "basis": torch.cat(branches, 1), "shift": linears[0].shift}, out


def _linear(source: NunchakuSource, name: str, dense: torch.nn.Linear, used: set[str]) -> Linear:
    stack, number, member = name.split(".", 2)
    if source.lite:
        parts: tuple[tuple[str, bool], ...] = ((member, False),)
        third = None
    else:
        parts = _BLOCKS[stack][member]
        third = _THIRDS.get(member.removeprefix("attn."))
    n, left = dense.out_features, dense.in_features
    found = []
    for i, (part, shifted) in enumerate(parts):
        # The first of several is as wide as the model, which `to_out`'s input is.
        k = left if i == len(parts) - 1 else n
        left -= k
        rows = slice(0, n) if third is None else slice(third * n, (third + 1) * n)
        found.append(_stored(source, f"{stack}.{number}.{part}", rows, k, shifted, used))
    if len(found) == 1:
        return found[0]
    return Linear(
        codes=torch.cat([f.codes for f in found], 1),
        scale=torch.cat([f.scale for f in found], 1),
        smooth=torch.cat([f.smooth for f in found]),
        down=torch.block_diag(*(f.down for f in found)),
        up=torch.cat([f.up for f in found], 1),
        bias=torch.stack([f.bias for f in found]).sum(0),
        shift=torch.cat([f.shift for f in found]),
    )


def _stored(source: NunchakuSource, prefix: str, rows: slice, k: int, shifted: bool, used: set[str]) -> Linear:
    """One stored linear's rows and its first K columns; the rest is padding."""
    names = source.names

    def take(field: str, unpack: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        name = f"{prefix}.{field}"
        used.add(name)
        tensor = source.tensors[name]
        if tensor.is_floating_point() == (field == "qweight"):
            raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}")
        return unpack(tensor)

    used |= {f"{prefix}.{field}" for field in ("smooth_orig", "smooth_factor_orig")}
    scale = take("wscales", unpack_rows)[rows, : k // GROUP_SIZE]
    if scale.dtype != torch.bfloat16:
        _say_rounded(source.path)
    down, up = _trimmed(take(names.down, unpack_down)[:k], take(names.up, unpack_up)[rows])
    smooth = take(names.smooth, unpack_rows)[:k].float()
    linear = Linear(
        codes=take("qweight", unpack_codes)[rows, :k], scale=scale, smooth=smooth, down=down, up=up,
        bias=take("bias", unpack_rows)[rows].double(), shift=(GELU_SHIFT if shifted else 0.0) / smooth,
    )  # fmt: skip
    n = rows.stop - rows.start
    rank = linear.down.shape[1]
    wanted = {
        "codes": (n, k),
        "scale": (n, k // GROUP_SIZE),
        "smooth": (k,),
        "down": (k, rank),
        "up": (n, rank),
        "bias": (n,),
    }
    _check_shapes(prefix, linear.__dict__, wanted)
    if not shifted:
        return linear
    signed = ((linear.codes.double() + 8) % 16 - 8).unflatten(1, (-1, GROUP_SIZE)) * linear.scale.double()[..., None]
    return replace(linear, bias=linear.bias + signed.flatten(1) @ linear.shift.double())


def _check_shapes(prefix: str, found: Mapping[str, torch.Tensor | None], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for part, shape in wanted.items():
        tensor = found[part]
        if tensor is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(f"the {part} of {prefix} have shape {tuple(tensor.shape)}, not {shape}")


def _trimmed(down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the columns, sixteen at a time, that are zero on either side: padding."""
    blocks = range(0, down.shape[1], RANK_STEP)
    kept = [b for b in blocks if down[:, b : b + RANK_STEP].any() and up[:, b : b + RANK_STEP].any()]
    columns = [c for b in kept for c in range(b, min(b + RANK_STEP, down.shape[1]))]
    return down[:, columns], up[:, columns]


@cache
def _say_rounded(path: Path) -> None:
    logger.warning("%s: its scales are no bfloat16, which ours are; they are rounded", path)


# --- W4A16 ---


def _weight_only(
    source: NunchakuSource, name: str, dense: torch.nn.Linear
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """codes [N, K], scale [N, K/64], zero [N, K/64], bias [N], in diffusers' order of rows."""
    codes = unpack_weight_only(source.tensors[f"{name}.qweight"])
    groups = codes.shape[1] // GROUP_SIZE
    scale, zero = (source.tensors[f"{name}.{f}"][:groups].T for f in ("wscales", "wzeros"))
    bias = source.tensors.get(f"{name}.bias")
    n, k = dense.out_features, dense.in_features
    wanted = {"codes": (n, k), "scale": (n, k // GROUP_SIZE), "zero": (n, k // GROUP_SIZE), "bias": (n,)}
    _check_shapes(name, {"codes": codes, "scale": scale, "zero": zero, "bias": bias}, wanted)
    if source.lite:
        return codes, scale, zero, bias
    parts = _MODULATION[name.split(".", 2)[2]]

    def in_order(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (-1, parts)).transpose(0, 1).flatten(0, 1)

    if bias is not None:
        bias = in_order(bias).unflatten(0, (parts, -1)).clone()
        bias[[1, 4] if parts == 6 else [1]] -= 1  # the scales, to which the model adds 1 itself
        bias = bias.flatten()
    return in_order(codes), in_order(scale), in_order(zero), bias


def _modulation(
    source: NunchakuSource, name: str, dense: torch.nn.Linear, fmt: PackedFormat, used: set[str]
) -> dict[str, torch.Tensor] | None:
    """Our tensors of a modulation linear; None where its zero points are not all `ZERO_POINT`."""
    used |= {f"{name}.{f}" for f in ("qweight", "wscales", "wzeros", "bias", "lora_down", "lora_up")}
    if f"{name}.qweight" not in source.tensors:
        return None
    codes, scale, zero, bias = _weight_only(source, name, dense)
    off = zero.float() + ZERO_POINT * scale.float()
    if (off.abs() > ZERO_POINT * scale.float().abs() * 2**-7).any():
        return None
    out = {"weight": fmt.pack(codes), "weight_scale": scale.to(torch.bfloat16).contiguous()}
    return out if bias is None else out | {"bias": bias.contiguous()}


def _dense_modulation(source: NunchakuSource, model: torch.nn.Module, plans: list[SitePlan]) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for name in (p.owner for p in plans if p.method is None):
        if f"{name}.qweight" not in source.tensors:
            out[f"{name}.weight"], out[f"{name}.bias"] = (source.tensors[f"{name}.{f}"] for f in ("weight", "bias"))
            continue
        codes, scale, zero, bias = _weight_only(source, name, linear_at(model, name))
        wide = codes.float().unflatten(1, (-1, GROUP_SIZE)) * scale.float()[..., None] + zero.float()[..., None]
        out[f"{name}.weight"] = wide.flatten(1).to(scale.dtype)
        if bias is not None:
            out[f"{name}.bias"] = bias.contiguous()
    return out


# --- what is not quantized ---


def _rest(
    source: NunchakuSource, model: torch.nn.Module, done: dict[str, torch.Tensor], used: set[str]
) -> dict[str, torch.Tensor]:
    """The dense tensors under diffusers' names. CheckpointError for one that nothing knows."""
    known = set(model.state_dict())
    out = {}
    for name, tensor in source.tensors.items():
        if name in used or name in done:
            continue
        ours = name
        if not source.lite:
            stack, _, rest = name.partition(".")
            number, _, member = rest.partition(".")
            if stack in _BLOCKS and member.split(".")[0] in _NORMS:
                ours = f"{stack}.{number}.attn.{member}"
        if ours not in known:
            raise CheckpointError(f"tensor {name!r} has no place in {type(model).__name__}")
        out[ours] = tensor
    return out
