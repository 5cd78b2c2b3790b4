"""The embedded models before training: PixArt-Σ's and FLUX.1's architectures at a few million parameters.

Every width a quantizer meets is a multiple of 64: hidden size, MLP width, text width.
"""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .embedded import MAX_TOKENS
from .scenes import AREAS, COLOURS, RELATIONS, SHAPES

TEXT_WIDTH = 64
LATENT_CHANNELS = 4


def words() -> list[str]:
    """Every word of the captions, sorted."""
    phrases = ["a on", *AREAS, *COLOURS, *SHAPES, *RELATIONS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram vocabulary of whole words; letters stand in for words it does not know."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -4.0) for word in words() if word != "a"]
    pieces += [("▁a", -4.0)] + [(letter, -8.0) for letter in letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=MAX_TOKENS)


def clip_tokenizer() -> CLIPTokenizerFast:
    """Byte-pair merges that build each word from its letters, left to right."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in words():
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for i in range(1, len(symbols)):
            merge = ("".join(symbols[:i]), symbols[i])
            if merge not in merges:
                merges.append(merge)
                pieces.append("".join(merge))
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizerFast(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def t5_encoder(vocab_size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=TEXT_WIDTH,
            d_kv=32,
            num_heads=2,
            d_ff=2 * TEXT_WIDTH,
            num_layers=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
        )
    )


def clip_encoder(tokenizer: CLIPTokenizerFast) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def autoencoder(flux: bool) -> AutoencoderKL:
    """128 × 128 × 3 to 32 × 32 × 4; FLUX.1's has no 1 × 1 convolutions around the latent, and shifts it."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        shift_factor=0.0 if flux else None,
        use_quant_conv=not flux,
        use_post_quant_conv=not flux,
    )


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        num_layers=3,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        cross_attention_dim=256,
        caption_channels=TEXT_WIDTH,
        sample_size=32,
        patch_size=2,
        use_additional_conditions=False,
    )
    # As in DiT: the model starts as the zero function.
    for linear in (transformer.proj_out, transformer.adaln_single.linear):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    tokenizer = t5_tokenizer()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(len(tokenizer)),
        vae=autoencoder(flux=False),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=autoencoder(flux=True),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
