"""Draw an embedded model's prompts from a saved pipeline: ``python -m dirotq.dirotq_core.demo.draw``.

A program of its own, because the demo's claim is that a fresh process loads the checkpoint as a user would.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .embedded import MODELS, EmbeddedModel, prompts


def draw(pipeline: Any, model: EmbeddedModel, n_prompts: int, seed: int, progress: bool = True) -> list[Any]:
    """PIL images of the first `n_prompts` held-out prompts, image i with seed i."""
    import torch

    captions = [s.caption() for s in prompts(n_prompts, seed)]
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(caption, generator=torch.Generator("cpu").manual_seed(i), **model.call).images[0]
        for i, caption in enumerate(tqdm(captions, desc="drawing", unit="image", disable=not progress))
    ]


def main(argv: list[str]) -> None:
    name, folder, images, options = argv
    settings = json.loads(options)
    import diffusers
    import torch

    model = MODELS[name]
    pipeline = getattr(diffusers, model.pipeline).from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipeline.to(settings["device"])
    out = Path(images)
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(draw(pipeline, model, settings["prompts"], settings["seed"])):
        image.save(out / f"{i:03d}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
