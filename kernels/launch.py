"""Launching Triton kernels with little time spent on the host.

`kernel[grid](…)` finds out at every launch which compiled variant its arguments ask for. A step of FLUX.1 launches some
1400 kernels, and on a fast GPU the host then falls behind. `launch` remembers the variant by what decides it and calls
it directly, where it can without Triton's own Python (`triton_launcher`).
"""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import rehearsal
from .launched import note
from .triton_launcher import direct, hooked

# A product and a sum are rounded apart, as in the reference: no fused multiply-add.
OPTIONS = {"enable_fp_fusion": False}
_NOTHING = nullcontext()
_LONG = 1.0  # seconds, which hardly anything but a compiler takes

# What calls a variant directly, in Triton's way, and the kernel: its id must stay its own.
_variants: dict[tuple, tuple[Any, Any, Any]] = {}
_MOST_VARIANTS = 10_000  # every number of tokens makes new ones; Triton keeps what it compiled itself


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. That of Triton also takes its constants, which costs a launch's worth of host time."""
    return -(-a // b)


@cache
def _is_hopper(kind: str, index: int | None) -> bool:
    if kind != "cuda" or torch.version.hip or torch.cuda.get_device_capability(index) != (9, 0):
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def is_hopper(device: torch.device) -> bool:
    """Whether kernels for Hopper run on `device`."""
    return _is_hopper(device.type, device.index)


@cache
def _multiprocessors(kind: str, index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if kind == "cuda" else 1


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for the CPU, where Triton's interpreter runs."""
    return _multiprocessors(device.type, device.index)


@cache
def _early(hopper: bool) -> dict[str, Any]:
    return {"OVERLAP": True, "launch_pdl": True} if hopper else {"OVERLAP": False}


def early(device: torch.device) -> dict[str, Any]:
    """Constants of a kernel with OVERLAP: started while the one before it on the stream ends, where that is known to
    work.

    It waits (`triton_common.begin`) before it touches memory that another kernel writes or reads: for the one before
    it, which has waited for those before. A kernel that lets the next start before its own wait, as `begin` does, says
    nothing about those before. So only constants are read ahead of a wait, or what a kernel in between has waited for.
    """
    return _early(is_hopper(device))


def stream_of(tensor: Tensor) -> int:
    """The current stream of a GPU tensor's device, as the driver knows it."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device())


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """`torch.cuda.device_of`, at no cost where that device is the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch._C._cuda_getDevice():
        return _NOTHING
    return torch.cuda.device_of(tensor)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants, **OPTIONS)` on the current device, that of the tensors.

    args: the run-time arguments, in order: tensors, descriptors of tensors, integers, floats. constants: the
    compile-time ones, which come after them in the kernel's signature, and launch options. In a `rehearsal` a variant
    that is not known yet is compiled only.
    """
    decides: list[Any] = [id(kernel)]
    values: list[Any] = []
    device = -1
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            decides += (arg.dtype, address % 16 == 0)
            values.append(address)
            if device < 0:
                device = arg.get_device()
        else:  # a number, or a descriptor: its block and layout follow from the dtype and the constants
            base = getattr(arg, "base", None)
            decides.append(arg if base is None else base.dtype)
            values.append(arg)
    key = (*decides, device, *constants, *constants.values())
    grid = (*grid, 1, 1)[:3]
    known = _variants.get(key)
    if known is not None:
        variant, rest, _ = known
        directly = rest is None and not hooked()
        if directly:
            variant(grid, torch._C._cuda_getCurrentRawStream(device), values)
        elif rest is None:
            kernel[grid](*args, **constants, **OPTIONS)
        else:
            variant[grid](*args, *rest)
        note(variant if directly else None, grid, args)
        return
    note(None, grid, args)
    rehearsed = rehearsal.current()
    if rehearsed is not None:
        rehearsed.compile(kernel, device, grid, args, {**constants, **OPTIONS})
        return
    start = time.perf_counter()
    with rehearsal.loading:
        compiled = kernel[grid](*args, **constants, **OPTIONS)
    if compiled is None:  # Triton's interpreter compiles nothing
        return
    if time.perf_counter() - start > _LONG:
        rehearsal.say_compiling()
    if len(_variants) >= _MOST_VARIANTS:
        _variants.clear()
    rest = [constants[name] for name in kernel.arg_names[len(args) :]]
    variant = direct(compiled, rest) if device >= 0 else None
    _variants[key] = (compiled, rest, kernel) if variant is None else (variant, None, kernel)
