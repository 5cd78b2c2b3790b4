"""The diffusers backend: `DiffusersQuantizer` for ``quant_method="dirotq"``.

Order of calls in `from_pretrained`: validate_environment, update_torch_dtype, maybe_update_loaded_keys (diffusers 0.39
and newer), _process_model_before_weight_loading, validate_environment once more with the final device map,
update_missing_keys, per tensor check_if_quantized_param and create_quantized_param (neither, if any part of the model
goes to disk), _process_model_after_weight_loading. `from_single_file` calls validate_environment without arguments,
maybe_update_state_dict (0.42), and none of maybe_update_loaded_keys and update_missing_keys.
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import is_peft_available
from torch import nn

from .activations import ACTIVATION_FORMATS
from .adaptations import teach_libraries
from .build import assign, dequantize_linears, quantized_linears, replace_linears
from .checkpoint import CheckpointError, CheckpointSpec, check_names, check_tensor, checkpoint_tensors
from .config import DiRotQConfig
from .diffusers_habits import ignore_fusing, stop_ignoring_fusing
from .files import check_files, check_headers, read_headers
from .input_site import InputSite
from .layout import SitePlan, linear_at, plan_sites, sparing_float32
from .linear import DiRotQLinear
from .methods import method
from .offloading import check_readable, check_ungrouped, offloaded
from .peft_habits import forget_merging, remember_merging
from .repeated_blocks import forget_repeated_blocks, name_repeated_blocks
from .report import QuantizationReport
from .single_file.refuse import refuse_quantized
from .solve import solve_site

logger = logging.getLogger(__name__)

#: Tensors of a dtype of their own. The loader writes what goes to disk in the compute dtype, except what its list of
#: float32 modules names; accelerate reads it back in the dtype of our empty parameters, so that no bit is lost.
KEEP_IN_FP32 = ("weight_scale", "smooth", "shift", "low_rank", "basis", "rotation")

#: What data-free quantization reads; 8-bit floats mostly come with scales elsewhere in the file.
DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class DiRotQQuantizer(DiffusersQuantizer):
    """Loads DiRotQ checkpoints, and quantizes dense ones without data while they load."""

    quantization_config: DiRotQConfig
    pre_quantized: bool
    use_keep_in_fp32_modules = True
    requires_calibration = False

    def __init__(self, quantization_config: DiRotQConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._requested = quantization_config
        self.report: QuantizationReport | None = None  # of a model quantized in memory
        # A copy: a pipeline configuration hands one object to every load.
        self.quantization_config = copy.deepcopy(quantization_config).resolved(calibrated=self.pre_quantized)
        self.dtype = torch.bfloat16
        self._device_map: dict | None = None
        self._single_file = False
        self._files: list[Path] = []
        self._spec: CheckpointSpec = {}
        self._plan_of: dict[str, SitePlan] = {}
        self._made: dict[str, DiRotQLinear] = {}

    # --- before loading ---

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not kwargs:
            # A single file has no configuration that could say that it is quantized, so diffusers does not know.
            self._single_file, self.pre_quantized = True, False
            self.quantization_config = copy.deepcopy(self._requested).resolved(calibrated=False)
        device_map = kwargs.get("device_map")
        self._device_map = device_map if isinstance(device_map, dict) else None
        if not self.pre_quantized and self._offloads_to_disk:
            raise ValueError(
                "quantizing while loading cannot offload to disk: save the quantized model first "
                "(save_pretrained), then load that with this device_map"
            )

    @property
    def _offloads_to_disk(self) -> bool:
        return self._device_map is not None and "disk" in self._device_map.values()

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        if torch_dtype is None:
            # diffusers loads a pipeline's other parts in float32 then, and torch's error about it names neither.
            logger.warning(
                "no torch_dtype given: the transformer computes in bfloat16; give all parts of a pipeline one"
            )
        self.dtype = torch_dtype or torch.bfloat16
        if self.dtype not in DENSE_DTYPES:
            raise ValueError(f"torch_dtype must be bfloat16, float16 or float32 for dirotq, got {torch_dtype}")
        return self.dtype

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, Any]:
        """Sizes for an automatic device map: what is quantized while it loads will take 4 bits, not 16."""
        from accelerate.utils import CustomDtype

        sizes = super().get_special_dtypes_update(model, torch_dtype)
        if not self.pre_quantized:
            sizes |= {f"{name}.weight": CustomDtype.INT4 for name in self._plan_of}
        return sizes

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._files = [Path(f) for f in checkpoint_files]
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if self._single_file:
            refuse_quantized(state_dict)  # a dictionary of tensors; a file has been looked at when it was read
        return state_dict

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.quantization_config = sparing_float32(self.quantization_config, model)
        config = self.quantization_config
        plans = plan_sites(model, config)
        self._plan_of = {n: p for p in plans for n in p.linears}
        if self.pre_quantized:
            self._spec = checkpoint_tensors(model, plans)
            self._made = replace_linears(model, plans, config, self.dtype)
            # The loader's own list, which it consults per tensor; a class's list is not ours to change.
            if keep_in_fp32_modules is not None and keep_in_fp32_modules is not type(model)._keep_in_fp32_modules:
                keep_in_fp32_modules.extend(KEEP_IN_FP32)
        else:
            logger.warning(
                "dirotq quantizes %s without calibration data: Hadamard rotation, rounding to nearest, %d-bit "
                "activations. dirotq.quantize(pipeline, prompts=…) gives better images.",
                type(model).__name__, config.activation_bits,
            )  # fmt: skip
            # The dense skeleton stays until each weight arrives; these modules then take its place.
            skeleton = copy.deepcopy(model)
            self._made = replace_linears(skeleton, plans, config, self.dtype)
        _use_own_steps(model)  # before accelerate hooks its modules, which then keep the `forward` that they had
        model.register_to_config(quantization_config=config)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if self.pre_quantized:
            self._check_before_loading(missing_keys)
        return missing_keys

    def _check_before_loading(self, missing: list[str]) -> None:
        for file in self._files:
            if file.suffix != ".safetensors":
                raise CheckpointError(f"{file} is no safetensors file; dirotq reads no other")
            # An index may name any path; diffusers 0.42 refuses that as well, older ones join it to the folder's.
            if not (file.parent / "config.json").exists() and not any(file.parent.glob("*.index*.json")):
                raise CheckpointError(f"{file} is outside the folder of the checkpoint's config.json")
        readable = bool(self._files) and all(f.is_file() for f in self._files)
        if readable and self._offloads_to_disk:
            check_files(self._files, self._spec)  # the loader will show us no tensor
        elif self._offloads_to_disk:
            raise ValueError(
                "a device_map with 'disk' needs diffusers 0.39 or newer and a checkpoint in a folder: otherwise "
                "diffusers does not say which files they are, and nothing would check the tensors that go to disk"
            )
        elif readable:
            check_headers(read_headers(self._files), self._spec)
        else:  # what is too much is seen when the first tensor beside it is loaded
            check_names(set(self._spec) - set(missing), self._spec)

    # --- per tensor ---

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        if self.pre_quantized:
            return True  # the dense ones as well: each is checked
        return param_name.endswith(".weight") and param_name[: -len(".weight")] in self._plan_of

    def check_quantized_param_shape(
        self, param_name: str, current_param: torch.Tensor, loaded_param: torch.Tensor
    ) -> bool:
        check_tensor(param_name, loaded_param, *self._spec[param_name])
        return True

    def create_quantized_param(  # type: ignore[override]  # diffusers calls it for its effect
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, target_device: torch.device | str,
        state_dict: dict[str, Any], unexpected_keys: list[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        owner, _, leaf = param_name.rpartition(".")
        stored = state_dict[param_name]  # the loader has cast `param_value`
        if not self.pre_quantized:
            self._quantize_on_the_fly(model, owner, stored, target_device)
            return
        if not self._files and state_dict.keys() - self._spec.keys():
            check_names([*self._spec, *state_dict], self._spec)
        shape, dtype = self._spec[param_name]
        check_tensor(param_name, stored, shape, dtype)
        module = model.get_submodule(owner)
        current = getattr(module, leaf)
        own = isinstance(module, (DiRotQLinear, InputSite)) and leaf != "bias"
        value = (stored if own else param_value).to(target_device)
        if isinstance(current, nn.Parameter):
            value = nn.Parameter(value, current.requires_grad)
        setattr(module, leaf, value)

    def _quantize_on_the_fly(
        self, model: nn.Module, name: str, weight: torch.Tensor, device: torch.device | str
    ) -> None:
        if weight.dtype not in DENSE_DTYPES:
            raise ValueError(
                f"{name}.weight has dtype {weight.dtype}; dirotq quantizes bfloat16, float16 or float32 weights, so "
                "give it the original model"
            )
        plan, module, dense = self._plan_of[name], self._made[name], linear_at(model, name)
        one = SitePlan(**{**plan.__dict__, "linears": (name,), "out_features": (module.out_features,)})
        compute = "cuda" if torch.cuda.is_available() else "cpu"
        solved = solve_site(one, self.quantization_config, [weight.to(compute)], None)
        assign(module, {k: t.to(device) for k, t in solved.linears[0].items()})
        site = self._made[plan.owner].site
        if any(p.is_meta for p in site.parameters()):
            assign(site, {k: t.to(device) for k, t in solved.site.items()})
        if dense.bias is not None and not dense.bias.is_meta:
            assign(module, {"bias": dense.bias.data})
        model.set_submodule(name, module)

    # --- after loading ---

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self._offloads_to_disk:
            away = offloaded(model)
            empty = [n for n, p in model.named_parameters() if p.is_meta and n not in away]
            if empty:
                raise CheckpointError(f"checkpoint lacks {len(empty)} tensors, among them {empty[0]!r}")
        self._files, self._spec, self._plan_of, self._made = [], {}, {}, {}
        _finish(model)
        return model

    # --- properties and the way back ---

    def get_cuda_warm_up_factor(self) -> int:
        """The loader reserves elements / factor of the compute dtype: packed bytes, or 4 bits a weight to be."""
        return 2 if self.pre_quantized else 4

    def _dequantize(self, model: Any) -> Any:
        for check in (check_readable, check_ungrouped):
            check(model, "dequantized")
        dequantize_linears(model, model.dtype)
        # The base class forgets the quantizer but not this; the next save would claim to be quantized.
        model._internal_dict = type(model._internal_dict)(
            {k: v for k, v in model._internal_dict.items() if k != "quantization_config"}
        )
        if hasattr(model, "quantization_method"):
            del model.quantization_method
        model.is_quantized = False  # diffusers before 0.39 does not
        stop_ignoring_fusing(model)
        _use_diffusers_steps(model)
        forget_merging(model)
        forget_repeated_blocks(model)
        vars(model).pop("_skip_layerwise_casting_patterns", None)  # `_finish` hid the class's own
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: gradients pass through the quantized linears to their inputs."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


@cache
def _hint_at_eight_bits() -> None:
    """Said once: our 4-bit products run on 8-bit units, so on today's GPUs 8-bit activations cost no more."""
    # A warning, not info: nobody sees info by default, and whoever does not read this gives image quality away.
    logger.warning("4-bit activations; dirotq.set_activation_bits(model, 8) is closer to the original at the same cost")


