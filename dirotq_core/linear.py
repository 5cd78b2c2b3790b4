"""The quantized linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..kernels import ops
from .activations import ACTIVATION_FORMATS
from .input_site import InputSite, PinnedDtypes, SiteOutput, as_dtype, empty_parameters, say_slower
from .layout import SitePlan
from .offloading import group_hook

#: Parts of a residual, and a gate or None.
Added = tuple[list[torch.Tensor], torch.Tensor | None]


class DiRotQLinear(PinnedDtypes, nn.Linear):
    """A linear with packed weights of 2 to 4 bits: y = z Lᵀ + s ⊗ t · (codes_v · codes_Wᵀ) + b, or z Lᵀ + v̂ Ŵᵀ + b.

    A subclass of `nn.Linear`, so that PEFT and diffusers treat it as one. `weight` is uint8 [N, K'·b/8], the
    first column in the lowest bits; `weight_scale`, `low_rank` and `bias` as in `SitePlan.linear_spec`.

    Args:
        plan: the linear's site. index: which of its linears this is. site: shared with the siblings.
        bias: whether it has one, of dtype `dtype`.
    """

    weight_scale: torch.Tensor
    block_scale: torch.Tensor
    low_rank: torch.Tensor | None

    def __init__(
        self, plan: SitePlan, index: int, site: InputSite, bias: bool,
        dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "meta",
    ):  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = plan.in_features, plan.out_features[index]
        self.plan = plan
        self.format, self.bits, self.table = plan.format, plan.format.bits, plan.format.table16
        self.low_features = plan.low_features
        self.compute_dtype = dtype  # PEFT casts a LoRA's input to it
        spec = plan.linear_spec(self.out_features)
        parameters = empty_parameters(spec, device)
        if bias:
            parameters["bias"] = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device), False)
        # ModelMixin.dtype is the first floating parameter: bias and low_rank before the float32 scale.
        self.scale_names = tuple(n for n in spec if n not in ("weight", "low_rank"))
        for name in ("weight", "bias", "low_rank", *self.scale_names):
            self.register_parameter(name, parameters.get(name))
        # Only the owner's state dict holds the site; the siblings must not register it a second time.
        if index == 0:
            self.input_site = site
        else:
            self._shared_site: list[InputSite] = [site]
        self.index = index
        site.members.append(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A model from torch.load in a new process: nothing that makes or loads one has run there.
        from .adaptations import teach_libraries

        teach_libraries()

    @property
    def site(self) -> InputSite:
        own = self._modules.get("input_site")
        return own if isinstance(own, InputSite) else self._shared_site[0]

    def extra_repr(self) -> str:
        rank = 0 if self.low_rank is None else self.low_rank.shape[1]
        kind = f"W{self.format.label}A{self.activation_bits}"
        return f"{self.in_features}, {self.out_features}, {kind}, rank={rank}, bias={self.bias is not None}"

    @property
    def branch(self) -> torch.Tensor | None:
        """L [N, r] of the checkpoint and beside it the columns of absorbed LoRAs, bfloat16."""
        return as_dtype(self._parameters["low_rank"], torch.bfloat16)

    @property
    def own_low_rank(self) -> torch.Tensor | None:
        """L [N, r] of the checkpoint, without the columns of absorbed LoRAs."""
        branch = self.branch
        return None if branch is None or not self.site.rank else branch[:, : self.site.rank]

    @property
    def codes(self) -> torch.Tensor:
        """The weight in the ops' layout, uint8 [N, K'/2]: itself at 4 bits, else widened for the moment."""
        if self.bits == 4:
            weight: Any = self._parameters["weight"]
            return weight
        say_slower(
            self.weight.device.type, f"{self.format.label}-bit weights are widened to 4 bits before every product"
        )
        return self.format.widened(self.weight, self.low_features)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """Tensors of `SitePlan.linear_spec` as a checkpoint holds them."""
        tensors = {"weight": self.weight} | {name: getattr(self, name) for name in self.scale_names}
        return tensors if self.own_low_rank is None else tensors | {"low_rank": self.own_low_rank}

    @property
    def activation_bits(self) -> int:
        """Bits of the activations at present; 16 where they are not quantized."""
        name = self.site.activation
        return 16 if name is None else ACTIVATION_FORMATS[name].bits

    def _trained(self, x: torch.Tensor) -> bool:
        """Whether the differentiable op computes it: integer codes carry no gradient."""
        return self.site.fused and torch.is_grad_enabled() and x.requires_grad

    def _input(self, x: torch.Tensor) -> Any:
        """What the site makes of x."""
        owner, trained = self.site.members[0], self._trained(x)
        if owner is not self and group_hook(owner) is not None and (trained or not self.site.remembers(x)):
            # Group offloading of single layers: the site's tensors come and go with their owner, so its hook must run.
            return owner(x, site_only=True)
        return self.site(x, True) if trained else self.site(x)

    def forward(
        self,
        x: torch.Tensor | tuple[torch.Tensor, ...],
        site_only: bool = False,
        gelu: bool = False,
        add: Added | None = None,
    ) -> Any:
        """x [..., K] bfloat16, float16 or float32 → [..., N] in x's dtype.

        x may lie in several tensors [..., K_i], which need not be put together then. site_only: what `_input` wants, of
        x in one piece.
        gelu: GELU in its tanh form of the result, rounded with it once where one kernel computes both.
        add: parts [B, S_i, N] of a residual, side by side along S, and a gate [B, N] or None, of x's dtype → residual +
        gate · result. Without gradients.
        """
        site = self.site
        if isinstance(x, tuple):
            trained = torch.is_grad_enabled() and any(part.requires_grad for part in x)
            if trained or not site.reads_parts or len({part.dtype for part in x}) > 1:
                x = torch.cat(x, -1)
            else:
                return self._of_parts(x, gelu, add)
        if site_only:
            return self._input(x)
        if self._trained(x):
            # Straight through. It holds rotation and product in one, so siblings do not share theirs while an adapter
            # is trained.
            own = self._input(x)
            y = ops.linear(
                own.x, own.basis, own.signs, site.block, site.activation, self.codes, self.weight_scale,
                self.own_low_rank, self.bias, self.table,
            )  # fmt: skip
            if own.absorbed is not None and self.low_rank is not None:
                y = y + own.absorbed @ self.low_rank[:, site.rank :].to(x.dtype).T
        elif site.fused and site.stacks(x):
            y, gelu = site.product(x, self.index, gelu), False
        elif (out := self._input(x)).blocks is not None:
            y = ops.linear_nvfp4(
                out.a, out.blocks, out.scale, out.z, self.weight, self.block_scale, self.weight_scale, self.branch,
                self.bias, x.dtype,
            )  # fmt: skip
        elif self.table is None:
            y = self._dense_product(out)
        elif out.scale is not None:
            y, gelu, add = self._lattice_product(out, x.dtype, gelu, add), False, None
        else:
            codes, scale, *rest = self.operands()
            y = ops.linear_a16(out.a, out.z, codes, scale.reshape(self.out_features, -1), *rest)
        if gelu:
            y = nn.functional.gelu(y, approximate="tanh")
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if add is None else _added(y, *add)

    def _of_parts(self, x: tuple[torch.Tensor, ...], gelu: bool, add: Added | None) -> torch.Tensor:
        y = self._lattice_product(self.site(x), x[0].dtype, gelu, add)
        return y.reshape(*x[0].shape[:-1], self.out_features)

    def operands(self) -> tuple[Any, ...]:
        """What the ops take of the linear: codes, their scale, L, the bias and the table."""
        own = self._parameters  # quicker than as attributes, which `nn.Module` searches for
        return self.codes, own["weight_scale"], self.branch, own["bias"], self.table

    def _lattice_product(self, out: SiteOutput, dtype: torch.dtype, gelu: bool, add: Added | None) -> torch.Tensor:
        if add is not None:
            return ops.linear_a8_add(out.a, out.scale, out.z, *self.operands(), *add)
        return ops.linear_a8(out.a, out.scale, out.z, *self.operands(), dtype, gelu)

    def _dense_product(self, out: SiteOutput) -> torch.Tensor:
        """Over Ŵ in the activations' dtype, for formats that no op multiplies."""
        say_slower(out.a.device.type, f"{self.format.name} weights are dequantized before every product")
        w = self.format.values(self.format.unpack(self.weight, self.low_features), self.stored)
        return dense_product(out.a, out.z, w, self.branch, self.bias)

    @torch.no_grad()
    def dequantized_weight(self) -> torch.Tensor:
        """The dense W [N, K] this linear stands for (with 16-bit activations), absorbed LoRAs included, float32."""
        dense = dense_weight(self.plan, self.stored, self.site.tensors())
        if self.site.absorbed is not None and self.low_rank is not None:
            dense.addmm_(self.low_rank[:, self.site.rank :].float(), self.site.absorbed.float())
        return dense


def _added(y: torch.Tensor, residual: list[torch.Tensor], gate: torch.Tensor | None) -> torch.Tensor:
    return torch.cat(residual, 1) + (y if gate is None else gate.unsqueeze(1) * y)


def dense_product(
    v: torch.Tensor, z: torch.Tensor | None, w: torch.Tensor, low_rank: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """y [M, N] = v Ŵᵀ + z Lᵀ + b in v's dtype, of v [M, K'] and Ŵ [N, K'] rounded to it; z Lᵀ in float32."""
    y = nn.functional.linear(v, w.to(v.dtype), None if bias is None else bias.to(v.dtype))
    return y if z is None or low_rank is None else y + (z.float() @ low_rank.float().T).to(v.dtype)


@torch.no_grad()
def dense_weight(plan: SitePlan, linear: Mapping[str, torch.Tensor], site: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The dense W [N, K] float32 that the tensors of one linear and of its site stand for.

    Args:
        plan: the linear's site. linear: tensors of `SitePlan.linear_spec`. site: of `SitePlan.site_spec`.
    """
    fmt = plan.format
    w = fmt.values(fmt.unpack(linear["weight"], plan.low_features), linear)
    return plan.transform.unfold(w, linear.get("low_rank"), site) if plan.transform else w
