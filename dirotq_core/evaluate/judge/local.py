"""A judge that runs here, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .protocol import JudgeError, Message

#: The judge if none is named: open weights (Apache-2.0), several images in one question.
DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"


def load_processor(model: str, revision: str | None = None) -> Any:
    """What prepares the judge's input. ValueError if there is none, or no chat template."""
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(model, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"the judge {model!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if getattr(processor, "chat_template", None) is None or not hasattr(processor, "image_processor"):
        raise ValueError(f"the judge {model!r} has no chat template for images; give a model that follows instructions")
    return processor


class LocalJudge:
    """Call it with messages; it returns the reply, always the most likely one (greedy decoding).

    Args:
        model: folder or Hub id of a model that transformers knows as image-text-to-text.
        revision: of the Hub repository; None for its newest. max_tokens: of a reply.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, device: str = "cpu", revision: str | None = None, max_tokens: int = 512,
        dtype: torch.dtype = torch.bfloat16,
    ):  # fmt: skip
        from transformers import AutoModelForImageTextToText

        self.processor = load_processor(model, revision)
        try:
            network: Any = AutoModelForImageTextToText.from_pretrained(model, revision=revision, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"the judge {model!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        self.network = network.eval().to(device)
        self.device = device
        self.identity = {
            "model": model,
            "revision": getattr(network.config, "_commit_hash", None) or revision,
            "max_tokens": max_tokens,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def __call__(self, messages: Sequence[Message]) -> str:
        """The reply. JudgeError if the model cannot make one of these messages."""
        try:
            return self._reply(messages)
        except (RuntimeError, ValueError) as error:  # out of memory, and what templates and processors refuse
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise JudgeError(f"the judge {self.identity['model']!r} failed: {reason}") from error

    @torch.no_grad()
    def _reply(self, messages: Sequence[Message]) -> str:
        inputs = self.processor.apply_chat_template(
            [_message(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        ).to(self.device, self.network.dtype)  # fmt: skip
        out = self.network.generate(**inputs, max_new_tokens=self.identity["max_tokens"], do_sample=False)
        return self.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _message(message: Message) -> dict[str, Any]:
    from PIL import Image

    parts = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": Image.fromarray(p)}
        for p in message.parts
    ]
    return {"role": message.role, "content": parts}
