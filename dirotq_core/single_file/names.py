"""Which module of diffusers is which module of the original repositories (black-forest-labs/flux, PixArt-sigma)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fusion:
    """One native module and the diffusers modules whose rows it stacks.

    Attributes:
        native: its full name. parts: full names in diffusers, in row order.
        swapped: its rows are (shift, scale) where diffusers has (scale, shift).
        parameter: name of its only parameter where that differs from diffusers' "weight", and where the name itself
            is a parameter, "".
    """

    native: str
    parts: tuple[str, ...]
    swapped: bool = False
    parameter: str | None = None


Table = Mapping[str, "str | tuple[str, ...]"]


@dataclass(frozen=True)
class NativeNames:
    """Names of one architecture.

    Attributes:
        blocks: list of blocks in diffusers → (native list, native member → member or members in diffusers).
        outer: native module → module in diffusers, outside the blocks.
        norms: members, native as in `blocks`, whose parameter is called "scale".
        parameters: native name → name of parameters that belong to no module, outside blocks and (with "*") in them.
        swapped: native modules with the halves of their rows the other way round.
        depths: list of blocks in diffusers → key of its length in the model's configuration.
    """

    blocks: Mapping[str, tuple[str, Table]]
    outer: Mapping[str, str]
    norms: frozenset[str]
    parameters: Mapping[str, str]
    swapped: frozenset[str]
    depths: Mapping[str, str]


_FLUX_DOUBLE: Table = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}

_FLUX_SINGLE: Table = {
    "modulation.lin": "norm.linear",
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}

_FLUX_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}

_PIXART_BLOCK: Table = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}

_PIXART_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}

#: Transformer class of diffusers → its native names.
NATIVE: dict[str, NativeNames] = {
    "FluxTransformer2DModel": NativeNames(
        blocks={
            "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
            "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
        },
        outer=_FLUX_OUTER,
        norms=frozenset(n for n in (*_FLUX_DOUBLE, *_FLUX_SINGLE) if n.endswith("_norm")),
        parameters={},
        swapped=frozenset({"final_layer.adaLN_modulation.1"}),
        depths={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    ),
    "PixArtTransformer2DModel": NativeNames(
        blocks={"transformer_blocks": ("blocks", _PIXART_BLOCK)},
        outer=_PIXART_OUTER,
        norms=frozenset(),
        parameters={
            "final_layer.scale_shift_table": "scale_shift_table",
            "*scale_shift_table": "scale_shift_table",
        },
        swapped=frozenset(),
        depths={"transformer_blocks": "num_layers"},
    ),
}


def fusions(config: Mapping[str, Any]) -> Iterator[Fusion]:
    """Every native module of the model that `config` (a transformer's config.json) describes.

    Raises:
        ValueError: its class has no native names (the message names those that have), or a depth is missing.
    """
    names = native_names(config)
    for native, part in names.outer.items():
        yield Fusion(native, (part,), native in names.swapped)
    for native, name in names.parameters.items():
        if not native.startswith("*"):
            yield Fusion(native, (name,), parameter="")
    for stack, (native_stack, table) in names.blocks.items():
        depth = config.get(names.depths[stack])
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
            raise ValueError(f"{names.depths[stack]} must be the number of blocks, got {depth!r}")
        for i in range(depth):
            for native, parts in table.items():
                parts = (parts,) if isinstance(parts, str) else parts
                parameter = "scale" if native in names.norms else None
                yield Fusion(f"{native_stack}.{i}.{native}", tuple(f"{stack}.{i}.{p}" for p in parts), False, parameter)
            for native, name in names.parameters.items():
                if native.startswith("*"):
                    yield Fusion(f"{native_stack}.{i}.{native[1:]}", (f"{stack}.{i}.{name}",), parameter="")


def native_names(config: Mapping[str, Any]) -> NativeNames:
    """The names of the class that `config` belongs to; ValueError if it has none."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in NATIVE:
        raise ValueError(f"{name!r} has no single-file layout; supported: {', '.join(sorted(NATIVE))}")
    return NATIVE[name]
