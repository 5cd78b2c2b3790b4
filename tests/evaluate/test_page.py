"""The report as a page: complete in itself, true to the numbers, and a browser shows it."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dirotq.dirotq_core.evaluate import Prompt, evaluate
from dirotq.dirotq_core.evaluate.page import write_page
from dirotq.dirotq_core.evaluate.plots import plots
from dirotq.dirotq_core.evaluate.summary import cell, columns_of, notes, table_csv, table_text

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '"><script>alert(1)</script> & co'


class Page(HTMLParser):
    """What is in a page. images: alternative text → source. cells: of all tables."""

    def __init__(self, text):
        super().__init__()
        self.images, self.cells, self.tags, self.links = [], [], set(), []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]
        if tag == "img":
            self.images.append((values["alt"], values["src"]))
        if tag in ("td", "th"):
            self.cells.append("")
            self._open = True

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Twelve prompts, one hostile, and folders of images: red and green, and two models that come near to them."""
    from dirotq.dirotq_core.evaluate import EvaluationOptions

    base = tmp_path_factory.mktemp("report")
    prompts = [Prompt(f"p{i:02d}", HOSTILE if i == 4 else f"scene {i}") for i in range(12)]
    generator = np.random.default_rng(0)
    for name, spread in (("ours", 4), ("theirs, 4 bit", 30), ("reference", 0)):
        (base / name).mkdir()
        for i, p in enumerate(prompts):
            pixels = np.full((40, 40, 3), ((200, 30, 30), (30, 180, 30))[i % 2], float)
            noise = generator.normal(0, spread * (3 if i == 7 else 1), pixels.shape) if spread else 0
            Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(base / name / f"{p.id}.png")
    options = EvaluationOptions(progress=False, resamples=500, shown=3)
    models = [str(base / "ours"), str(base / "theirs, 4 bit")]
    result = evaluate(models, str(base / "reference"), prompts, base / "out", options)
    return base / "out", result


