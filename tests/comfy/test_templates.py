"""The templates in workflows/: known nodes, matching widgets, and each one executed through the API on small models."""

import re

import pytest
from PIL import Image

from . import models, workflow
from .graphs import node
from .server import PACK, ROOT

TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
EXPECTED = {
    "compare-bf16-with-4bit",
    "flux1-text-to-image-4bit",
    "lora-on-4bit-flux1",
    "pixart-sigma-4bit",
    "quantize-your-own-model",
}

#: (node type, input) → what a small model's run takes instead of the value in the template.
SMALL = {
    ("UNETLoader", "unet_name"): models.FLUX,
    ("DiRotQLoadModel", "model_name"): {"flux": models.FLUX_4BIT, "pixart": models.PIXART_4BIT},
    ("DiRotQLoRA", "lora_name"): models.LORA,
    ("VAELoader", "vae_name"): {"ae": models.VAE_16, "sdxl": models.VAE_4},
    # Core's PixArt divides by zero below 512 pixels.
    ("EmptyLatentImage", "width"): 512,
    ("EmptyLatentImage", "height"): 512,
    ("EmptySD3LatentImage", "width"): 64,
    ("EmptySD3LatentImage", "height"): 64,
    ("KSampler", "steps"): 2,
    ("DiRotQQuantizeModel", "samples"): 2,
    ("DiRotQQuantizeModel", "steps"): 2,
    ("DiRotQQuantizeModel", "width"): 64,
    ("DiRotQQuantizeModel", "height"): 64,
    ("DiRotQQuantizeModel", "filename"): "from-template",
    ("DiRotQQuantizeModel", "prompts"): "a red circle\na blue square",
}
TEXT_ENCODERS = ("CLIPLoader", "DualCLIPLoader")


every_template = pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)


def shrunk(prompt):
    """The prompt with small models and sizes, and the stand-in for the text encoders."""
    for number, entry in prompt.items():
        kind = entry["class_type"]
        if kind in TEXT_ENCODERS:
            prompt[number] = node("DiRotQTestTextEncoder")
        for name, value in entry["inputs"].items():
            small = SMALL.get((kind, name), value)
            if isinstance(small, dict):
                small = next(v for start, v in small.items() if value.startswith(start))
            entry["inputs"][name] = small
    return prompt


def test_all_are_here_and_listed(client):
    assert {p.stem for p in TEMPLATES} == EXPECTED
    assert set(client.get("/workflow_templates")[PACK]) == EXPECTED
    for name in EXPECTED:
        assert client.read(f"/api/workflow_templates/{PACK}/{name}.jpg")[:2] == b"\xff\xd8"
        assert client.get(f"/api/workflow_templates/{PACK}/{name}.json")["version"] == 0.4


@every_template
def test_nodes_and_widgets_are_known(path, object_info):
    graph = workflow.load(path)
    workflow.check_links(graph)
    for n in graph["nodes"]:
        if n["type"] in workflow.NOTES:
            continue
        definition = object_info[n["type"]]
        values = workflow.widget_values(n, definition)
        assert {i["name"] for i in n["inputs"]} <= set(workflow.input_names(definition))
        assert [o["type"] for o in n["outputs"]] == definition["output"]
        for name, kind, settings in workflow.widgets(definition):
            options = kind if isinstance(kind, list) else settings.get("options")
            of_files = (n["type"], name) in SMALL or (n["type"] in TEXT_ENCODERS and name.startswith("clip_name"))
            if name and options and not of_files:
                assert values[name] in options, f"{n['type']}.{name} is {values[name]!r}"


@every_template
def test_executes(path, client, object_info):
    prompt = shrunk(workflow.to_prompt(workflow.load(path), object_info))
    outputs = client.run(prompt, timeout=180)
    saved = [outputs[n] for n, entry in prompt.items() if entry["class_type"] == "SaveImage"]
    assert saved
    for reference in (image for out in saved for image in out["images"]):
        low_high = Image.open(client.file(reference)).convert("L").getextrema()
        assert low_high[1] - low_high[0] > 10, "the picture is flat"
    for n, entry in prompt.items():
        if entry["class_type"] == "DiRotQModelInfo":
            assert re.search(r"W4A\d+: \d+ linears", outputs[n]["text"][0])
        if entry["class_type"] == "DiRotQCompare":
            decibels = re.match(r"PSNR ([\d.]+) dB", outputs[n]["text"][0])
            assert 15 < float(decibels[1]) < 60  # one random model in 16 bit and in 4


def test_conversion_follows_reroutes_bypasses_and_primitives(object_info):
    """The converter on what the templates do not use but a saved graph may hold."""

    def entry(number, kind, mode=0, values=(), inputs=(), outputs=()):
        slots = [{"name": n, "type": t, "link": i} for n, t, i in inputs]
        ends = [{"name": t, "type": t, "links": list(i)} for t, i in outputs]
        return {
            "id": number,
            "type": kind,
            "mode": mode,
            "widgets_values": list(values),
            "inputs": slots,
            "outputs": ends,
        }

    graph = {
        "nodes": [
            entry(
                1, "EmptySD3LatentImage", values=[64, 64, 1], inputs=[("width", "INT", 4)], outputs=[("LATENT", [1])]
            ),
            entry(2, "Reroute", inputs=[("", "*", 1)], outputs=[("LATENT", [2])]),
            entry(3, "LatentFlip", 4, ["x-axis: vertically"], [("samples", "LATENT", 2)], [("LATENT", [3])]),
            entry(4, "SaveLatent", values=["x"], inputs=[("samples", "LATENT", 3)]),
            entry(5, "PrimitiveNode", values=[128, "fixed"], outputs=[("INT", [4])]),
            entry(6, "MarkdownNote", values=["text"]),
        ],
        "links": [
            [1, 1, 0, 2, 0, "LATENT"],
            [2, 2, 0, 3, 0, "LATENT"],
            [3, 3, 0, 4, 0, "LATENT"],
            [4, 5, 0, 1, 0, "INT"],
        ],
        "last_node_id": 6,
        "last_link_id": 4,
    }
    workflow.check_links(graph)
    assert workflow.to_prompt(graph, object_info) == {
        "1": node("EmptySD3LatentImage", width=128, height=64, batch_size=1),
        "4": node("SaveLatent", samples=["1", 0], filename_prefix="x"),
    }


def test_checks_find_mistakes(object_info):
    graph = workflow.load(TEMPLATES[0])
    graph["links"][0][5] = "WRONG"
    with pytest.raises(ValueError, match="of type WRONG"):
        workflow.check_links(graph)
    sampler = next(n for n in graph["nodes"] if n["type"] == "KSampler")
    sampler["widgets_values"] = sampler["widgets_values"][:-1]
    with pytest.raises(ValueError, match="has 6 values for the widgets"):
        workflow.widget_values(sampler, object_info["KSampler"])
