"""The checkpoint contract: which tensors a quantized model has, and one clear error for each way to break it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from .layout import SitePlan, Spec


class CheckpointError(ValueError):
    """A checkpoint does not hold what its configuration says; the message names the tensor."""


def expected_tensors(plans: Iterable[SitePlan], biases: Mapping[str, bool]) -> Spec:
    """Full name → (shape, dtype) of every tensor of the quantized linears.

    Biases have the model's compute dtype, stated here as float32 and compared by kind only.
    """
    spec: Spec = {}
    for plan in plans:
        for name, n in zip(plan.linears, plan.out_features, strict=True):
            spec |= {f"{name}.{k}": v for k, v in plan.linear_spec(n).items()}
            if biases[name]:
                spec[f"{name}.bias"] = ((n,), torch.float32)
        spec |= {f"{plan.owner}.input_site.{k}": v for k, v in plan.site_spec().items()}
    return spec


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise CheckpointError unless `tensor` has the shape and dtype, and finite (for scales positive) values."""
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if name.endswith(".bias"):
        if not tensor.is_floating_point():
            raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}, expected a floating-point dtype")
    elif tensor.dtype != dtype:
        raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CheckpointError(f"tensor {name!r} holds NaN or infinity")
    if name.endswith(".weight_scale") and (tensor < 0).any():
        raise CheckpointError(f"tensor {name!r} holds a negative scale")
    if name.endswith(".signs") and not (tensor.abs() == 1).all():
        raise CheckpointError(f"tensor {name!r} holds values other than +1 and -1")


def check_names(found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise CheckpointError naming the tensors that are missing or that nothing expects."""
    found, expected = set(found), set(expected)
    problems = [
        f"{len(names)} {what} tensor{'s' if len(names) > 1 else ''}: {_some(names)}"
        for what, names in (("missing", expected - found), ("unexpected", found - expected))
        if names
    ]
    if problems:
        raise CheckpointError("checkpoint does not fit its configuration: " + "; ".join(problems))


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(repr(n) for n in ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
