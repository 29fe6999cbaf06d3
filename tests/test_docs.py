"""Laws of the documents: what they link to is there, and tables of a reproduction are those of its results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kokanee.reproduce_tables import lines

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked to."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        place, _, heading = link.partition("#")
        if "://" not in link:
            target = (page.parent / place).resolve() if place else page
            assert target.exists(), link
            assert not heading or heading in anchors(target), link


def test_tables_of_a_reproduction_are_those_of_its_results():
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    found = sorted((ROOT / "docs" / "reproduction").glob("*.json"))
    assert found and all(f"reproduction/{path.name}" in page for path in found)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    for seeds in (results, *([one] for one in results)):
        assert "\n".join(lines(seeds)) in page
