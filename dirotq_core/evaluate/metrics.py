"""The metrics by name: what they need, and how one picture is scored.

Networks come from well-kept libraries, which fetch their weights when they are first used. Nothing of them is imported
before a metric that needs it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from ..metrics import psnr, ssim

#: PSNR of equal pictures, which is infinite, in means.
PSNR_CAP = 100.0
CLIP_MODEL = "openai/clip-vit-large-patch14"

#: (picture, the reference's picture, prompt) → score. Pictures uint8 [H, W, 3].
Scorer = Callable[[np.ndarray, np.ndarray, str], float]


@dataclass(frozen=True)
class Metric:
    """label, unit, better: for people; better is "higher" or "lower". of_pairs: whether the reference's picture enters.

    load: makes the scorer on a device; None for FID, which is of whole sets. modules: that must be installed.
    """

    label: str
    better: str
    load: Callable[[str], Scorer] | None
    unit: str = ""
    of_pairs: bool = False
    modules: tuple[str, ...] = ()
    digits: int = 3


def _psnr(device: str) -> Scorer:
    return lambda image, reference, prompt: min(psnr(image, reference), PSNR_CAP)


def _ssim(device: str) -> Scorer:
    return lambda image, reference, prompt: ssim(image, reference)


def _lpips(device: str) -> Scorer:
    """AlexNet's (Zhang et al. 2018), as torchmetrics has it."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    @torch.no_grad()
    def score(image: np.ndarray, reference: np.ndarray, prompt: str) -> float:
        pair = [torch.from_numpy(x.copy()).permute(2, 0, 1)[None].to(device).float() / 255 for x in (image, reference)]
        value = network(*pair)  # the batch's own value; its running mean is not used
        network.reset()
        return float(value)

    return score


def _clip(device: str) -> Scorer:
    """100 · max(cos, 0) of CLIP's embeddings of picture and prompt (Hessel et al. 2021, without their factor 2.5)."""
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(CLIP_MODEL).eval().to(device)
    processor: Any = CLIPProcessor.from_pretrained(CLIP_MODEL)

    @torch.no_grad()
    def score(image: np.ndarray, reference: np.ndarray, prompt: str) -> float:
        from PIL import Image

        inputs = processor(
            text=[prompt], images=[Image.fromarray(image)], return_tensors="pt", padding=True, truncation=True
        ).to(device)
        out = model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds.double(), out.text_embeds.double())
        return 100 * max(float(cosine), 0.0)

    return score


def _image_reward(device: str) -> Scorer:
    from .image_reward import load_image_reward

    return load_image_reward(device)


METRICS = {
    "psnr": Metric("PSNR", "higher", _psnr, "dB", of_pairs=True, digits=2),
    "ssim": Metric("SSIM", "higher", _ssim, of_pairs=True, digits=4),
    "lpips": Metric("LPIPS", "lower", _lpips, of_pairs=True, modules=("torchmetrics", "torchvision"), digits=4),
    "fid": Metric("FID", "lower", None, modules=("torch_fidelity", "torchvision"), digits=2),
    "clip": Metric("CLIP score", "higher", _clip, modules=("transformers",), digits=2),
    "imagereward": Metric("ImageReward", "higher", _image_reward, modules=("transformers",)),
}


def check_installed(names: Sequence[str]) -> None:
    """ImportError says what to install if the report, or a metric of `names`, needs what is not there."""
    for module, package in (("PIL", "pillow"), ("matplotlib", "matplotlib")):
        if find_spec(module) is None:
            raise ImportError(f"the report needs {package}; install with: pip install {package}")
    for name in names:
        missing = [m for m in METRICS[name].modules if find_spec(m) is None]
        if missing:
            packages = " ".join(m.replace("_", "-") for m in missing)
            raise ImportError(f"metric {name!r} needs {packages}; install with: pip install {packages}")


def load_scorer(name: str, device: str) -> Scorer:
    """The scorer of a metric of single pictures. ValueError if its weights cannot be had."""
    make = METRICS[name].load
    assert make is not None, f"{name} is of whole sets"
    try:
        return make(device)
    except (OSError, RuntimeError, ImportError) as error:
        raise ValueError(f"metric {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
