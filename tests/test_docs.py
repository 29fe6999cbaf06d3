"""Laws of the documents: what they link to is there, and tables of a reproduction are those of its results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic_core import to_jsonable_python

from kokanee.recipes import Training
from kokanee.reproduce_tables import lines

DIFFERENCES = {
    "questions, mrDPO beside SFT": ("mrdpo", "sft", "qa"),
    "questions, rebirth beside SFT": ("rebirth", "sft", "qa"),
    "questions, rebirth beside mrDPO": ("rebirth", "mrdpo", "qa"),
    "questions, rebirth beside SFT continued": ("rebirth", "continued", "qa"),
    "questions, SFT continued beside SFT": ("continued", "sft", "qa"),
    "total, rebirth beside mrDPO": ("rebirth", "mrdpo", "greedy"),
    "total at temperature 1, rebirth beside mrDPO": ("rebirth", "mrdpo", "sampled"),
    "total, SFT continued beside SFT": ("continued", "sft", "greedy"),
    "total, cross-entropy alone beside SFT": ("ce", "sft", "greedy"),
    "total, one round of gDPO beside one of plain DPO": ("gdpo", "dpo", "greedy"),
}
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


def test_every_setting_of_the_training_loop_has_its_default_in_the_documents():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    told = set()
    for names, default in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|([^|]*)\|", page, re.MULTILINE):
        fields = {name: Training.model_fields.get(name) for name in re.findall(r"`(\w+)`", names)}
        shown = [to_jsonable_python(field.default) for field in fields.values() if field and not field.is_required()]
        if shown:
            assert default.strip().lower() == ", ".join(map(str, shown)).lower(), names
        told |= fields.keys()
    assert Training.model_fields.keys() <= told


@pytest.mark.parametrize("row", DIFFERENCES)
def test_differences_of_stages_are_those_of_the_results(row):
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    name, other, group = DIFFERENCES[row]
    cells = []
    for path in sorted((ROOT / "docs" / "reproduction").glob("*.json")):
        compared = json.loads(path.read_text(encoding="utf-8"))["compared"]
        of = [one[group] for one in compared if (one["stage"], one["beside"]) == (name, other)]
        cells.append("".join("{more:+.1f} ({low:+.1f} to {high:+.1f})".format(**one) for one in of))
    assert f"| {row} | {' | '.join(cells)} |" in page and any(cells)
