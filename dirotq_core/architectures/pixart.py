"""PixArt-Σ and PixArt-α (`PixArtTransformer2DModel`).

Cross-attention K and V read the text once per image and stay in 16 bit, as in SVDQuant and DiRotQ; so do the
embedders, the shared adaLN linear and proj_out. The paper's published INT4 row also keeps ff.net.2's activations in
16 bit: `DiRotQConfig(method="paper", weight_only_modules=["ff.net.2"])`.
"""

from .recipe import BlockRecipe, Recipe

PIXART = Recipe(
    blocks={
        "transformer_blocks": BlockRecipe(
            sites=(
                ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                ("attn1.to_out.0",),
                ("attn2.to_q",),
                ("attn2.to_out.0",),
                ("ff.net.0.proj",),
                ("ff.net.2",),
            ),
        ),
    },
    shared=("adaln_single", "caption_projection"),
)
