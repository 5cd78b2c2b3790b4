"""The embedded pipelines, drawn with few steps, and one calibrated checkpoint of each."""

import functools

import pytest
import torch

import dirotq
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline, prompts


class Embedded:
    """An embedded model; `quantized`, `report` and `folder`, a checkpoint, are of one calibration at the first use."""

    def __init__(self, name, folder):
        self.model = MODELS[name]
        self.call = {**self.model.call, "num_inference_steps": 3}
        self.captions = [s.caption() for s in prompts(9, seed=5, held_out=False)]
        self._folder = folder

    @functools.cached_property
    def _calibrated(self):
        pipeline = self.load()
        report = dirotq.quantize(pipeline, None, self.captions, call=self.call, progress=False)
        pipeline.save_pretrained(self._folder)
        report.save(self._folder)
        return pipeline, report, self._folder

    quantized, report, folder = (property(lambda self, i=i: self._calibrated[i]) for i in range(3))

    def load(self):
        return load_pipeline(self.model.name, torch_dtype=torch.bfloat16)

    def draw(self, pipeline):
        """Latents of one prompt."""
        generator = torch.Generator().manual_seed(7)
        return pipeline("a large red circle left of a small blue square on green", generator=generator,
                        output_type="latent", **self.call).images  # fmt: skip


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory):
    """`calibrated(name)`: an embedded model, for all tests the same."""
    return functools.cache(lambda name: Embedded(name, tmp_path_factory.mktemp(name) / "checkpoint"))


@pytest.fixture(scope="session", params=list(MODELS))
def embedded(request, calibrated):
    return calibrated(request.param)


@pytest.fixture(scope="session")
def pixart(calibrated):
    return calibrated("pixart-sigma-tiny")
