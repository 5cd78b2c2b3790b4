"""The diffusers configuration of a model known only by the shapes of its native tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: As ComfyUI and the original code fix them.
_FLUX_AXES = (16, 56, 56)
_PIXART_HEADS = 16

Shapes = Mapping[str, tuple[int, ...]]


def infer_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of the transformer with native tensors of these shapes (of the dense model, no prefix).

    Raises:
        ValueError: it is neither FLUX.1 nor PixArt; the message says so.
    """
    if "double_blocks.0.img_attn.qkv.weight" in shapes and "double_blocks.0.img_mod.lin.weight" in shapes:
        return _flux(shapes)
    if "t_block.1.weight" in shapes and "blocks.0.cross_attn.kv_linear.weight" in shapes:
        return _pixart(shapes)
    raise ValueError("this model is neither FLUX.1 nor PixArt; DiRotQ has recipes for these two")


def _depth(names: Iterable[str], stack: str) -> int:
    prefix = stack + "."
    return 1 + max((int(n.split(".")[1]) for n in names if n.startswith(prefix)), default=-1)


def _flux(shapes: Shapes) -> dict[str, Any]:
    needed = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight")
    missing = [n for n in needed if n not in shapes]
    if missing:  # Chroma and its kind share the names of the blocks
        raise ValueError(f"this model has FLUX blocks but no {missing[0]}, so it is not FLUX.1")
    hidden, packed = shapes["img_in.weight"]
    out = shapes["final_layer.linear.weight"][0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": sum(_FLUX_AXES),
        "axes_dims_rope": list(_FLUX_AXES),
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "in_channels": packed,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "num_attention_heads": hidden // sum(_FLUX_AXES),
        "num_layers": _depth(shapes, "double_blocks"),
        "num_single_layers": _depth(shapes, "single_blocks"),
        "out_channels": None if out == packed else out,
        "patch_size": 1,
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
    }


def _pixart(shapes: Shapes) -> dict[str, Any]:
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    sizes = "csize_embedder.mlp.0.weight" in shapes
    return {
        "_class_name": "PixArtTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": hidden // _PIXART_HEADS,
        "attention_type": "default",
        "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
        "cross_attention_dim": hidden,
        "in_channels": channels,
        "interpolation_scale": 2,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_single",
        "num_attention_heads": _PIXART_HEADS,
        "num_embeds_ada_norm": 1000,
        "num_layers": _depth(shapes, "blocks"),
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "sample_size": 128,
        "use_additional_conditions": sizes,
    }
