"""The pack as ComfyUI loads it: nodes, help pages, translations, templates, and what loading costs."""

import pytest

from .server import PACK, GraphError

OURS = tuple(f"DiRotQ{n}" for n in ("Apply", "Compare", "LoRA", "LoadModel", "ModelInfo", "QuantizeModel"))


def test_nodes_come_from_the_clone_alone(object_info):
    """The stand-in pack imports the installed package as well; every node is registered once, by the clone."""
    ours = {name: info for name, info in object_info.items() if info["category"] == "DiRotQ"}
    assert set(ours) >= set(OURS)
    assert {info["python_module"] for info in ours.values()} == {f"custom_nodes.{PACK}"}
    assert len({info["display_name"] for info in ours.values()}) == len(ours)


def test_loading_is_quiet_and_quick(server):
    log = server.log()
    assert "IMPORT FAILED: " + PACK not in log and "DiRotQ's nodes are not available" not in log
    assert "Traceback" not in "".join(line for line in log.splitlines() if PACK in line)
    assert server.import_seconds() < 0.5


def test_every_input_has_a_tooltip(object_info):
    for name in [n for n in object_info if n.startswith("DiRotQ") and "Test" not in n]:
        info = object_info[name]
        assert info["description"], name
        for group in ("required", "optional"):
            for key, spec in info["input"].get(group, {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{name}.{key}"


def test_help_pages_are_served(client):
    for name in OURS:
        for page, word in ((f"{name}.md", b"## Inputs"), (f"{name}/zh.md", "## 输入".encode())):
            assert word in client.read(f"/extensions/{PACK}/docs/{page}")


def test_translations_are_those_of_the_nodes(client, object_info):
    translations = client.get("/i18n")
    for name in [n for n in object_info if n.startswith("DiRotQ") and "Test" not in n]:
        info, english = object_info[name], translations["en"]["nodeDefs"][name]
        assert english["display_name"] == info["display_name"] and english["description"] == info["description"]
        specs = info["input"].get("required", {}) | info["input"].get("optional", {})
        assert {k: v["tooltip"] for k, v in english["inputs"].items()} == {k: v[1]["tooltip"] for k, v in specs.items()}
        assert [v["name"] for v in english["outputs"].values()] == info["output_name"]
        assert translations["zh"]["nodeDefs"][name]["display_name"]


def test_a_wrong_prompt_leaves_the_server_up(client):
    with pytest.raises(GraphError, match="checkpoint"):
        client.run({"1": {"class_type": "DiRotQModelInfo", "inputs": {"limit": 3}}})
    assert client.get("/queue") == {"queue_running": [], "queue_pending": []}


def test_nodes_that_take_long_show_their_progress(object_info):
    """Text on a node goes to its id, which ComfyUI hands only to nodes that ask for it."""
    for name in ("DiRotQQuantizeModel", "DiRotQApply"):
        assert object_info[name]["input"]["hidden"]["unique_id"] == ["UNIQUE_ID"]
