"""Model Info through the API: checkpoints on disk, loaded models, its plot, and its errors."""

import numpy as np
import pytest
from PIL import Image

from dirotq.dirotq_core.inspect import inspect_checkpoint

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
