"""Model Info through the API: checkpoints on disk, loaded models, its plot, and its errors."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dirotq.dirotq_core.inspect import inspect_checkpoint
from dirotq.nodes import info_plot, info_rows

from . import graphs, models
from .graphs import node
from .server import GraphError


def info(**inputs):
    return {
        "info": node("DiRotQModelInfo", **{"checkpoint": "", "limit": 3, **inputs}),
        "out": node("SaveImage", images=["info", 1], filename_prefix="info"),
    }


def test_a_folder(client):
    outputs = client.run(info(checkpoint=models.FLUX_4BIT))
    text = outputs["info"]["text"][0]
    found = inspect_checkpoint(client.base / "models" / "diffusion_models" / models.FLUX_4BIT)
    assert f"{found.total_bytes / 2**20:.1f} MiB, {found.average_bits:.2f} bits per parameter" in text
    assert "W4A8: " in text and "W4A16: " in text and text.count(" × ") == 3
    plot = np.asarray(Image.open(client.file(outputs["out"]["images"][0])))
    assert plot.shape == (540, 960, 3) and len(np.unique(plot)) > 20


def test_a_dense_model(client):
    prompt = info(model=["model", 0]) | {"model": graphs.dense_flux()}
    text = client.run(prompt)["info"]["text"][0]
    assert text.startswith("Flux\n") and "bits per parameter on average" in text and "no layer is quantized" in text


def test_a_loaded_model_says_what_its_checkpoint_says(client):
    """The same layers under their other names; fused ones are fewer, so bytes are compared over all of them."""
    prompt = info(model=["model", 0]) | {"model": graphs.four_bit(models.FLUX_4BIT)}
    loaded = client.run(prompt)["info"]["text"][0]
    stored = client.run(info(checkpoint=models.FLUX_4BIT))["info"]["text"][0]
    for scheme in ("W4A8", "W4A16"):
        size = re.compile(rf"^{scheme}: \d+ linears, ([\d.]+) MiB", re.M)
        assert float(size.search(loaded)[1]) == pytest.approx(float(size.search(stored)[1]), abs=0.11)


def test_a_quantized_weight_counts_with_its_side_tensors(monkeypatch):
    """On a layout of comfy-kitchen's own, which holds its tensors as ours does."""
    from comfy_kitchen.tensor import QuantizedTensor

    monkeypatch.setattr(info_rows, "LAYOUT", "TensorCoreFP8Layout")
    monkeypatch.setattr(info_rows, "scheme", lambda params: "fp8")
    weight = QuantizedTensor.from_float(torch.randn(32, 64), "TensorCoreFP8Layout")
    network = torch.nn.Module()
    network.first = torch.nn.Linear(64, 32)
    network.first.weight = torch.nn.Parameter(weight, requires_grad=False)
    summary = info_rows.of_model(SimpleNamespace(model=SimpleNamespace(diffusion_model=network)))
    (row,) = summary.rows
    codes, scale, bias = 32 * 64, 4, 32 * 4
    assert (row.name, row.out_features, row.in_features) == ("first", 32, 64) and row.bytes == codes + scale
    assert summary.total_bytes == codes + scale + bias and summary.parameters == 32 * 64 + 32
    with pytest.raises(ValueError, match="no diffusion model"):
        info_rows.of_model(object())


def test_without_matplotlib_the_plot_says_so(monkeypatch, caplog):
    monkeypatch.setattr(info_plot, "find_spec", lambda name: None)
    picture = info_plot.plot(info_rows.Summary("title", [], 0, 0))
    assert picture.shape == (1, 540, 960, 3) and 0 <= picture.min() < 0.5 < picture.max() <= 1
    assert "pip install matplotlib" in caplog.text


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "needs a model or the name of a checkpoint"),
        ({"checkpoint": "absent"}, "no file or folder 'absent'; looked for .*diffusion_models"),
        ({"checkpoint": models.FLUX}, "tiny-flux"),
    ],
)
def test_errors(client, inputs, message):
    with pytest.raises(GraphError, match=message):
        client.run(info(**inputs))
