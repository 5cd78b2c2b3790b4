"""The first step of a quantized model, whose kernels are compiled together instead of one after the other.

The first block of each kind is called twice when a step reaches it for the first time with inputs of this kind: once in
a `rehearsal`, whose results are dropped, and then as it would have been anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..kernels import backend
from ..kernels.observers import observed
from ..kernels.rehearsal import rehearsal, threads
from .fusible import watched
from .input_site import InputSite

logger = logging.getLogger(__name__)

# By model: the kinds of inputs that it was called with.
_seen: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()


def rehearse_blocks(
    model: nn.Module, blocks: Iterable[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Have the first of the `blocks` of each class rehearse when this call of `model` reaches it.

    Only for the first call with inputs of these shapes and dtypes, and where nobody else sees it: no gradients, no
    tracer or profiler, no hooks in the block, no attention processors but diffusers' and ours.

    Args:
        model: about to be called with `args` and `kwargs`. blocks: its blocks.
    """
    if model.training or observed() or threads() == 1:
        return
    inputs = [*enumerate(args), *kwargs.items()]
    kind = tuple((name, x.shape, x.dtype, x.device) for name, x in inputs if isinstance(x, torch.Tensor))
    seen = _seen.setdefault(model, set())
    if kind in seen:
        return
    seen.add(kind)
    for block in {type(block): block for block in reversed([*blocks])}.values():
        _Rehearsing(block)


def forget_rehearsals(model: nn.Module) -> None:
    """The model's next call is its first one again."""
    _seen.pop(model, None)
    for module in model.modules():
        if isinstance(module._compiled_call_impl, _Rehearsing):
            module._compiled_call_impl.leave()


class _Rehearsing:
    """What PyTorch calls instead of a block, once: a compiled block's graph has that place as well."""

    def __init__(self, block: Any):
        self.block, self.usual = block, block._compiled_call_impl
        block._compiled_call_impl = self

    def leave(self) -> None:
        self.block._compiled_call_impl = self.usual

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.leave()
        if _may_rehearse(self.block, args, kwargs):
            _rehearse(self.block, args, kwargs)
        return self.block(*args, **kwargs)


def _may_rehearse(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Asked when the block is called: a step that failed may have been followed by offloading."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    return (
        not torch.compiler.is_compiling()
        and not observed()
        and not any(watched(module) or not _forgetful(module) for module in block.modules())
        and bool(tensors)
        and _compiles_for(tensors[0].device)
    )


def _forgetful(module: nn.Module) -> bool:
    """Whether a call more does nothing to the attention processor: one of somebody else may keep what it saw, and one
    for several GPUs waits for the others."""
    processor = getattr(module, "processor", None)
    if processor is None:
        return True
    ours = __name__.rpartition(".")[0]
    known = type(processor).__module__.startswith(("diffusers.", f"{ours}."))
    return known and getattr(processor, "_parallel_config", None) is None


def _compiles_for(device: torch.device) -> bool:
    return backend.compiles(device) and not torch.cuda.is_current_stream_capturing()


def _rehearse(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    memos = {id(m.memo): m.memo for m in block.modules() if isinstance(m, InputSite)}.values()
    try:
        with rehearsal():
            type(block).forward(block, *args, **kwargs)
    except Exception as error:  # what is the model's own comes again, from the call itself
        logger.warning(
            "dirotq: kernels are compiled one after the other, not in threads: %s: %s", type(error).__name__, error
        )
    finally:
        for memo in memos:
            memo.entry = None  # holds what was never computed
