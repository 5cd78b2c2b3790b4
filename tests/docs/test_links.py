"""Links and images of the documentation lead to something; headings that are linked to exist."""

import re

import pytest

from .blocks import PAGES, ROOT

HELP = sorted((ROOT / "web" / "docs").rglob("*.md"))


def targets(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, *HELP], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links(page):
    for target in targets(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


def test_every_page_is_in_the_index():
    linked = {(ROOT / "docs" / t.partition("#")[0]).resolve() for t in targets(ROOT / "docs" / "README.md")}
    assert set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "README.md"} <= linked


def test_every_image_is_shown():
    shown = {(p.parent / t).resolve() for p in PAGES for t in targets(p)}
    assert set((ROOT / "docs" / "images").iterdir()) <= shown
