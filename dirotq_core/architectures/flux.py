"""FLUX.1 (dev, schnell, Fill, Kontext, Depth, Canny, Krea: all use `FluxTransformer2DModel`).

418 linears of FLUX.1-dev are quantized to W4A4 (8.607 B weights), 76 modulation linears to W4A16 (3.23 B). Embedders,
norm_out and the last proj_out stay in 16 bit (DiRotQ and SVDQuant keep the same set).
"""

from .recipe import BlockRecipe, Recipe

FLUX = Recipe(
    blocks={
        "transformer_blocks": BlockRecipe(
            sites=(
                ("attn.to_q", "attn.to_k", "attn.to_v"),
                ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                ("attn.to_out.0",),
                ("attn.to_add_out",),
                ("ff.net.0.proj",),
                ("ff.net.2",),
                ("ff_context.net.0.proj",),
                ("ff_context.net.2",),
            ),
            modulation=("norm1.linear", "norm1_context.linear"),
            returns=("encoder_hidden_states", "hidden_states"),
        ),
        "single_transformer_blocks": BlockRecipe(
            sites=(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ("proj_out",)),
            modulation=("norm.linear",),
            returns=("encoder_hidden_states", "hidden_states"),
        ),
    },
    shared=("time_text_embed", "pos_embed"),
)
