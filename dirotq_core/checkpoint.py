"""The checkpoint contract: which tensors a quantized model has, and one clear error for each way to break it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..kernels import NAN_BITS
from .layout import SitePlan, Spec

#: As `Spec`; a dtype of None stands for any floating-point one.
CheckpointSpec = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


class CheckpointError(ValueError):
    """A checkpoint does not hold what its configuration says; the message names the tensor.

    One line of at most `LIMIT` characters, whatever a file's own names and values put into it.
    """

    LIMIT = 1000

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) <= self.LIMIT else line[: self.LIMIT - 2] + " …")


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


def checkpoint_tensors(model: torch.nn.Module, plans: Iterable[SitePlan]) -> CheckpointSpec:
    """Full name → (shape, dtype) of every tensor of the checkpoint of a `model` that is still dense.

    What stays dense has the model's compute dtype, stated as None.
    """
    plans = list(plans)
    state = model.state_dict()
    spec: CheckpointSpec = {
        name: (tuple(t.shape), None if t.is_floating_point() else t.dtype) for name, t in state.items()
    }
    return spec | expected_tensors(plans, {n: f"{n}.bias" in state for p in plans for n in p.linears})


def check_header(
    name: str, found_shape: Iterable[int], found: torch.dtype, shape: Iterable[int], dtype: torch.dtype | None
) -> None:
    """Raise CheckpointError unless the tensor has the shape and the dtype, which for biases may be any float."""
    if tuple(found_shape) != tuple(shape):
        raise CheckpointError(f"tensor {name!r} has shape {tuple(found_shape)}, expected {tuple(shape)}")
    if dtype is None or name.endswith(".bias"):
        if not found.is_floating_point:
            raise CheckpointError(f"tensor {name!r} has dtype {found}, expected a floating-point dtype")
    elif found != dtype:
        raise CheckpointError(f"tensor {name!r} has dtype {found}, expected {dtype}")


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError for NaN and infinity in any tensor, and for values its kind cannot have.

    Weight scales are not negative (0 is a row of zeros) and neither are shifts, block scales are the bits of e4m3 from
    0 to 448, smoothing factors are positive, signs are +1 or -1, a permutation holds every index once.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CheckpointError(f"tensor {name!r} holds NaN or infinity")
    if name.endswith(".weight_scale") and (tensor < 0).any():
        raise CheckpointError(f"tensor {name!r} holds a negative scale")
    if name.endswith(".block_scale") and (tensor >= NAN_BITS).any():
        raise CheckpointError(f"tensor {name!r} holds a block scale that is negative or NaN in float8 e4m3")
    if name.endswith(".input_site.smooth") and (tensor <= 0).any():
        raise CheckpointError(f"tensor {name!r} holds a smoothing factor that is not positive")
    if name.endswith(".input_site.shift") and (tensor < 0).any():
        raise CheckpointError(f"tensor {name!r} holds a negative shift")
    if name.endswith(".input_site.signs") and not (tensor.abs() == 1).all():
        raise CheckpointError(f"tensor {name!r} holds values other than +1 and -1")
    if name.endswith(".input_site.permutation") and (tensor.sort().values.cpu() != torch.arange(len(tensor))).any():
        raise CheckpointError(f"tensor {name!r} is not a permutation of 0 to {len(tensor) - 1}")


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """`check_header` and `check_values` of one tensor."""
    check_header(name, tensor.shape, tensor.dtype, shape, dtype)
    check_values(name, tensor)


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
