"""`compile_repeated_blocks` of a quantized transformer: what it compiles, and that CUDA graphs of it know their steps.

With `mode="reduce-overhead"` each block is a CUDA graph of its own, whose output the next one reads where it lies. Left
to itself PyTorch takes the call of every compiled block for a new step, in which the outputs before it are free to be
overwritten, and says so in an error. So the model says itself where a step begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .architectures import recipe_for
from .first_step import forget_rehearsals, rehearse_blocks


def name_repeated_blocks(model: Any) -> None:
    """Let `compile_repeated_blocks` compile the blocks, which PixArt's class does not name, and what they all read.

    A graph copies every input that no other graph has made: the embeddings of time and position would be copied for
    each block.
    """
    recipe = recipe_for(model)
    blocks = [type(block) for stack in recipe.blocks for block in getattr(model, stack)]
    shared = [type(getattr(model, name)) for name in recipe.shared if getattr(model, name, None) is not None]
    model._repeated_blocks = sorted({cls.__name__ for cls in blocks + shared})
    if _begin_step not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin_step, with_kwargs=True)


def forget_repeated_blocks(model: Any) -> None:
    """The model's class names its blocks again, if it does."""
    vars(model).pop("_repeated_blocks", None)
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _begin_step]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    forget_rehearsals(model)


def _begin_step(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Where blocks were compiled one by one, the step before is over.

    Also where no CUDA graph has been made yet: the very first step makes them, and has to be a step already. That
    imports PyTorch's part for them, whatever the mode; which one it is cannot be read off a compiled block.
    """
    if torch.compiler.is_compiling():
        return
    blocks = [block for stack in recipe_for(model).blocks for block in getattr(model, stack)]
    if any(block._compiled_call_impl is not None for block in blocks):
        torch.compiler.cudagraph_mark_step_begin()
    rehearse_blocks(model, blocks, args, kwargs)
