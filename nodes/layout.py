"""The weight layout: all that a quantized linear needs, as one tensor that ComfyUI can move, count, pin and patch.

ComfyUI's dynamic VRAM streams a module's `weight` and `bias` and nothing else, so scales, low-rank branch and input
site travel inside the weight: a `QuantizedTensor` whose `Params` hold them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    register_layout_class,
    register_layout_op,
)

from ..dirotq_core.activations import ACTIVATION_FORMATS, fake_quantize, quantize_to_table
from ..dirotq_core.float4 import NVFP4
from ..dirotq_core.layout import SitePlan
from ..dirotq_core.linear import dense_product, dense_weight
from ..dirotq_core.rounding import round_nearest
from ..dirotq_core.transforms import SITE_DTYPES
from ..kernels import ops, quantize_nvfp4, reference

LAYOUT = "DiRotQLayout"

#: Tensors of a linear and of its site → field of `Params`. The packed codes are the QuantizedTensor's own data.
LINEAR_FIELDS = {"weight_scale": "scale", "block_scale": "block_scale", "low_rank": "low_rank"}
SITE_FIELDS = tuple(SITE_DTYPES)
#: A LoRA beside the 4-bit weights: W + up down, up [N, R] and down [R, K] in bfloat16.
SIDE_FIELDS = ("down", "up")

#: Rows that a patch moved by less than this share of their largest weight keep their codes; in 16 bit, where
#: ComfyUI may have unpacked the weight to, a rounding moves all of them by up to half as much.
UNCHANGED, UNCHANGED_16 = 1e-5, 2**-8


@dataclass(frozen=True)
class Params(BaseLayoutParams):
    """What stands beside the codes.

    Attributes:
        scale: weight_scale of `SitePlan.linear_spec`. block_scale, low_rank and the site's tensors: as there, None if
            absent.
        down, up: [R, K] and [N, R] bfloat16 of a LoRA, or None.
        plan: the linear's site. activation: key of `ACTIVATION_FORMATS`, None for 16 bit.
        plain: compute with PyTorch operations even where Triton kernels could.
    """

    block_scale: torch.Tensor | None = None
    low_rank: torch.Tensor | None = None
    basis: torch.Tensor | None = None
    signs: torch.Tensor | None = None
    permutation: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    rotation: torch.Tensor | None = None
    smooth: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    plan: SitePlan | None = None
    activation: str | None = None
    plain: bool = False

    def _tensor_fields(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]

    def linear(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors of `SitePlan.linear_spec`."""
        named = {name: getattr(self, field) for name, field in LINEAR_FIELDS.items()}
        return {"weight": codes} | {name: t for name, t in named.items() if t is not None}

    def site(self) -> dict[str, torch.Tensor]:
        """Tensors of `SitePlan.site_spec`."""
        return {name: getattr(self, name) for name in SITE_FIELDS if getattr(self, name) is not None}


