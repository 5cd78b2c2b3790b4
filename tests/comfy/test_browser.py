"""ComfyUI's interface in a headless browser: nodes and templates appear, and it reads the templates as the tests do."""

import importlib.util
import shutil

import pytest
from PIL import Image

from . import workflow
from .server import PACK, ROOT
from .test_server import OURS
from .test_templates import EXPECTED, every_template

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOAD_SECONDS = 60


def _reason():
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (pip install playwright)"
    if CHROMIUM is None:
        return "no chromium or google-chrome on PATH"
    return None


pytestmark = pytest.mark.skipif(_reason() is not None, reason=str(_reason()))


@pytest.fixture(scope="module")
def page(client):
    """A fresh visitor's page; ComfyUI greets them with the templates."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without its sandbox, which needs privileges that containers lack; it visits our own server only.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(1000 * LOAD_SECONDS)
        page.goto(client.url)
        page.wait_for_function("() => window.app?.graph && window.LiteGraph?.registered_node_types['KSampler']")
        yield page
        browser.close()


def test_nodes_appear(page):
    titles = page.evaluate("() => Object.entries(LiteGraph.registered_node_types).map(([k, v]) => [k, v.title])")
    found = dict(titles)
    assert set(OURS) <= set(found)
    assert found["DiRotQCompare"] == "Compare (DiRotQ)"


def test_templates_appear_with_their_thumbnails(page, tmp_path):
    page.get_by_text(PACK, exact=True).click()
    for name in EXPECTED:
        page.get_by_text(name, exact=True).first.wait_for()
    # Five thumbnails, fetched and decoded.
    page.wait_for_function(f"() => [...document.images].filter(i => i.naturalWidth === 512).length === {len(EXPECTED)}")
    page.screenshot(path=tmp_path / "templates.png")
    image = Image.open(tmp_path / "templates.png").convert("RGB")
    colours = {tuple(c // 32 for c in pixel) for _, pixel in image.getcolors(image.width * image.height)}
    assert {(4, 1, 5), (7, 7, 1)} <= colours, "neither the purple nor the yellow of the thumbnails is on the screen"


def test_a_template_opens_by_a_click(page, tmp_path):
    name = sorted(EXPECTED)[1]
    page.get_by_text(name, exact=True).first.click()
    expected = sorted(n["type"] for n in workflow.load(ROOT / "workflows" / f"{name}.json")["nodes"])
    page.wait_for_function(f"() => app.graph._nodes.length === {len(expected)}")
    assert sorted(page.evaluate("() => app.graph._nodes.map(n => n.type)")) == expected
    page.screenshot(path=tmp_path / "graph.png")
    assert len(Image.open(tmp_path / "graph.png").convert("RGB").getcolors(2**24)) > 100


@every_template
def test_the_interface_makes_the_same_prompt(path, page, object_info):
    graph = workflow.load(path)
    code = "async (g) => { await app.loadGraphData(g); return (await app.graphToPrompt()).output }"
    made = {k: {"class_type": v["class_type"], "inputs": v["inputs"]} for k, v in page.evaluate(code, graph).items()}
    assert made == workflow.to_prompt(graph, object_info)
