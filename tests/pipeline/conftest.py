"""The embedded pipelines, drawn with few steps, and one calibrated checkpoint of each."""

import pytest
import torch

import dirotq
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline, prompts


class Embedded:
    """An embedded model with a calibrated checkpoint of it in `folder`."""

    def __init__(self, name, folder):
        self.model = MODELS[name]
        self.call = {**self.model.call, "num_inference_steps": 3}
        self.captions = [s.caption() for s in prompts(9, seed=5, held_out=False)]
        self.folder = folder
        pipeline = self.load()
        self.report = dirotq.quantize(pipeline, None, self.captions, call=self.call, progress=False)
        self.quantized = pipeline
        pipeline.save_pretrained(folder)
        self.report.save(folder)

    def load(self):
        return load_pipeline(self.model.name, torch_dtype=torch.bfloat16)

    def draw(self, pipeline):
        """Latents of one prompt."""
        generator = torch.Generator().manual_seed(7)
        return pipeline("a large red circle left of a small blue square on green", generator=generator,
                        output_type="latent", **self.call).images  # fmt: skip


@pytest.fixture(scope="session", params=list(MODELS))
def embedded(request, tmp_path_factory):
    return Embedded(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint")


@pytest.fixture(scope="session")
def pixart(tmp_path_factory):
    return Embedded("pixart-sigma-tiny", tmp_path_factory.mktemp("pixart") / "checkpoint")
