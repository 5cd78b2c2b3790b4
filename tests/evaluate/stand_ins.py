"""Networks of metrics and of a judge that really run, with random weights: their numbers mean nothing."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers import PreTrainedTokenizerFast as Fast

from dirotq.dirotq_core.evaluate.image_reward import ImageReward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|startoftext|>", "<|endoftext|>", "a", "red", "cat", "large", "circle"]


def make_clip(folder):
    """A CLIP of 2 layers with a vocabulary of bytes."""
    letters = [chr(i) for i in range(97, 123)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(vocabulary), "max_position_embeddings": 16, "eos_token_id": 1},
        vision_config={**small, "image_size": 30, "patch_size": 6},
        projection_dim=24,
    )
    size = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)


def published(vision_layers, text_layers, seed=0):
    """Random weights under the published names, of width 32, and what of them is not read."""
    g = torch.Generator().manual_seed(seed)

    def linear(name, n, k):
        return {f"{name}.weight": torch.randn(n, k, generator=g) / k**0.5, f"{name}.bias": torch.randn(n, generator=g)}

    def norm(name):
        return {f"{name}.weight": 1 + 0.1 * torch.randn(32, generator=g),
                f"{name}.bias": 0.1 * torch.randn(32, generator=g)}  # fmt: skip

    v, t = "blip.visual_encoder", "blip.text_encoder"
    state = {f"{v}.cls_token": torch.randn(1, 1, 32, generator=g),
             f"{v}.pos_embed": torch.randn(1, 50, 32, generator=g),
             f"{v}.patch_embed.proj.weight": torch.randn(32, 3, 32, 32, generator=g) / 50,
             f"{v}.patch_embed.proj.bias": torch.randn(32, generator=g), **norm(f"{v}.norm")}  # fmt: skip
    for i in range(vision_layers):
        b = f"{v}.blocks.{i}"
        state |= norm(f"{b}.norm1") | norm(f"{b}.norm2") | linear(f"{b}.attn.qkv", 96, 32)
        state |= linear(f"{b}.attn.proj", 32, 32) | linear(f"{b}.mlp.fc1", 48, 32) | linear(f"{b}.mlp.fc2", 32, 48)
    state |= {f"{t}.embeddings.word_embeddings.weight": torch.randn(11, 32, generator=g),
              f"{t}.embeddings.position_embeddings.weight": torch.randn(64, 32, generator=g),
              f"{t}.embeddings.position_ids": torch.arange(64)[None], **norm(f"{t}.embeddings.LayerNorm")}  # fmt: skip
    for i in range(text_layers):
        b = f"{t}.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                state |= linear(f"{b}.{kind}.self.{part}", 32, 32)
            state |= linear(f"{b}.{kind}.output.dense", 32, 32) | norm(f"{b}.{kind}.output.LayerNorm")
        state |= linear(f"{b}.intermediate.dense", 48, 32) | linear(f"{b}.output.dense", 32, 48)
        state |= norm(f"{b}.output.LayerNorm")
    for index, (k, n) in zip((0, 2, 4, 6, 7), ((32, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
        state |= linear(f"mlp.layers.{index}", n, k)
    return state | linear("blip.vision_proj", 8, 32) | linear("blip.text_proj", 8, 32)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def small_reward():
    model = ImageReward({**SMALL, "patch_size": 32}, {**SMALL, "vocab_size": 11, "max_position_embeddings": 64}).eval()
    state = published(2, 2)
    model.load_published(state)
    return model, {name: value.double() for name, value in state.items()}


def reward_tokenizer():
    """Of eleven words."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return Fast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def random_alexnet(folder, monkeypatch):
    """The network of LPIPS as torchvision would find it downloaded, with random weights."""
    import torchvision

    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    (folder / "checkpoints").mkdir()
    weights = torchvision.models.alexnet(weights=None).state_dict()
    torch.save(weights, folder / "checkpoints" / "alexnet-owt-7be5be79.pth")


def random_inception(monkeypatch):
    """torch-fidelity's network of FID with random weights."""
    import torch_fidelity.feature_extractor_inceptionv3 as fidelity

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)


VLM_WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "FIRST",
    "SECOND",
    "TIE",
    "maybe",
    "image",
    "the",
    "USER",
    "ASSISTANT",
]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT {% endif %}"
)  # fmt: skip


def make_vlm(folder):
    """A LLaVA of 2 + 2 layers: a CLIP encoder of 9 patches a picture, and a Llama."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VLM_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Fast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**size), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=24, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=len(VLM_WORDS), max_position_embeddings=512, pad_token_id=0,
                                bos_token_id=1, eos_token_id=2),
        image_token_index=4, image_token_id=4, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.5)
    said = [VLM_WORDS.index(w) for w in ("FIRST", "SECOND", "TIE", "maybe")]
    model.generation_config.suppress_tokens = [i for i in range(len(VLM_WORDS)) if i not in said]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