def _multiplies_four_bit_lattice(model: nn.Module) -> bool:
    """Whether 8-bit activations would cost no more: the method has them, and its 4-bit ones are integers."""
    linears = quantized_linears(model).values()
    sites = (m.site for m in linears if m.plan.method and 8 in method(m.plan.method).activations)
    formats = {ACTIVATION_FORMATS[s.activation] for s in sites if s.activation is not None}
    return any(f.lattice and f.bits == 4 for f in formats)


# Imported late: their classes are those of diffusers' models.
def _use_own_steps(model: nn.Module) -> None:
    """Give the model layers and attention that compute several of diffusers' steps in one kernel."""
    from .fused_layers import use_fused_layers
    from .processors import use_fused_attention

    use_fused_layers(model)
    use_fused_attention(model)


def _use_diffusers_steps(model: nn.Module) -> None:
    from .fused_layers import use_plain_layers
    from .processors import use_plain_attention

    use_plain_layers(model)
    use_plain_attention(model)


def _finish(model: Any) -> None:
    """What a quantized model needs besides its modules."""
    # Layerwise casting would store scales and biases of nn.Linear subclasses in float8.
    patterns = tuple(getattr(model, "_skip_layerwise_casting_patterns", None) or ())
    names = tuple(n.replace(".", r"\.") for n in quantized_linears(model))
    model._skip_layerwise_casting_patterns = patterns + names
    ignore_fusing(model)
    teach_libraries()
    if is_peft_available():
        remember_merging(model)
    # Only lattice formats are integer products, and only GPUs have the units in question.
    if torch.cuda.is_available() and _multiplies_four_bit_lattice(model):
        _hint_at_eight_bits()
    name_repeated_blocks(model)


def attach_quantizer(model: Any, config: DiRotQConfig, dtype: torch.dtype) -> None:
    """Mark a model quantized in memory so that diffusers saves and treats it like a loaded one."""
    quantizer = DiRotQQuantizer(config, pre_quantized=True)
    quantizer.dtype = dtype
    model.register_to_config(quantization_config=quantizer.quantization_config)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    _use_own_steps(model)
    _finish(model)
