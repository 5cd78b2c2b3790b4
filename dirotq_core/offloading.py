"""Whether a model's tensors are where they can be read, with what diffusers and accelerate do to offload them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def attribute(module: nn.Module, name: str) -> Any:
    """What hangs on the module itself, such as a hook, or None.

    Asking the module is slow where it has none, since it searches; but a compiler watches the answer to that alone.
    """
    return getattr(module, name, None) if torch.compiler.is_compiling() else vars(module).get(name)


def check_readable(model: nn.Module, what: str) -> None:
    """Raise ValueError, which says that the model must be loaded without offloading to be `what`, if a tensor is away.

    On meta there is none, and in the place of a group's tensors on disk diffusers keeps memory of any content.
    """
    where = None
    if any(getattr(group, "offload_to_disk_path", None) for group in groups(model)):
        where = "groups of it are offloaded to disk"
    else:
        away = next((name for name, t in model.state_dict().items() if t.is_meta), None)
        if away is not None:
            where = f"{away!r} and maybe others are offloaded (sequential offload, or a device_map)"
    if where is not None:
        raise ValueError(f"the model cannot be {what}: {where}; load it without offloading, and it can")


def offloaded(model: nn.Module) -> set[str]:
    """Names of the parameters that accelerate keeps elsewhere, on meta here, with a hook that brings them in."""
    names = set()
    for prefix, module in model.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            kept = (getattr(one, "weights_map", None) or {}) if getattr(one, "offload", False) else {}
            for name, _ in module.named_parameters(recurse=False):
                if name in kept and not kept[name].is_meta:
                    names.add(f"{prefix}.{name}".lstrip("."))
    return names


def check_ungrouped(model: nn.Module, what: str) -> None:
    """Raise ValueError under group offload, whose groups hold the tensors that they found: new ones would not move."""
    if groups(model):
        raise ValueError(f"the model cannot be {what} under group offload; load it without, and it can")


def group_hook(module: nn.Module) -> Any:
    """The hook by which diffusers' group offloading brings in this very module, not a block it is part of; or None."""
    registry: Any = attribute(module, "_diffusers_hook")
    return None if registry is None else registry.get_hook("group_offloading")


def groups(model: nn.Module) -> list[Any]:
    """The groups of diffusers' group offloading in `model`."""
    return [hook.group for module in model.modules() if (hook := group_hook(module)) is not None]