class DiRotQLayout(QuantizedLayout):
    """4-bit weights with one input site; `quantize` only re-quantizes, because a basis needs calibration."""

    Params: TypeAlias = Params  # type: ignore[misc]

    @classmethod
    def quantize(
        cls, tensor: torch.Tensor, like: tuple[torch.Tensor, Params] | None = None, **_: Any
    ) -> tuple[torch.Tensor, Params]:
        """Round W [N, K] to nearest in the basis, the signs and the format of an existing weight.

        Rows equal to the existing weight's keep their codes; of the others, what lies in the 16-bit subspace stays
        exact. ComfyUI passes scale and seed for stochastic rounding, which 4-bit codes do not use.
        """
        if like is None:
            raise NotImplementedError("a DiRotQ weight is made by calibration; load it or use Quantize Model (DiRotQ)")
        codes, old = like
        plan = _plan(old)
        codes = codes.to(tensor.device)
        old = dataclasses.replace(old.to_device(tensor.device), down=None, up=None)
        target = tensor.float()
        before = dense_weight(plan, old.linear(codes), old.site())
        share = UNCHANGED if tensor.dtype == torch.float32 else UNCHANGED_16
        changed = (target - before).abs().amax(1) > share * before.abs().amax(1)
        if not bool(changed.any()):
            return codes, old
        moved, low_rank = target[changed], None
        if plan.transform is not None:
            moved, low_rank = plan.transform.fold(moved, old.site())
        rounded = round_nearest(moved, plan.format)
        codes = codes.clone()
        codes[changed] = plan.format.pack(rounded.codes)
        scales = {}
        for name, values in rounded.scales.items():
            scales[LINEAR_FIELDS[name]] = all_rows = getattr(old, LINEAR_FIELDS[name]).clone()
            all_rows[changed] = values.reshape(-1, *all_rows.shape[1:]).to(all_rows.dtype)
        new = dataclasses.replace(old, **scales)
        if old.low_rank is not None and low_rank is not None:
            branch = old.low_rank.clone()
            branch[changed] = low_rank.to(branch.dtype)
            new = dataclasses.replace(new, low_rank=branch)
        return codes, new

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"like": (qtensor._qdata, qtensor._params)}

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        return cls.dequantize32(qdata, params).to(params.orig_dtype)

    @classmethod
    def dequantize32(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """The dense W [N, K] in float32, a LoRA beside it included."""
        w = dense_weight(_plan(params), params.linear(qdata), params.site())
        if params.up is not None and params.down is not None:
            w.addmm_(params.up.float(), params.down.float())
        return w

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        p = qtensor._params
        return (qtensor._qdata, *(getattr(p, name) for name in p._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        """Suffix after "weight" → tensor. `operations.Linear` writes the checkpoint's own names instead."""
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}


def _plan(params: Params) -> SitePlan:
    if params.plan is None:
        raise ValueError("a DiRotQ weight without its site's plan")
    return params.plan


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y [..., N] in x's dtype for x [..., K]: the ops of `dirotq.kernels` on one weight."""
    p, codes = weight._params, weight._qdata
    plan, how = _plan(p), reference if p.plain else ops
    rows = x.reshape(-1, x.shape[-1])
    table = plan.format.table16
    fmt = None if p.activation is None else ACTIVATION_FORMATS[p.activation]
    z: torch.Tensor | None
    if table is not None:
        codes = plan.format.widened(codes, plan.low_features)
    if fmt is not None and fmt.float4 and isinstance(plan.format, NVFP4):
        v, z = _transform(rows, p, plan)
        y = how.linear_nvfp4(*quantize_nvfp4(v), z, codes, p.block_scale, p.scale, p.low_rank, bias, x.dtype)
    elif table is None:
        v, z = _transform(rows, p, plan)
        w = plan.format.values(plan.format.unpack(codes, plan.low_features), p.linear(codes))
        y = dense_product(v if fmt is None else fake_quantize(v, fmt), z, w, p.low_rank, bias)
    elif fmt is not None and fmt.lattice:
        a, scale, z = _lattice(rows, p, plan, how)
        y = how.linear_a8(a, scale, z, codes, p.scale, p.low_rank, bias, table, x.dtype)
    else:
        v, z = _transform(rows, p, plan)
        if fmt is not None:
            v = fake_quantize(v, fmt, p.shift)
        y = how.linear_a16(v, z, codes, p.scale.reshape(len(codes), -1), p.low_rank, bias, table)
    if p.up is not None and p.down is not None:
        y = y + ((rows @ p.down.to(x.dtype).T) @ p.up.to(x.dtype).T)
    return y.reshape(*x.shape[:-1], len(codes))


def _lattice(
    rows: torch.Tensor, p: Params, plan: SitePlan, how: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int8 [M, K], their scale [M], and z [M, r] or None."""
    fmt = ACTIVATION_FORMATS[p.activation or ""]
    if not fmt.op_mode or plan.transform is None:
        v, z = _transform(rows, p, plan)
        return (*quantize_to_table(v, fmt), z)
    a, scale, z = how.rotate_quantize(
        _permuted(rows, p), p.basis, p.signs, plan.transform.block(plan.in_features), p.activation
    )
    return a, scale, z if plan.rank else None


def _transform(rows: torch.Tensor, p: Params, plan: SitePlan) -> tuple[torch.Tensor, torch.Tensor | None]:
    if plan.transform is None or plan.transform.identity:
        return rows, None
    if plan.transform.kernel:  # as the diffusers backend does it: in float32 up to the end
        how = reference if p.plain else ops
        v, z = how.rotate(_permuted(rows, p), p.basis, p.signs, plan.transform.block(plan.in_features))
        return v, z if plan.rank else None
    v, z = plan.transform.apply(rows, p.site())
    return v, z.to(torch.bfloat16) if plan.rank else None


def _permuted(rows: torch.Tensor, p: Params) -> torch.Tensor:
    """Rows [M, K] in the order of columns that the ops see."""
    return rows if p.permutation is None else rows.index_select(1, p.permutation)


def _handle_linear(qt: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if isinstance(x, QuantizedTensor) or not isinstance(weight, QuantizedTensor):
        return QuantizedTensor._dequant_and_fallback(torch.ops.aten.linear.default, args, kwargs)
    return linear(x, weight, bias)


def register() -> None:
    """Make ComfyUI know the layout; a second call changes nothing."""
    register_layout_class(LAYOUT, DiRotQLayout)
    register_layout_op(torch.ops.aten.linear.default, DiRotQLayout)(_handle_linear)


register()
