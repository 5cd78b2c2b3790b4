"""Two embedded pipelines, two checkpoints of each made without data, four prompts, two steps."""

import pytest
import torch
from PIL import Image

import dirotq
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline, prompts
from dirotq.dirotq_core.evaluate import EvaluationOptions, Prompt

from .stand_ins import make_clip, make_vlm

METHODS = ("hadamard", "rtn")


class Models:
    """An embedded pipeline, `folder`, and checkpoints of it by method."""

    def __init__(self, name, base):
        self.folder = MODELS[name].folder
        self.call = {**MODELS[name].call, "num_inference_steps": 2}
        self.checkpoints = {method: base / method for method in METHODS}
        for method, folder in self.checkpoints.items():
            pipeline = load_pipeline(name, torch_dtype=torch.bfloat16)
            dirotq.quantize(pipeline, dirotq.DiRotQConfig(method=method), None, progress=False)
            pipeline.save_pretrained(folder)

    @property
    def sources(self):
        return [f"{method}={folder}" for method, folder in self.checkpoints.items()]

    @property
    def reference(self):
        return f"bf16={self.folder}"

    def options(self, **changes):
        return EvaluationOptions(**{"call": self.call, "progress": False, "resamples": 200, **changes})


@pytest.fixture(scope="session")
def pixart(tmp_path_factory):
    return Models("pixart-sigma-tiny", tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    return Models("flux-tiny", tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def four():
    return [Prompt(f"scene-{i}", s.caption()) for i, s in enumerate(prompts(4, seed=3))]


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The folder of a small CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    make_clip(folder)
    return folder


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    """The folder of a small vision-language model."""
    folder = tmp_path_factory.mktemp("vlm")
    make_vlm(folder)
    return folder


@pytest.fixture
def folder_of_images():
    """Make `folder` with a picture of noise per id, all of one size."""
    import numpy as np

    def make(folder, ids, seed=0, size=(64, 48)):
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        for name in ids:
            pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}.png")
        return folder

    return make
