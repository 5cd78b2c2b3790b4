"""ComfyUI's own modules in this process, on the CPU, for what the HTTP API does not show."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def load(checkout: Path) -> SimpleNamespace:
    """ComfyUI's modules and ours that need them; ComfyUI is told to use the CPU before it looks for a GPU."""
    if str(checkout) not in sys.path:
        # Behind everything else: ComfyUI has top-level modules with common names.
        sys.path.append(str(checkout))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.memory_management
    import comfy.model_management
    import comfy.sample
    import comfy.sd

    from dirotq.nodes import branches, layout, model, operations, quantizing, side_branch

    return SimpleNamespace(
        comfy=comfy, branches=branches, layout=layout, model=model, operations=operations, quantizing=quantizing,
        side_branch=side_branch,
    )  # fmt: skip


def condition(tokens: int = 12) -> dict[str, torch.Tensor]:
    """FLUX.1's conditioning of one image."""
    g = torch.Generator().manual_seed(3)
    return {
        "context": torch.randn(1, tokens, 4096, generator=g),
        "y": torch.randn(1, 768, generator=g),
        "guidance": torch.tensor([3.5]),
    }


def dequantized(core: SimpleNamespace, patcher: Any) -> Any:
    """The dense MODEL in float32 with the weights that the packed ones of `patcher` stand for."""
    source = patcher.model.diffusion_model
    state = {}
    for name, tensor in source.state_dict().items():
        weight = source.get_submodule(name.rpartition(".")[0]).weight if name.endswith(".weight") else None
        if hasattr(weight, "_params"):
            state[name] = core.layout.DiRotQLayout.dequantize32(weight._qdata, weight._params)
        elif ".input_site." not in name and not name.endswith(("weight_scale", "block_scale", "low_rank")):
            state[name] = tensor.float()
    return core.comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})


def run(core: SimpleNamespace, patcher: Any) -> torch.Tensor:
    """The transformer's output [1, 16, 8, 8] on fixed inputs, loaded as a sampler would load it."""
    core.comfy.model_management.load_models_gpu([patcher])
    return forward(patcher)


def forward(patcher: Any) -> torch.Tensor:
    """As `run`, on the model as it is."""
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    given = condition()
    with torch.no_grad():
        return patcher.model.diffusion_model(x, torch.tensor([0.7]), **given).clone()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())
