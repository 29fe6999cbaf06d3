"""Laws of the report: it holds every number and caption, needs nothing else, and no caption can change it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

from kokanee.events import AtomicEvent, Incorrect, Verdict
from kokanee.ground_truth import Truth
from kokanee.judges import judged
from kokanee.predictions import Prediction
from kokanee.report import page
from kokanee.scoring import Item, Scores, scores

EVENTS = (AtomicEvent("A dog runs.", "seen"), AtomicEvent("A bell rings.", "heard"), AtomicEvent("It rains.", "seen"))
ATTACK = "</script><img src=x onerror=alert(1)> A <b>cat</b> purrs. <!--@data@--> \u2028 end"


def item(caption: str, verdict: Verdict | None, **where) -> Item:
    return Item(
        Prediction("a.mp4", caption, **where),
        Truth("a.mp4", EVENTS, where.get("start_s"), where.get("end_s")),
        [None if verdict is None else judged(verdict)],
    )


def two_systems() -> dict[str, dict[str, Scores]]:
    good = item(
        "A dog runs. A bell hums.", Verdict(("It rains.",), (Incorrect("A bell rings.", "A bell hums."),), (), 3)
    )
    bad = item(ATTACK, Verdict(("A dog runs.", "It rains."), (), ("A cat purrs.",), 3))
    part = item("A dog runs.", None, start_s=0.0, end_s=4.0)
    return {"good": {"global": scores([good])}, "<bad>": {"global": scores([bad]), "local": scores([part])}}


class Tags(HTMLParser):
    """All start tags, and the text of the script that holds the data."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data, self.inside = "", False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script" and ("id", "data") in attrs

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.data += data if self.inside else ""


def read(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    return tags


def test_the_page_has_every_number_and_every_caption():
    made = two_systems()
    text = page(made, "exact", "samples.jsonl")
    data = json.loads(read(text).data)
    assert data["systems"] == ["good", "<bad>"] and len(data["clips"]) == 2
    whole, part = data["clips"]
    assert "".join(piece[0] for piece in whole["said"]["good"]["pieces"]) == "A dog runs. A bell hums."
    assert ["A bell hums", "incorrect", "In truth: A bell rings."] in whole["said"]["good"]["pieces"]
    assert whole["said"]["good"]["counts"] == [1, 1, 0, 3] and whole["said"]["<bad>"]["hallucinated"] == [
        "A cat purrs."
    ]
    assert part["part"] == "0.0 – 4.0 s" and "counts" not in part["said"]["<bad>"]
    for rate in (66.7, 100.0, 33.3):
        assert f">{rate:.1f}</td>" in text


def test_what_captions_hold_is_text():
    tags = read(page(two_systems(), "openai:<m>", "<e>", lost="3 < 4"))
    assert [tag for tag, _ in tags.tags if tag in ("img", "bad", "m", "e")] == []
    assert sum(tag == "script" for tag, _ in tags.tags) == 2
    assert json.loads(tags.data)["clips"][0]["said"]["<bad>"]["pieces"][0][0].startswith("</script><img")


def test_the_page_needs_nothing_else():
    text = page(two_systems(), "exact", "samples.jsonl")
    assert not re.search(r"https?:|//[a-z]", text.replace("</", ""))
    assert all("src" not in attrs and "href" not in attrs for _, attrs in read(text).tags)
    assert "<!--@" not in text.replace("<!--@data@-->", "")


def test_the_page_says_by_whose_rules_it_was_judged():
    made = two_systems()
    assert "Kokanee's: clips without" in page(made, "exact", "e").replace("&#x27;", "'")
    assert "as published: clips without" in page(made, "exact", "e", as_published=True)


def test_kinds_are_shown_where_they_are_known():
    made = two_systems()["good"]["global"]
    unknown = replace(made, kinds={"other": made.kinds["seen"]})
    assert "By kind of event" in page({"x": {"global": made}}, "exact", "e")
    assert "By kind of event" not in page({"x": {"global": unknown}}, "exact", "e")


def test_every_row_of_a_table_has_a_cell_for_every_column():
    text = page(two_systems(), "exact", "e")
    tables = re.findall(r"<table>.*?</table>", text, re.DOTALL)
    rows = [[row.count("<th") + row.count("<td") for row in re.findall(r"<tr>.*?</tr>", table)] for table in tables]
    assert len(tables) == 4 and all(len(set(counts)) == 1 and len(counts) > 1 for counts in rows)
