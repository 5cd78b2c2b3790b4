"""The operations class that ComfyUI builds a model's modules from: one per load, so settings never cross."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..dirotq_core.layout import SitePlan
from ..dirotq_core.single_file.convert import SITE
from .layout import LAYOUT, LINEAR_FIELDS, SIDE_FIELDS, SITE_FIELDS, DiRotQLayout, Params
from .layout import linear as quantized_linear
from .side_branch import side_branch
from .side_lora import Branch, branches_of

#: Names of a packed weight's tensors in a state dict → fields of `Params`; those of its site are behind a further dot.
_FIELDS = {**LINEAR_FIELDS, **{f"lora_{name}": name for name in SIDE_FIELDS}}
_SITE = SITE.removesuffix(".")


@dataclass(frozen=True)
class Settings:
    """Choices of one load.

    Attributes:
        activations: native linear → key of `ACTIVATION_FORMATS`, None for 16-bit activations.
        plain: PyTorch operations instead of Triton kernels.
        exact_lora: keep LoRAs of ComfyUI's own loader beside the 4-bit weights instead of re-quantizing.
    """

    activations: Mapping[str, str | None]
    plain: bool = False
    exact_lora: bool = True


def make_operations(plans: Mapping[str, SitePlan], settings: Settings, dtype: torch.dtype) -> type:
    """A `custom_operations` class whose linears load the layers of `plans` packed, and all others as usual.

    Args:
        plans: native linear → its site. dtype: the model's, of results and of what stays dense.
    """

    class Operations(comfy.ops.manual_cast):
        class Linear(DiRotQLinear):
            _plans, _settings, _dtype = plans, settings, dtype

    return Operations


class DiRotQLinear(comfy.ops.manual_cast.Linear):
    """A linear of ComfyUI that may hold a `QuantizedTensor`; `make_operations` subclasses it for one load."""

    _plans: Mapping[str, SitePlan]
    _settings: Settings
    _dtype: torch.dtype

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        # No memory is taken before the weights arrive: for FLUX.1 it would be 24 GB of it.
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.weight_comfy_model_dtype = self.bias_comfy_model_dtype = dtype
        self._biased = bias
        #: Branches of `DiRotQLoRA` nodes, by node, in the order they were stacked.
        self.side_loras: dict[object, list[Branch]] = {}
        self._core_patch: Any = None
        self._core_branches: list[Branch] = []

    @property
    def weight_lowvram_function(self) -> Any:
        """What ComfyUI's dynamic VRAM puts on the weight whenever it arrives: core's LoRAs.

        It would unpack the weight, add them and round all of it anew. Those that are plain LoRAs or LoKr become
        branches instead, and it finds nothing to do.
        """
        return self._core_patch

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch: Any) -> None:
        branches = self._branches_of(patch)
        self._core_patch, self._core_branches = (None, branches) if branches else (patch, [])

    def _branches_of(self, patch: Any) -> list[Branch] | None:
        if not self._settings.exact_lora or not isinstance(self.weight, QuantizedTensor):
            return None
        if not getattr(patch, "is_lowvram_patch", False):
            return None
        return branches_of(patch, (self.out_features, self.in_features))

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing_keys: list,
        unexpected_keys: list, error_msgs: list,
    ) -> None:  # fmt: skip
        if prefix + "weight" not in state_dict:
            missing_keys.append(prefix + "weight")
            return
        plan = self._plans.get(prefix.removesuffix("."))
        self.weight = _frozen(state_dict[prefix + "weight"] if plan is None else self._packed(state_dict, prefix, plan))
        if self._biased and prefix + "bias" in state_dict:
            self.bias = _frozen(state_dict[prefix + "bias"])

    def _packed(self, state_dict: dict, prefix: str, plan: SitePlan) -> QuantizedTensor:
        fields = {field: state_dict.get(prefix + name) for name, field in LINEAR_FIELDS.items()}
        fields |= {name: state_dict.get(prefix + SITE + name) for name in SITE_FIELDS}
        params = Params(
            **fields,
            orig_dtype=self._dtype,
            orig_shape=(self.out_features, self.in_features),
            plan=plan,
            activation=self._settings.activations[prefix.removesuffix(".")],
            plain=self._settings.plain,
        )
        return QuantizedTensor(state_dict[prefix + "weight"], LAYOUT, params)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """The names of the checkpoint. Model sizes are counted from this."""
        weight = self.weight
        if not isinstance(weight, QuantizedTensor):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        p = weight._params
        destination[prefix + "weight"] = weight._qdata
        for name, field in _FIELDS.items():
            if getattr(p, field) is not None:
                destination[prefix + name] = getattr(p, field)
        for name in SITE_FIELDS:
            if getattr(p, name) is not None:
                destination[prefix + SITE + name] = getattr(p, name)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def __getattr__(self, name: str) -> Any:
        """Tensors of the packed weight under the names that `state_dict` gives them, where ComfyUI looks for them."""
        if name in _FIELDS or name == _SITE:
            weight = self._parameters.get("weight")
            if isinstance(weight, QuantizedTensor):
                return weight._params if name == _SITE else getattr(weight._params, _FIELDS[name])
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # nn.Module swaps the data of parameters in place, which wrapper subclasses refuse.
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = _frozen(fn(parameter))
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y, waiting = self._without_waiting(input) if self.weight_function else (self._product(input), [])
        for branches in (*self.side_loras.values(), self._core_branches, *waiting):
            for branch in branches:
                branch.add_to(y, input)
        return y

    def _without_waiting(self, input: torch.Tensor) -> tuple[torch.Tensor, list[list[Branch]]]:
        """The product, and the core LoRAs it is without.

        Where ComfyUI keeps the weight in host memory, they wait in `weight_function` for it to arrive.
        """
        functions: list[Any] = self.weight_function
        found = [self._branches_of(f) for f in functions]
        self.weight_function: list[Any] = [f for f, branches in zip(functions, found, strict=True) if not branches]
        try:
            return self._product(input), [branches for branches in found if branches]
        finally:
            self.weight_function = functions

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.weight, QuantizedTensor):
            return super().forward(input)
        comfy.ops.run_every_op()
        with comfy.ops.CastBiasWeightContext(
            self, None, dtype=self.weight.dtype, device=input.device, bias_dtype=input.dtype, offloadable=True,
            compute_dtype=input.dtype, want_requant=True,
        ) as (weight, bias):  # fmt: skip
            if isinstance(weight, QuantizedTensor):
                return quantized_linear(input, weight, bias)
            # A patch that is no branch, on a weight that lives in host memory: put on it on its way, dense.
            return torch.nn.functional.linear(input, weight.to(input.dtype), bias)

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_: Any) -> torch.Tensor:
        """What ComfyUI adds LoRAs to: dense, in float32 so that their difference can be told from rounding."""
        if isinstance(weight, QuantizedTensor):
            return DiRotQLayout.dequantize32(weight._qdata, weight._params)
        return weight

    def set_weight(
        self, weight: torch.Tensor, inplace_update: bool = False, seed: int | None = None,
        return_weight: bool = False, **_: Any,
    ) -> torch.Tensor | None:  # fmt: skip
        """Take the patched dense weight [N, K] back."""
        old = self.weight
        if isinstance(old, QuantizedTensor):
            weight = self._patched(old, weight)
        else:
            weight = weight.to(old.dtype)
        if return_weight:
            return weight
        self.weight = _frozen(weight)
        return None

    def _patched(self, old: QuantizedTensor, weight: torch.Tensor) -> QuantizedTensor:
        codes = old._qdata.to(weight.device)
        params = dataclasses.replace(old._params.to_device(weight.device), down=None, up=None)
        if self._settings.exact_lora:
            difference = weight.float() - DiRotQLayout.dequantize32(codes, params)
            side = side_branch(difference)
            if side is not None:
                return QuantizedTensor(codes, LAYOUT, dataclasses.replace(params, down=side[0], up=side[1]))
        codes, params = DiRotQLayout.quantize(weight, like=(codes, params))
        return QuantizedTensor(codes, LAYOUT, params)


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
