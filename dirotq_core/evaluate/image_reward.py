"""ImageReward v1.0 (Xu et al. 2023, arXiv 2304.05977) on transformers' BLIP.

The project's own package needs parts of transformers that are gone, so its published weights are read into the classes
that transformers keeps: a ViT-L/16 encodes the picture, a BERT reads the prompt with cross-attention to it, and five
linear layers without nonlinearities make a number of the first token. It is standardized over the paper's data.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from .metrics import Scorer

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
#: Mean and standard deviation of the raw score over the paper's validation data.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
#: Tokens of a prompt that are read.
TOKENS = 35
SIDE = 224
#: CLIP's normalization of pictures.
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

#: Part of a name in the published weights → in transformers' vision model.
VISION_NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks.", "encoder.layers."),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.qkv", "self_attn.qkv"),
    ("attn.proj", "self_attn.projection"),
)


#: Places of the head's linear layers in the published weights; dropout stands in the gaps.
HEAD = ("0", "2", "4", "6", "7")


class ImageReward(nn.Module):
    """The network. vision, text: keyword arguments of transformers' configurations, beside the published model's."""

    def __init__(self, vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None):
        from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        large = {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": SIDE, "patch_size": 16, "layer_norm_eps": 1e-6,
        }  # fmt: skip
        vision_config = BlipVisionConfig(**{**large, **(vision or {})})
        base = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                "num_attention_heads": 12, "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
                "encoder_hidden_size": vision_config.hidden_size}  # fmt: skip
        text_config = BlipTextConfig(**{**base, **(text or {})})
        text_config.is_decoder = True  # gives it cross-attention; called as none, it reads the whole prompt at once
        self.vision: Any = BlipVisionModel(vision_config)
        self.text: Any = BlipTextModel(text_config, add_pooling_layer=False)
        widths = (text_config.hidden_size, 1024, 128, 64, 16, 1)
        self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Standardized scores [B] of pixels [B, 3, 224, 224] and prompts, ids and mask [B, T]."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        everywhere = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        out = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=image, encoder_attention_mask=everywhere,
            is_decoder=False,
        )  # fmt: skip
        return (self.head(out.last_hidden_state[:, 0].float())[:, 0] - MEAN) / STD

    def load_published(self, state: Mapping[str, torch.Tensor]) -> None:
        """Read the published weights. ValueError if one is missing, is left over, or has another shape."""
        renamed = {new: tensor for name, tensor in state.items() if (new := _renamed(name)) is not None}
        own = self.state_dict()
        for name in sorted(own.keys() | renamed.keys()):
            if name not in renamed or name not in own or renamed[name].shape != own[name].shape:
                where = "lack" if name not in renamed else "have no use for" if name not in own else "have another"
                raise ValueError(f"ImageReward's weights {where} {name!r}")
        self.load_state_dict(renamed)


def _renamed(name: str) -> str | None:
    """Its name here; None for what only the training or the tokenizer's place used."""
    if name.startswith("mlp.layers."):
        index, rest = name.removeprefix("mlp.layers.").split(".", 1)
        return f"head.{HEAD.index(index)}.{rest}" if index in HEAD else f"head.{name}"
    if name.startswith("blip.visual_encoder."):
        inner = name.removeprefix("blip.visual_encoder.")
        if inner.startswith("norm."):
            return "vision." + inner.replace("norm.", "post_layernorm.", 1)
        for old, new in VISION_NAMES:
            inner = inner.replace(old, new)
        return f"vision.{inner}"
    if name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
        return "text." + name.removeprefix("blip.text_encoder.")
    return None


def load_image_reward(device: str) -> Scorer:
    """The published model on `device`, downloaded the first time."""
    from huggingface_hub import hf_hub_download
    from transformers import BertTokenizerFast

    model = ImageReward().eval()
    state = torch.load(hf_hub_download(REPOSITORY, FILE), map_location="cpu", weights_only=True)
    model.load_published(state)
    return scorer(model.to(device), BertTokenizerFast.from_pretrained(TOKENIZER), device)


def scorer(model: ImageReward, tokenizer: Any, device: str) -> Scorer:
    """Score with `model`."""

    @torch.no_grad()
    def score(image: np.ndarray, reference: np.ndarray, prompt: str) -> float:
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        pixels = preprocess(image)[None].to(device)
        return float(model(pixels, tokens["input_ids"].to(device), tokens["attention_mask"].to(device)))

    return score


def preprocess(image: np.ndarray) -> torch.Tensor:
    """Normalized float32 [3, 224, 224] of a picture [H, W, 3]: the shorter side to 224, bicubic, the middle cut out."""
    from PIL import Image

    height, width = image.shape[:2]
    scale = SIDE / min(height, width)
    size = (SIDE if width <= height else int(width * scale), SIDE if height <= width else int(height * scale))
    small = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    pixels = torch.from_numpy(np.array(small.crop((left, top, left + SIDE, top + SIDE)))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std
