"""The quantized linear and the input site it shares with its siblings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels import ops, quantize_nvfp4
from .activations import ACTIVATION_FORMATS, fake_quantize, quantize_to_table
from .derived import Derived
from .float4 import NVFP4
from .layout import SitePlan, Spec
from .offloading import group_hook
from .transforms import SITE_DTYPES, hadamard_block

logger = logging.getLogger(__name__)


class SiteOutput(NamedTuple):
    """What siblings share of one input x [M, K].

    a: int8 lattice codes [M, K'], or the 4-bit part in x's dtype where no fused kernel applies.
    scale: float32 [M] of the codes, None with a float `a`. z: bfloat16 [M, r], the 16-bit part; [M, r + q] where
    LoRAs of q rows in all are absorbed. blocks: uint8 [M, K'/16], block scales of NVFP4, whose `a` is uint8 [M, K'/2].
    """

    a: torch.Tensor
    scale: torch.Tensor | None
    z: torch.Tensor | None
    blocks: torch.Tensor | None = None


class TrainedInput(NamedTuple):
    """What the differentiable op reads of a site: x [M, K] in its order of columns, U, D; x Aᵀ of absorbed LoRAs."""

    x: torch.Tensor
    basis: torch.Tensor | None
    signs: torch.Tensor | None
    absorbed: torch.Tensor | None


class SiteMemo:
    """One slot per model for the last site's result.

    Siblings are called one after the other with the same tensor, so one slot is enough, and it bounds what stays
    alive when a custom attention processor skips a sibling.
    """

    __slots__ = ("derived", "entry")

    def __init__(self) -> None:
        self.entry: tuple | None = None
        self.derived: list[Derived] = []  # of the model's sites; see `derived`

    def __deepcopy__(self, memo: dict) -> SiteMemo:
        return SiteMemo()  # results belong to the forward that made them


def _empty(spec: Spec, device: torch.device | str) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        for name, (shape, dtype) in spec.items()
    }


def _as(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`tensor` in the dtype of its format. Training scripts cast small parameters, or all, to float32 in place."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


class _PinnedDtypes(nn.Module):
    """Of dtypes that the format fixes: ``.bfloat16()``, ``.double()`` and the like cast the bias and nothing else."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        free = self._parameters.get("bias")

        def pinned(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if tensor is free or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(pinned, recurse)


def _say_slower(kind: str, what: str) -> None:
    """Said once: PyTorch operations where a kernel could be."""
    if not torch.compiler.is_compiling():  # a log line would break the graph
        _say_once(kind, what)


@cache
def _say_once(kind: str, what: str) -> None:
    if kind != "cpu":  # everything is PyTorch there
        logger.warning("dirotq: %s; this works in plain PyTorch and is slower than our kernels for 4 bits", what)


class InputSite(_PinnedDtypes):
    """Rotates and quantizes an input once for all linears that read it.

    Parameters are those of `SitePlan.site_spec`: `basis` bfloat16 [K, r], `signs` int8 [K], …; and `absorbed`, None
    or bfloat16 [q, K], the down-projections of absorbed LoRAs (see `absorb`).

    Args:
        plan: the site. activation: key of `ACTIVATION_FORMATS`, None for 16-bit activations. memo: the model's slot.
    """

    absorbed: torch.Tensor | None

    def __init__(self, plan: SitePlan, activation: str | None, memo: SiteMemo, device: torch.device | str = "meta"):
        super().__init__()
        self.plan = plan
        # Plain numbers, equal in all blocks: torch.compile guards on what `forward` reads, and the plan holds names,
        # which would make every block a graph of its own.
        self.users, self.rank = len(plan.linears), plan.rank
        self.float4 = isinstance(plan.format, NVFP4)
        self.activation = activation if plan.quantize_input else None
        self.memo = memo
        self.derived = Derived()
        self.members: list[DiRotQLinear] = []  # a plain list: the site belongs to them, not they to it
        self.block = plan.transform.block(plan.in_features) if plan.transform else hadamard_block(plan.in_features)
        self.absorptions: list[tuple[int, int]] = []  # (number, rows) of each LoRA in `absorbed`; see `absorb`
        for name, parameter in _empty(plan.site_spec(), device).items():
            self.register_parameter(name, parameter)
        self.register_parameter("absorbed", None)  # bfloat16 [q, K], never in a checkpoint

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.derived.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.derived.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.plan.in_features}, rank={self.plan.rank}, activation={self.activation}"

    def tensor(self, name: str) -> torch.Tensor | None:
        """A site tensor, None if this site has none of that name; as it is now, whatever offloading does later."""
        tensor = self._parameters.get(name)
        return None if tensor is None else _as(tensor.detach(), SITE_DTYPES.get(name, torch.bfloat16))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the site that a checkpoint holds, as they are now: a gradient must not see them replaced."""
        return {name: p.detach() for name, p in self._parameters.items() if p is not None and name != "absorbed"}

    @property
    def fused(self) -> bool:
        """Whether the op `rotate_quantize` computes this site."""
        return self.activation is not None and ACTIVATION_FORMATS[self.activation].op_mode

    def permuted(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] in the order of columns that the ops see."""
        permutation = self.tensor("permutation")
        return x if permutation is None else x.index_select(1, permutation)

    def forward(self, x: torch.Tensor, trained: bool = False) -> Any:
        """x [..., K] → `SiteOutput` over its tokens; the same tensor object is computed once.

        With `trained` a `TrainedInput`: hooks that bring the site's tensors in must see that use of them, too.
        """
        return self._for_training(x) if trained else self._once(x, False)

    def _for_training(self, x: torch.Tensor) -> TrainedInput:
        rows = x.reshape(-1, x.shape[-1])
        down = self._parameters["absorbed"]
        more = None if down is None else rows @ down.to(x.dtype).T
        return TrainedInput(self.permuted(rows), self.tensor("basis"), self.tensor("signs"), more)

    def products(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """y [M, N] of each member for x [..., K], as one product; the same tensor object is computed once.

        They are columns of one matrix, so rows are strided, which `nn.Linear`'s are not.
        """
        return self._once(x, True)

    def stacks(self, x: torch.Tensor) -> bool:
        """Whether `products` can read every member now: none is elsewhere, or brought in by a hook of its own."""
        if self.users == 1 or len(self.members) != self.users:
            return False
        if self.remembers(x, True):  # the first sibling has looked
            return True
        bias = self.members[0].bias is None
        for m in self.members:
            if m.weight.device != x.device or (m.bias is None) != bias:
                return False
            if hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook"):
                return False
        return True

    def _multiply(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.compute(x)
        y = ops.linear_a8_siblings(
            out.a, out.scale, out.z,
            [m.codes for m in self.members], [m.weight_scale for m in self.members],
            [m.branch for m in self.members if m.branch is not None],
            [m.bias for m in self.members if m.bias is not None],
            self.members[0].table, x.dtype,
        )  # fmt: skip
        return y.split([m.out_features for m in self.members], 1)

    def _once(self, x: torch.Tensor, stacked: bool) -> Any:
        compute = self._multiply if stacked else self.compute
        if self.users == 1:
            return compute(x)
        how = self._state(x, stacked)
        entry = self.memo.entry
        if entry is not None and self._holds(entry, x, how):
            out, left = entry[3], entry[4] - 1
        else:
            out, left = compute(x), self.users - 1
        self.memo.entry = (self, x, how, out, left) if left else None
        return out

    def _state(self, x: torch.Tensor, stacked: bool) -> tuple:
        # An input changed in place between siblings must not be taken for the old one. Inference tensors do not
        # count their versions; no transformer we have a recipe for changes one there.
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        return version, stacked, self.activation, torch.is_grad_enabled()

    def _holds(self, entry: tuple, x: torch.Tensor, how: tuple) -> bool:
        return entry[0] is self and entry[1] is x and entry[2] == how

    def remembers(self, x: torch.Tensor, stacked: bool = False) -> bool:
        """Whether `forward`, or `products` with `stacked`, would return what it has computed for x already."""
        entry = self.memo.entry
        return entry is not None and self._holds(entry, x, self._state(x, stacked))

    def compute(self, x: torch.Tensor) -> SiteOutput:
        x = x.reshape(-1, x.shape[-1])
        if self.fused:
            basis, signs = self.tensor("basis"), self.tensor("signs")
            codes, scale, z = ops.rotate_quantize(self.permuted(x), basis, signs, self.block, self.activation)
            return SiteOutput(codes, scale, self._branch(x, z))
        v, z = self.transform(x)
        branch = self._branch(x, z)
        if self.activation is None:
            return SiteOutput(v, None, branch)
        fmt = ACTIVATION_FORMATS[self.activation]
        if fmt.float4 and self.float4 and not (torch.is_grad_enabled() and v.requires_grad):
            _say_slower(x.device.type, "activations are rounded to NVFP4 by no kernel")
            codes, blocks, scale = quantize_nvfp4(v)
            return SiteOutput(codes, scale, branch, blocks)
        if not fmt.lattice:
            return SiteOutput(fake_quantize(v, fmt, self.tensor("shift")), None, branch)
        _say_slower(x.device.type, f"{fmt.bits}-bit activations are rounded by no kernel")
        codes, scale = quantize_to_table(v.detach(), fmt)
        if torch.is_grad_enabled() and v.requires_grad:  # straight through: codes carry no gradient
            return SiteOutput(v + (codes * scale[:, None] - v).detach().to(v.dtype), None, branch)
        return SiteOutput(codes, scale, branch)

    def _branch(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor | None:
        """What the 16-bit branch multiplies: z, and x Aᵀ of absorbed LoRAs beside it."""
        down = self._parameters["absorbed"]
        if down is None:
            return z if self.rank else None
        return torch.cat([z, (x @ down.to(x.dtype).T).to(torch.bfloat16)], 1)

    def transform(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """v [M, K'] in x's dtype and z [M, r] bfloat16, differentiable."""
        transform = self.plan.transform
        if transform is None or transform.identity:  # no copy either, as the op `rotate` would make one
            return x, x.new_zeros(len(x), 0, dtype=torch.bfloat16)
        if transform.kernel:
            return ops.rotate(self.permuted(x), self.tensor("basis"), self.tensor("signs"), self.block)
        tensors = self.tensors()
        if transform.derive is not None:
            tensors |= self.derived.get(self._parameters, transform.derive, self.memo.derived)
        v, z = transform.apply(x, tensors)
        return v, z.to(torch.bfloat16)


class DiRotQLinear(_PinnedDtypes, nn.Linear):
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
        parameters = _empty(spec, device)
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
        return _as(self.low_rank, torch.bfloat16)

    @property
    def own_low_rank(self) -> torch.Tensor | None:
        """L [N, r] of the checkpoint, without the columns of absorbed LoRAs."""
        branch = self.branch
        return None if branch is None or not self.site.rank else branch[:, : self.site.rank]

    @property
    def codes(self) -> torch.Tensor:
        """The weight in the ops' layout, uint8 [N, K'/2]: itself at 4 bits, else widened for the moment."""
        if self.bits == 4:
            return self.weight
        _say_slower(
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

    def forward(self, x: torch.Tensor, site_only: bool = False) -> Any:
        """x [..., K] bfloat16, float16 or float32 → [..., N] in x's dtype; with `site_only` what `_input` wants."""
        site = self.site
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
            y = site.products(x)[self.index]
        elif (out := self._input(x)).blocks is not None:
            y = ops.linear_nvfp4(
                out.a, out.blocks, out.scale, out.z, self.weight, self.block_scale, self.weight_scale, self.branch,
                self.bias, x.dtype,
            )  # fmt: skip
        elif self.table is None:
            y = self._dense_product(out)
        elif out.scale is not None:
            y = ops.linear_a8(
                out.a, out.scale, out.z, self.codes, self.weight_scale, self.branch, self.bias, self.table, x.dtype
            )
        else:
            scale = self.weight_scale.reshape(self.out_features, -1)
            y = ops.linear_a16(out.a, out.z, self.codes, scale, self.branch, self.bias, self.table)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _dense_product(self, out: SiteOutput) -> torch.Tensor:
        """Over Ŵ in the activations' dtype, for formats that no op multiplies."""
        _say_slower(out.a.device.type, f"{self.format.name} weights are dequantized before every product")
        w = self.format.values(self.format.unpack(self.weight, self.low_features), self.stored)
        return dense_product(out.a, out.z, w, self.branch, self.bias)

    @torch.no_grad()
    def dequantized_weight(self) -> torch.Tensor:
        """The dense W [N, K] this linear stands for (with 16-bit activations), absorbed LoRAs included, float32."""
        dense = dense_weight(self.plan, self.stored, self.site.tensors())
        if self.site.absorbed is not None and self.low_rank is not None:
            dense.addmm_(self.low_rank[:, self.site.rank :].float(), self.site.absorbed.float())
        return dense


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
