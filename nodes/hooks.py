"""LoRA hooks of ComfyUI (a LoRA for one conditioning, or scheduled over the steps), which 4-bit weights cannot take."""

from __future__ import annotations

from typing import Any

import comfy.utils
from comfy.patcher_extension import CallbacksMP
from comfy_kitchen.tensor import QuantizedTensor


def refuse_weight_hooks(patcher: Any) -> None:
    """Have sampling with hooks on packed weights of `patcher` or its clones end in a sentence.

    ComfyUI takes such a patch back by copying into the parameter's data. Of a packed weight that copies codes but no
    scales, so that the LoRA would stay in part, without a word.
    """
    patcher.add_callback_with_key(CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, "dirotq", _refuse)


def _refuse(patcher: Any, *_: Any) -> None:
    for patches in patcher.hook_patches.values():
        for key in patches:
            if isinstance(comfy.utils.get_attr(patcher.model, key), QuantizedTensor):
                raise ValueError(
                    f"LoRA hooks cannot change 4-bit weights ({key.removeprefix('diffusion_model.')}); put the LoRA on "
                    "the MODEL with 'DiRotQ LoRA' or 'Load LoRA' instead"
                )
