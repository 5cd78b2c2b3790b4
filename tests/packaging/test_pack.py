"""What ComfyUI reads from the clone as files: templates, help pages, translations, requirements."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODES = {
    "DiRotQApply",
    "DiRotQCompare",
    "DiRotQLoRA",
    "DiRotQLoadModel",
    "DiRotQModelInfo",
    "DiRotQQuantizeModel",
}
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))


def pyproject():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_a_template_is_a_graph_with_a_thumbnail(path):
    from PIL import Image

    graph = json.loads(path.read_text(encoding="utf-8"))
    assert graph["version"] == 0.4 and graph["nodes"] and graph["links"]
    assert {n["type"] for n in graph["nodes"] if n["type"].startswith("DiRotQ")} <= NODES
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert thumbnail.format == "JPEG" and thumbnail.size == (512, 512)
        assert len(thumbnail.convert("P", palette=Image.Palette.ADAPTIVE, colors=16).getcolors()) > 8


def test_one_folder_of_templates_with_nothing_else_in_it():
    """ComfyUI knows five names for it and serves one folder only."""
    names = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert [n for n in names if (ROOT / n).is_dir()] == ["workflows"]
    assert len(TEMPLATES) == 5
    assert {p.suffix for p in (ROOT / "workflows").iterdir()} == {".json", ".jpg"}


def test_help_pages():
    pages = ROOT / "web" / "docs"
    assert {p.stem for p in pages.glob("*.md")} == {p.name for p in pages.iterdir() if p.is_dir()} == NODES
    for node in NODES:
        for page, heading in ((pages / f"{node}.md", "## Inputs"), (pages / node / "zh.md", "## 输入")):
            assert heading in page.read_text(encoding="utf-8")


def test_translations_name_the_same_things():
    en, zh = (json.loads((ROOT / "locales" / k / "nodeDefs.json").read_text(encoding="utf-8")) for k in ("en", "zh"))
    assert set(en) == set(zh) == NODES
    for node in NODES:
        for part in ("inputs", "outputs"):
            assert en[node][part].keys() == zh[node][part].keys()
        texts = [zh[node]["description"], *(v["tooltip"] for v in zh[node]["inputs"].values())]
        assert all(re.search("[一-鿿]", text) for text in texts)
        page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
        assert all(f"| `{name}` |" in page for name in en[node]["inputs"])


def test_requirements_leave_torch_and_triton_alone():
    """The Manager installs this file line by line; another torch or triton would break ComfyUI."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith("#")]
    assert not {"torch", "triton", "triton-windows", "torchvision", "torchaudio", "transformers"} & set(wanted)
    declared = {re.match(r"[\w-]+", line)[0]: line for line in pyproject()["project"]["dependencies"]}
    for line in lines:
        name = line and not line.startswith("#") and re.match(r"[\w-]+", line)[0]
        assert not name or declared.get(name, line) == line, "pyproject.toml asks for another version"


def test_bounds_of_comfy_kitchen_agree():
    code = "from dirotq.nodes.requirements import KITCHEN; print(*KITCHEN)"
    oldest, untested = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert f"comfy-kitchen>={oldest},<{untested}" in (ROOT / "requirements.txt").read_text(encoding="utf-8").split()


def test_the_registry_finds_its_table():
    table = pyproject()["tool"]["comfy"]
    assert table["PublisherId"] and table["DisplayName"] and table["requires-comfyui"] == ">=0.33.0"
    # ComfyUI would serve the help pages a second time, under the project's name.
    assert "web" not in table
    # Optional, but what is there must be an address, as must the repository's.
    given = [table.get("Icon"), pyproject()["project"]["urls"].get("Repository")]
    assert all(url.startswith("https://") for url in given if url is not None)


def test_the_registry_takes_name_and_version():
    """At most 99 characters, a letter first, no two separators in a row, and three numbers."""
    project = pyproject()["project"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", project["name"]) and len(project["name"]) < 100
    assert "comfyui" not in project["name"] and re.fullmatch(r"\d+\.\d+\.\d+", project["version"])


def test_no_rule_of_the_registry_is_broken():
    """No eval or exec, and nothing is installed at run time."""
    for path in [
        ROOT / "__init__.py",
        *(p for d in ("nodes", "dirotq_core", "kernels") for p in (ROOT / d).rglob("*.py")),
    ]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])(eval|exec)\(", text), path
        assert not re.search(r"subprocess\.\w+\([^)]*pip", text), path
