"""Compare through the API: numbers against the metrics of the reports, the picture, and its errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from dirotq.dirotq_core.metrics import psnr, ssim

from . import graphs
from .graphs import node
from .server import GraphError


@pytest.fixture(scope="module")
def pictures(server):
    """Two 40 × 24 pictures in ComfyUI's input folder, and one of another size."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 9, a.shape), 0, 255).astype(np.uint8)
    for name, image in (("a", a), ("b", b), ("small", b[:12])):
        Image.fromarray(image).save(server.base / "input" / f"{name}.png")
    return a, b


def compare(a="a.png", b="b.png", **more):
    prompt = {
        "a": node("LoadImage", image=a),
        "b": node("LoadImage", image=b),
        "c": node("DiRotQCompare", gain=8.0, image_a=["a", 0], image_b=["b", 0]),
        "psnr": node("PreviewAny", source=["c", 1]),
        "ssim": node("PreviewAny", source=["c", 2]),
        "out": node("SaveImage", images=["c", 0], filename_prefix="compare"),
    }
    prompt["c"]["inputs"] |= more
    return prompt


def test_numbers_and_picture(client, pictures):
    a, b = pictures
    outputs = client.run(compare())
    assert float(outputs["psnr"]["text"][0]) == pytest.approx(psnr(b, a))
    assert float(outputs["ssim"]["text"][0]) == pytest.approx(ssim(b, a))
    assert outputs["c"]["text"] == [f"PSNR {psnr(b, a):.2f} dB, SSIM {ssim(b, a):.4f} (1 image of 40 × 24)"]
    assert outputs["c"]["images"]
    picture = np.asarray(Image.open(client.file(outputs["out"]["images"][0])), dtype=int)
    difference = np.clip(8 * np.abs(a.astype(int) - b), 0, 255)
    np.testing.assert_array_equal(picture, np.concatenate([a, b, difference], axis=1))


def test_equal_pictures(client, pictures):
    outputs = client.run(compare(b="a.png"))
    assert outputs["psnr"]["text"] == ["inf"] and float(outputs["ssim"]["text"][0]) == pytest.approx(1)


def test_latents(client):
    prompt = graphs.sampled(graphs.dense_flux(), steps=1)
    other = graphs.sampled(graphs.dense_flux(), steps=2)
    prompt["other"], prompt["save2"] = other["latent"], node("SaveLatent", samples=["other", 0], filename_prefix="l/b")
    prompt["c"] = node("DiRotQCompare", gain=2.0, latent_a=["latent", 0], latent_b=["other", 0])
    prompt["out"] = node("SaveImage", images=["c", 0], filename_prefix="latents")
    prompt["psnr"] = node("PreviewAny", source=["c", 1])
    outputs = client.run(prompt)
    a = graphs.saved_latent(client, outputs).double()
    b = graphs.saved_latent(client, {"save": outputs["save2"]}).double()
    expected = 20 * torch.log10((a.max() - a.min()) / (a - b).square().mean().sqrt())
    assert float(outputs["psnr"]["text"][0]) == pytest.approx(expected.item(), abs=1e-4)
    assert Image.open(client.file(outputs["out"]["images"][0])).size == (3 * 64, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": "small.png"}, "two images of one size"),
        ({"image_b": None}, "image_a but no image_b"),
        ({"image_a": None, "image_b": None}, "either image_a and image_b or latent_a and latent_b"),
    ],
)
def test_errors(client, pictures, change, message):
    prompt = compare(**change)
    prompt["c"]["inputs"] = {k: v for k, v in prompt["c"]["inputs"].items() if v is not None}
    with pytest.raises(GraphError, match=message):
        client.run(prompt)
