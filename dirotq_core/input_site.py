"""The input site of quantized linears: what it makes of an input, once for all siblings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..kernels import ops, quantize_nvfp4
from .activations import ACTIVATION_FORMATS, fake_quantize, quantize_to_table
from .derived import Derived
from .float4 import NVFP4
from .layout import SitePlan, Spec
from .offloading import attribute
from .transforms import SITE_DTYPES, hadamard_block

if TYPE_CHECKING:
    from .linear import DiRotQLinear

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


def empty_parameters(spec: Spec, device: torch.device | str) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        for name, (shape, dtype) in spec.items()
    }


def as_dtype(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`tensor` in the dtype of its format. Training scripts cast small parameters, or all, to float32 in place."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


class PinnedDtypes(nn.Module):
    """Of dtypes that the format fixes: ``.bfloat16()``, ``.double()`` and the like cast the bias and nothing else."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        free = self._parameters.get("bias")

        def pinned(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if tensor is free or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(pinned, recurse)


def say_slower(kind: str, what: str) -> None:
    """Said once: PyTorch operations where a kernel could be."""
    if not torch.compiler.is_compiling():  # a log line would break the graph
        _say_once(kind, what)


@cache
def _say_once(kind: str, what: str) -> None:
    if kind != "cpu":  # everything is PyTorch there
        logger.warning("dirotq: %s; this works in plain PyTorch and is slower than our kernels for 4 bits", what)


def _present(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


class InputSite(PinnedDtypes):
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
        for name, parameter in empty_parameters(plan.site_spec(), device).items():
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
        return None if tensor is None else as_dtype(tensor.detach(), SITE_DTYPES.get(name, torch.bfloat16))

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
        return self._for_training(x) if trained else self._once(x)

    def _for_training(self, x: torch.Tensor) -> TrainedInput:
        rows = x.reshape(-1, x.shape[-1])
        down = self._parameters["absorbed"]
        more = None if down is None else rows @ down.to(x.dtype).T
        return TrainedInput(self.permuted(rows), self.tensor("basis"), self.tensor("signs"), more)

    def product(self, x: torch.Tensor, index: int, gelu: bool) -> torch.Tensor:
        """y [M, N] of a member for x [..., K], or GELU of it, out of one product of all members.

        The same tensor object is computed once, with GELU in the product where the first member that asks wants it.
        Members are columns of one matrix, so rows are strided, which `nn.Linear`'s are not.
        """
        how = self._state(x, True)
        entry = self.memo.entry
        if entry is not None and self._holds(entry, x, how) and (gelu or entry[3][1] != index):
            (outputs, curved), left = entry[3], entry[4] - 1
        else:
            curved, left = index if gelu else None, self.users - 1
            outputs = self._multiply(x, curved)
        self.memo.entry = (self, x, how, (outputs, curved), left) if left else None
        if gelu and curved != index:
            return nn.functional.gelu(outputs[index], approximate="tanh")
        return outputs[index]

    def stacks(self, x: torch.Tensor) -> bool:
        """Whether `product` can read every member now: none is elsewhere, or brought in by a hook of its own."""
        if self.users == 1 or len(self.members) != self.users:
            return False
        if self.remembers(x, True):  # the first sibling has looked
            return True
        device, bias = x.device, self.members[0]._parameters["bias"] is None
        for m in self.members:
            own: Any = m._parameters  # quicker than as attributes, which `nn.Module` searches for
            if own["weight"].device != device or (own["bias"] is None) != bias:
                return False
            if attribute(m, "_hf_hook") is not None or attribute(m, "_diffusers_hook") is not None:
                return False
        return True

    def _multiply(self, x: torch.Tensor, curved: int | None) -> tuple[torch.Tensor, ...]:
        out = self.compute(x)
        gelu = [] if curved is None else [i == curved for i in range(self.users)]
        codes, scales, branches, biases, tables = zip(*[m.operands() for m in self.members], strict=True)
        y = ops.linear_a8_siblings(
            out.a, out.scale, out.z, codes, scales, _present(branches), _present(biases), tables[0], x.dtype, gelu
        )
        return y.split([m.out_features for m in self.members], 1)

    def _once(self, x: torch.Tensor) -> SiteOutput:
        if self.users == 1:
            return self.compute(x)
        how = self._state(x, False)
        entry = self.memo.entry
        if entry is not None and self._holds(entry, x, how):
            out, left = entry[3], entry[4] - 1
        else:
            out, left = self.compute(x), self.users - 1
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
        """Whether `forward`, or `product` with `stacked`, would return what it has computed for x already."""
        entry = self.memo.entry
        return entry is not None and self._holds(entry, x, self._state(x, stacked))

    @property
    def reads_parts(self) -> bool:
        """Whether `compute` takes an input that lies in several tensors, one after the other along K."""
        return (
            self.fused
            and self.users == 1
            and "permutation" not in self._parameters
            and self._parameters["absorbed"] is None
        )

    def compute(self, x: torch.Tensor | tuple[torch.Tensor, ...]) -> SiteOutput:
        if isinstance(x, tuple):
            rows = [part.reshape(-1, part.shape[-1]) for part in x]
            basis, signs = self.tensor("basis"), self.tensor("signs")
            codes, scale, z = ops.rotate_quantize_parts(rows, basis, signs, self.block, self.activation)
            return SiteOutput(codes, scale, z if self.rank else None)
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
            say_slower(x.device.type, "activations are rounded to NVFP4 by no kernel")
            codes, blocks, scale = quantize_nvfp4(v)
            return SiteOutput(codes, scale, branch, blocks)
        if not fmt.lattice:
            return SiteOutput(fake_quantize(v, fmt, self.tensor("shift")), None, branch)
        say_slower(x.device.type, f"{fmt.bits}-bit activations are rounded by no kernel")
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
