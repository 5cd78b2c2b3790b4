"""Which implementation of an op runs: Triton where it can, the PyTorch reference elsewhere.

DIROTQ_BACKEND = auto (default) | triton | reference. `auto` names its reason once when it cannot use Triton;
`triton` raises instead. With TRITON_INTERPRET=1 set before Triton is imported, `triton` runs on CPU tensors.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

ENVIRONMENT = "DIROTQ_BACKEND"

_TRITON_MODULE = {
    "rotate": "triton_rotate",
    "rotate_quantize": "triton_rotate",
    "rotate_quantize_parts": "triton_rotate",
    "linear_a8": "triton_linear",
    "linear_a8_add": "triton_linear",
    "linear_a8_siblings": "triton_linear",
    "linear_a16": "triton_w4a16",
    "linear_nvfp4": "triton_fp4",
    "round_columns": "triton_gptq",
    "qk_norm_rope": "triton_attention",
    "attend": "triton_attention",
    "norm_modulate": "triton_norm",
}
_LARGEST_TRITON_BLOCK = 128
_OLDEST_TRITON = (3, 4)
# The AMD families that have 8-bit matrix instructions and that Triton supports.
_AMD = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")

_log = logging.getLogger(__name__)


def implementation(op: str, device: torch.device, block: int = 1) -> Callable[..., Any]:
    """The function that computes `op` on `device`, for a rotation with Hadamard blocks of `block` columns.

    Raises ValueError if DIROTQ_BACKEND has an unknown value, RuntimeError if it asks for the impossible.
    """
    wanted = os.environ.get(ENVIRONMENT, "auto")
    if wanted not in ("auto", "triton", "reference"):
        raise ValueError(f"{ENVIRONMENT} is {wanted!r}; one of auto, triton, reference is needed")
    if wanted == "reference":
        return getattr(_module("reference"), op)
    obstacle = _obstacle(device.type, device.index, wanted == "triton")
    if obstacle is None and block > _LARGEST_TRITON_BLOCK:
        obstacle = f"the Hadamard block is {block}; the Triton kernels hold at most {_LARGEST_TRITON_BLOCK}"
    if obstacle is None:
        return getattr(_module(_TRITON_MODULE[op]), op)
    if wanted == "triton":
        raise RuntimeError(f"{ENVIRONMENT}=triton cannot run {op} on {device}: {obstacle}")
    _say_once(device.type, obstacle)
    return getattr(_module("reference"), op)


def obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, as a phrase; None if it can."""
    return _obstacle(device.type, device.index, False)


def compiles(device: torch.device) -> bool:
    """Whether ops on `device` are kernels that Triton compiles: there is a GPU, and nobody asked for anything else."""
    asked = os.environ.get(ENVIRONMENT) == "reference" or os.environ.get("TRITON_INTERPRET") == "1"
    return not asked and device.type == "cuda" and obstacle(device) is None


@cache
def _module(name: str) -> Any:
    return import_module(f".{name}", __package__)


@cache
def _obstacle(kind: str, index: int | None, interpret: bool) -> str | None:
    """Why Triton cannot run on a device, or None; `interpret` welcomes its interpreter on CPU tensors."""
    if kind == "cpu" and interpret:
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1"
    elif kind != "cuda":  # torch calls ROCm devices cuda too
        return f"Triton kernels run on CUDA and ROCm devices, not on {kind}"
    if find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"Triton is not installed (pip install {package})"
    version = import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, _OLDEST_TRITON))}, which the kernels need"
    if kind == "cuda":
        return _unsupported_gpu(index)
    return None


def _unsupported_gpu(index: int | None) -> str | None:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(index).gcnArchName
        if not arch.startswith(_AMD):
            return f"{name} ({arch}) has no 8-bit matrix instruction; supported: {', '.join(_AMD)}"
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"{name} is sm_{major}{minor}; the kernels need sm_80 or newer"
    return None


@cache
def _say_once(kind: str, obstacle: str) -> None:
    message = f"dirotq computes in plain PyTorch: {obstacle}"
    if kind == "cpu":
        _log.info(message)  # as expected there
    else:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
