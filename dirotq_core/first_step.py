"""The first step of a quantized model, whose kernels are compiled together instead of one after the other.

The first block of each kind is called twice when a step reaches it for the first time with inputs of this kind: once in
a `rehearsal`, whose results are dropped, and then as it would have been anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.backend import obstacle
from ..kernels.observers import observed
from ..kernels.rehearsal import rehearsal, threads
from .input_site import InputSite
from .offloading import attribute

logger = logging.getLogger(__name__)

_SEEN = "_dirotq_rehearsed"  # attribute of a model: the kinds of inputs that it was called with


def rehearse_blocks(
    model: nn.Module, blocks: Iterable[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Have the first of the `blocks` of each class rehearse when this call of `model` reaches it.

    Only for the first call with inputs of these shapes and dtypes, and where nobody else sees it: no gradients, no
    tracer or profiler, no hooks in the block.

    Args:
        model: about to be called with `args` and `kwargs`. blocks: its blocks.
    """
    inputs = [*enumerate(args), *kwargs.items()]
    kind = tuple((name, x.shape, x.dtype, x.device) for name, x in inputs if isinstance(x, torch.Tensor))
    seen: set[tuple] = vars(model).setdefault(_SEEN, set())
    if kind in seen or model.training or observed() or threads() == 1:
        return
    seen.add(kind)
    for block in {type(block): block for block in reversed([*blocks])}.values():
        if not any(_hooked(module) for module in block.modules()):
            _rehearse_when_called(block)


def forget_rehearsals(model: nn.Module) -> None:
    """The model's next call is its first one again."""
    vars(model).pop(_SEEN, None)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know of the module's calls, such as offloading, which replaces its `forward`."""
    hooks = ("_hf_hook", "_diffusers_hook")
    return bool(
        "forward" in vars(module)
        or module._forward_pre_hooks
        or module._forward_hooks
        or any(attribute(module, name) is not None for name in hooks)
    )


def _rehearse_when_called(block: nn.Module) -> None:
    # What PyTorch calls instead of all else, if there is anything: a compiled block's graph stands there as well.
    usual: Any = block._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        block._compiled_call_impl = usual
        _rehearse(block, args, kwargs)
        return block(*args, **kwargs)

    block._compiled_call_impl = call


def _rehearse(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if torch.compiler.is_compiling() or observed():
        return
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    if not tensors or not _compiles_for(tensors[0].device):
        return
    memos = {id(m.memo): m.memo for m in block.modules() if isinstance(m, InputSite)}.values()
    try:
        with rehearsal():
            type(block).forward(block, *args, **kwargs)
    except torch.OutOfMemoryError:  # for what is rehearsed beside what is launched: less is needed without
        logger.warning("dirotq: no memory to compile kernels ahead; they are compiled one after the other")
    finally:
        for memo in memos:
            memo.entry = None  # holds what was never computed


def _compiles_for(device: torch.device) -> bool:
    return device.type == "cuda" and obstacle(device) is None and not torch.cuda.is_current_stream_capturing()