def test_it_needs_nothing_else(report):
    text = (report[0] / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == [] and not {"script", "link", "iframe"} & page.tags
    assert HOSTILE not in text and "url(" not in text.replace("url(#", "")
    assert all(source.startswith("data:image/jpeg;base64,") for _, source in page.images)


def test_its_grid_shows_some_and_the_worst(report):
    page = Page((report[0] / "index.html").read_text(encoding="utf-8"))
    shown = [alt for alt, _ in page.images if alt.startswith("ours: ")]
    # 0, 5.5 rounded to the even one, 11; then the four with most noise, p07 at first.
    assert shown[:3] == ["ours: scene 0", "ours: scene 6", "ours: scene 11"]
    assert len(shown) == 7 and shown[3] == "ours: scene 7"
    assert len(page.images) == 7 * 3


def test_its_tables_are_the_numbers(report):
    out, result = report
    cells = Page((out / "index.html").read_text(encoding="utf-8")).cells
    assert result == json.loads((out / "report.json").read_text())
    text = table_text(result)
    for row in result["rows"]:
        for key, _ in columns_of(result):
            assert cell(row, key) in cells and cell(row, key) in text
    value = result["rows"][1]["metrics"]["psnr"]
    assert cell(result["rows"][1], "psnr") == f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    start = cells.index("ours − theirs, 4 bit")
    assert cells[start + 1] == "PSNR" and cells[start + 3] == "ours"


def test_its_plots_name_what_they_show(report):
    (caption, svg), *rest = plots(report[1])
    assert "95 %" in caption and svg.startswith("<svg") and not rest
    assert svg == plots(report[1])[0][1], "the same bytes every time"
    labels = re.findall(r">([^<>]+)</text>", svg)
    assert {"ours", "theirs, 4 bit", "PSNR, dB (higher is better)", "SSIM (higher is better)"} <= set(labels)


def test_all_that_it_can_show():
    """A result with sizes, FID and a judge, as `summarize` makes it."""
    interval = {"mean": 0.25, "low": -0.1, "high": 0.6}
    judged = {"preference": interval, "won": 0.5, "tied": 0.25, "lost": 0.25, "agreement": 0.75, "first": 0.6,
              "judged": 40, "unread": 0}  # fmt: skip
    base = {"kind": "pipeline", "control": False, "reference": False, "activation_bits": 4, "linear_bits": 4.4}
    rows = [
        {**base, "name": "bf16", "reference": True, "bytes": 23.8e9, "bits": 16.0, "linear_bits": None, "metrics": {},
         "judge": {}},
        {**base, "name": "a", "bytes": 6.6e9, "bits": 4.44, "fid": 3.25, "judge": {"quality": judged},
         "metrics": {"psnr": {"mean": 20.5, "low": 20.1, "high": 20.9}}},
        {**base, "name": "b", "bytes": 6.2e9, "bits": 4.1, "fid": 4.5, "judge": {"quality": {
            **judged, "against_control": interval}}, "metrics": {"psnr": {"mean": 18.5, "low": 18.1, "high": 18.9}}},
    ]  # fmt: skip
    result = {"rows": rows, "differences": [], "notes": ["a note"], "call": {"num_inference_steps": 28},
              "prompts": {"count": 40, "digest": "40 prompts, abc"}, "dtype": "bfloat16", "device": "cpu",
              "versions": {"torch": "2"}, "judge": {"model": "judge & co"}}  # fmt: skip
    text = write_page(result, [], [], {}, 0)
    cells = Page(text).cells
    for value in ("23,800.0", "4.44", "3.25", "20.50 [20.10, 20.90]", "+0.25 [-0.10, +0.60]", "75%", "60%", "40"):
        assert value in cells
    assert text.count("<svg") == 3 and "judge &amp; co was asked" in text
    assert "FID to reference ↓" in table_text(result)


def row(name, judged=None, kind="pipeline", bits=16.0):
    interval = {"mean": 0.0, "low": -0.1, "high": 0.1}
    entry = {"preference": interval, "against_control": interval, "won": 0.25, "tied": 0.5, "lost": 0.25,
             "agreement": 0.75, "first": 0.5, "judged": judged, "unread": 0}  # fmt: skip
    return {"name": name, "kind": kind, "control": False, "reference": False, "bytes": 1, "bits": bits,
            "linear_bits": None, "activation_bits": None, "metrics": {},
            "judge": {} if judged is None else {"quality": entry}}  # fmt: skip


def test_the_judges_columns_are_in_the_table_of_data():
    head, _, line = table_csv({"rows": [row("bf16"), row("a", 40)]}).splitlines()
    cells = dict(zip(head.split(","), line.split(","), strict=True))
    assert cells["judge_quality_judged"] == "40" and cells["judge_quality_first"] == "0.5"
    assert [cells[f"judge_quality_against_control{end}"] for end in ("", "_low", "_high")] == ["0.0", "-0.1", "0.1"]


def test_notes_are_of_what_was_judged():
    """Of 40 prompts 12 were judged: the intervals of the judge are too narrow, and the others are not."""
    found = notes({"rows": [row("bf16"), row("a", 12), row("b", 40)], "prompts": {"count": 40}})
    assert found == ["The judge's intervals about quality of 'a' are of 12 prompts and too narrow."]


def test_a_quantized_reference_is_told():
    for bits, told in ((16.0, False), (4.4, True), (None, True)):
        found = notes({"rows": [row("base", bits=bits), row("a")], "prompts": {"count": 40}})
        assert any("reference 'base' is itself quantized" in note for note in found) is told


def test_seeds_of_pictures_by_others_are_not_claimed(report):
    out, _ = report
    text = (out / "index.html").read_text(encoding="utf-8")
    assert "with the same seeds" not in text and "reference, ours, theirs, 4 bit were drawn elsewhere" in text
    with (out / "prompts.csv").open(encoding="utf-8") as f:
        assert {line["seed"] for line in csv.DictReader(f)} == {""}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")
def test_a_browser_shows_it(report, tmp_path):
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600",
               f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]  # fmt: skip
    subprocess.run([*command, (report[0] / "index.html").as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    red, green = (np.abs(pixels - colour).sum(-1) < 60 for colour in ((200, 30, 30), (30, 180, 30)))
    assert red.sum() > 10_000 and green.sum() > 10_000, "the pictures are not on the screen"
    blue = np.abs(pixels - (0x2A, 0x7F, 0xB8)).sum(-1) < 30
    assert blue.sum() > 100, "the plots are not on the screen"
