"""A ComfyUI pack for the tests: what takes the text encoders' place.

The real ones of FLUX.1 and PixArt-Σ have 4.7 billion parameters (10 GB), so the tests replace the loader nodes of a
graph by the node below; everything after it, CLIPTextEncode included, is ComfyUI's own.

It also imports the installed package `dirotq`, so that every test runs with both copies in one process.
"""

import hashlib

import torch

import dirotq

assert dirotq.DiRotQConfig is not None

TOKENS, WIDTH, POOLED = 24, 4096, 768  # T5-XXL's and CLIP-L's widths


class TextEncoder:
    """Has the methods of comfy.sd.CLIP that text nodes call: a fixed random embedding of each word."""

    def clone(self, **_):
        return self

    def tokenize(self, text, **_):
        return text.lower().split()[: TOKENS - 1]

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False, **_):
        rows = [self._embed(word, WIDTH) for word in [*tokens, *["</s>"] * (TOKENS - len(tokens))]]
        cond = torch.stack(rows)[None]
        pooled = self._embed(" ".join(tokens), POOLED)[None]
        if return_dict:
            return {"cond": cond, "pooled_output": pooled}
        return (cond, pooled) if return_pooled else cond

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict=None, **_):
        cond, pooled = self.encode_from_tokens(tokens, return_pooled=True)
        return [[cond, {"pooled_output": pooled, **(add_dict or {})}]]

    def _embed(self, word, width):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        return torch.randn(width, generator=torch.Generator().manual_seed(seed))


class LoadTextEncoder:
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return (TextEncoder(),)


NODE_CLASS_MAPPINGS = {"DiRotQTestTextEncoder": LoadTextEncoder}
