"""What PEFT does to linears by looking inside them, and what it has to know of ours."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .absorb import absorb, check_absorbable, release
from .diffusers_habits import is_quantized
from .linear import DiRotQLinear
from .offloading import groups

#: On a dense linear of a quantized model: its weights as they were before a LoRA was merged, None while none is.
BEFORE = "dirotq_before_merging"


def teach_peft() -> None:
    """Let PEFT's `merge` and `unmerge`, and so `fuse_lora` and `unfuse_lora`, work on quantized models.

    PEFT adds B A to a weight, which is packed here, and subtracts it again, which in 16 bit leaves another weight. So
    quantized linears absorb and release, and the few dense ones keep what they were. Idempotent.
    """
    _teach_checks()
    _teach_lora()
    _teach_dora()
    _teach_others()


def remember_merging(model: nn.Module) -> None:
    """Mark the dense linears of a quantized `model`, of which merging must be undone bit for bit. Idempotent."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, DiRotQLinear):
            module.__dict__.setdefault(BEFORE, None)


def forget_merging(model: nn.Module) -> None:
    """Dense linears are plain ones again, for when the whole model is dense."""
    for module in model.modules():
        module.__dict__.pop(BEFORE, None)


def _teach_lora() -> None:
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    merge, unmerge = Linear.merge, Linear.unmerge
    if hasattr(merge, "knows_dirotq"):
        return

    @functools.wraps(merge)
    def merging(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if isinstance(base, DiRotQLinear):
            names = check_adapters_to_merge(self, adapter_names) or []
            _absorb_adapters(self, base, [n for n in names if n in self.lora_A])
            return
        if not self.merged and BEFORE in base.__dict__:
            base.__dict__[BEFORE] = [None if t is None else t.detach().clone() for t in (base.weight, base.bias)]
        merge(self, safe_merge, adapter_names)

    @functools.wraps(unmerge)
    def unmerging(self: Any) -> None:
        base = self.get_base_layer()
        if isinstance(base, DiRotQLinear) and self.merged:
            numbers = self.__dict__.get("dirotq_absorbed", [])
            while numbers:  # one is forgotten when it is released: memory may end in between
                release(base, numbers[-1])
                numbers.pop()
            if (before := self.__dict__.pop("dirotq_bias", None)) is not None and base.bias is not None:
                base.bias.data = before.to(base.bias.device)
            self.merged_adapters.clear()
        elif self.merged and base.__dict__.get(BEFORE) is not None:
            for tensor, before in zip((base.weight, base.bias), base.__dict__[BEFORE], strict=True):
                if tensor is not None:  # in place, as PEFT added: diffusers may hold the same tensor to put it back
                    tensor.data.copy_(before)
            base.__dict__[BEFORE] = None
            self.merged_adapters.clear()
        else:
            unmerge(self)

    merging.knows_dirotq = True  # type: ignore[attr-defined]
    Linear.merge, Linear.unmerge = merging, unmerging  # type: ignore[method-assign]


def _factors(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [q, K] and B [N, q] of the adapter `name`, its scale in B."""
    return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach().float() * layer.scaling[name]


def _check_adapters(layer: Any, base: DiRotQLinear, names: list[str]) -> None:
    """Raise what merging `names` of a layer over `base` would, and change nothing."""
    for name in names:
        if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):  # LoKr, LoHa, AdaLoRA, …
            raise _not_absorbed(name, type(layer).__module__.split(".")[-2])
        if name not in layer.lora_A:
            continue
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None:
            raise _not_absorbed(name, type(variant).__name__.removesuffix("LinearVariant"))
        if getattr(layer, "lora_bias", {}).get(name) and base.bias is None:
            raise _not_absorbed(name, "a LoRA with a bias, which the layer has not")
        check_absorbable(base, *_factors(layer, name))


def _absorb_adapters(layer: Any, base: DiRotQLinear, names: list[str]) -> None:
    _check_adapters(layer, base, names)
    for name in names:
        bias = before = None
        if getattr(layer, "lora_bias", {}).get(name):
            assert base.bias is not None
            more = layer.lora_B[name].bias.detach() * layer.scaling[name]
            before, bias = base.bias.detach().clone(), base.bias.data + more.to(base.bias.device, base.bias.dtype)
        # Whatever needs memory has it from here on: what is absorbed is written down, or nothing is.
        layer.__dict__.setdefault("dirotq_absorbed", []).append(absorb(base, *_factors(layer, name)))
        if bias is not None:
            layer.__dict__.setdefault("dirotq_bias", before)
            base.bias.data = bias
        layer.merged_adapters.append(name)


def _teach_checks() -> None:
    """Merging goes layer by layer; what cannot be absorbed must be found before the first has changed."""
    from diffusers.loaders.peft import PeftAdapterMixin
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    allowed, fuse, unfuse = BaseTuner._check_merge_allowed, PeftAdapterMixin.fuse_lora, PeftAdapterMixin.unfuse_lora
    if hasattr(fuse, "knows_dirotq"):
        return
    save = PeftAdapterMixin.save_lora_adapter

    @functools.wraps(allowed)
    def checking(self: Any) -> None:
        allowed(self)
        _check_all(self.model, None)

    @functools.wraps(fuse)
    def fusing(
        self: Any, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        _check_all(self, adapter_names)
        fuse(self, lora_scale, safe_fusing, adapter_names)

    @functools.wraps(unfuse)
    def unfusing(self: Any) -> None:
        _refuse_groups(self)
        unfuse(self)

    @functools.wraps(save)
    def saving(
        self: Any, save_directory: Any, adapter_name: str = "default", upcast_before_saving: bool = False,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        # diffusers casts the whole model, which packed weights refuse; the adapter is what is saved.
        if upcast_before_saving and is_quantized(self):
            for layer in self.modules():
                if isinstance(layer, BaseTunerLayer):
                    for name in layer.adapter_layer_names:
                        getattr(layer, name).float()
            upcast_before_saving = False
        save(self, save_directory, adapter_name, upcast_before_saving, *args, **kwargs)

    fusing.knows_dirotq = True  # type: ignore[attr-defined]
    BaseTuner._check_merge_allowed = checking  # type: ignore[method-assign]
    PeftAdapterMixin.fuse_lora, PeftAdapterMixin.unfuse_lora = fusing, unfusing  # type: ignore[method-assign]
    PeftAdapterMixin.save_lora_adapter = saving  # type: ignore[method-assign]


def _refuse_groups(model: nn.Module) -> None:
    """Groups of diffusers' offloading hold the tensors they found: new ones would not move with them."""
    if getattr(model, "is_quantized", False) and groups(model):
        raise ValueError("a LoRA can be fused or unfused only before enabling group offload")


def _check_all(model: nn.Module, names: list[str] | None) -> None:
    _refuse_groups(model)
    if any(isinstance(m, DiRotQLinear) for m in model.modules()):
        remember_merging(model)  # again: a Control LoRA puts a wider layer in the place of the embedder
    for layer in model.modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, DiRotQLinear):
            tuner: Any = layer
            wanted = tuner.active_adapters if names is None else names
            _check_adapters(tuner, base, [n for n in wanted if n not in tuner.merged_adapters])


def _not_absorbed(name: str, kind: str) -> ValueError:
    return ValueError(
        f"adapter {name!r} is {kind}, not a plain LoRA: 4-bit weights cannot absorb it, so leave it loaded beside them"
    )


def _teach_dora() -> None:
    """DoRA reads the weight for its norms."""
    from peft.tuners.lora import dora

    original = dora.dequantize_module_weight
    if hasattr(original, "knows_dirotq"):
        return

    @functools.wraps(original)
    def dense(module: nn.Module) -> torch.Tensor:
        return module.dequantized_weight() if isinstance(module, DiRotQLinear) else original(module)

    dense.knows_dirotq = True  # type: ignore[attr-defined]
    dora.dequantize_module_weight = dense  # type: ignore[assignment]


def _teach_others() -> None:
    """LoKr, LoHa and AdaLoRA work beside a packed weight and are not absorbed: the first two have full rank."""
    from peft.tuners.adalora.layer import SVDLinear
    from peft.tuners.loha.layer import LoHaLayer
    from peft.tuners.lokr.layer import LoKrLayer
    from peft.tuners.lycoris_utils import LycorisLayer

    if hasattr(LycorisLayer.merge, "knows_dirotq"):
        return
    for layer in (LycorisLayer, SVDLinear):
        layer.merge = _refusing(layer.merge)  # type: ignore[method-assign]
    for cls, name in ((LoHaLayer, "update_layer"), (LoHaLayer, "get_delta_weight"), (LoKrLayer, "get_delta_weight")):
        setattr(cls, name, _seeing_shape(getattr(cls, name)))


def _refusing(merge: Any) -> Any:
    @functools.wraps(merge)
    def merging(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.get_base_layer(), DiRotQLinear):
            raise _not_absorbed((adapter_names or self.active_adapters)[0], type(self).__module__.split(".")[-2])
        merge(self, safe_merge, adapter_names)

    merging.knows_dirotq = True  # type: ignore[attr-defined]
    return merging


def _seeing_shape(method: Any) -> Any:
    """`method` of an adapter layer, with a base layer whose weight has the shape [N, K]."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        packed = isinstance(self.get_base_layer(), DiRotQLinear)
        return method(_ShapeView(self) if packed else self, *args, **kwargs)

    return wrapper


class _ShapeView:
    """An adapter layer, but for the base layer it shows: not set on the layer, which other threads may be using."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def get_base_layer(self) -> nn.Linear:
        base = self.layer.get_base_layer()
        return nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
