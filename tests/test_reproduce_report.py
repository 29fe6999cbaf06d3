"""Laws of the page of a reproduction: every number of the results is on it, means are means, failures are told."""

from __future__ import annotations

import copy
import html
import re
from html.parser import HTMLParser

import pytest

from kokanee.errors import KokaneeError
from kokanee.reproduce_report import page
from kokanee.reproduce_tables import lines

ATTACK = '</script><u>line</u><img src=x onerror=alert(1)> "quoted" <!--@stages@--> \u2028 end'
TITLES = {
    "base": "Visual base",
    "sft": "SFT",
    "dpo": "Plain DPO",
    "gdpo": "gDPO",
    "mrdpo": "mrDPO",
    "rebirth": "Rebirth",
    "ce": "Cross-entropy",
    "continued": "Continued SFT",
}
TOTALS = {"base": 80, "sft": 56, "dpo": 40, "gdpo": 41, "mrdpo": 30, "rebirth": 32, "ce": 53, "continued": 54}
QA = {"sft": 93.5, "dpo": 92.5, "gdpo": 93.0, "mrdpo": 92.0, "rebirth": 93.0, "ce": 94.0, "continued": 94.5}


def marks(total: float) -> dict[str, float]:
    shares = {"missed": total - 5.5, "incorrect": 2.25, "hallucinated": 3.25, "hall": 5.5, "total": total}
    return {**shares, "total_low": total - 1, "total_high": total + 1, "repetition": total / 10, "words": total / 2}


def stage(name: str, total: float, right: float | None) -> dict:
    kinds = {"what <shape>": {"right": (right or 0) - 4, "questions": 200}, "sound": {"right": 77.7, "questions": 90}}
    qa = {"right": right, "low": (right or 0) - 0.4, "high": (right or 0) + 0.4, "questions": 2900, "by_kind": kinds}
    return {
        "name": name,
        "title": TITLES[name],
        "greedy": marks(total),
        "sampled": marks(total + 7),
        "local": marks(total - 6.6),
        "qa": qa if right else None,
    }


def rounds(start: float, step: float) -> list[dict]:
    def one(number: int) -> dict:
        total = start + step * number
        figures = {name: value for name, value in marks(total).items() if not name.startswith("total_")}
        return {"round": number, "greedy": figures, "sampled": figures, "qa": 94.0, "kl": 0.5 if number else None}

    return [one(number) for number in range(7)]


def result(seed: int = 0, more: float = 0.0, **changed) -> dict:
    """A whole run. more: what its total errors are higher by; changed: totals of stages, and parts of the results."""
    totals = {name: changed.pop(name, total + more) for name, total in TOTALS.items()}
    made = {
        "version": 1,
        "kokanee": "9.8.7",
        "model": "nano",
        "seed": seed,
        "quick": False,
        "from": None,
        "machine": {"device": "2 cores, x86_64", "torch": "2.13.0"},
        "exam": {"clips": 500, "seed": 7},
        "annotators": marks(38.5),
        "stages": [stage(name, total, QA.get(name)) for name, total in totals.items()],
        "rounds": rounds(53.0 + more, -4),
        "ce_rounds": rounds(53.0 + more, -0.1),
        "rebirth": {"captions": 14000, "kept": 13300, "dropped": {"repeats <itself>": 700}, "steps": 900},
        "times": [
            {"name": "1-see", "title": "Encoder pretraining: sight", "seconds": 1320.0},
            {"name": "6-mrdpo", "title": "Six rounds", "seconds": 2940.0},
        ],
        "goals": [{"what": "Rebirth keeps 80 %", "reached": True, "told": f"kept with seed {seed}"}],
    }
    return {**made, **changed}


class Tags(HTMLParser):
    """All start tags, and the text of the page without its style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.inside = tag

    def handle_data(self, data):
        self.text += data if self.inside != "style" else ""


def said(results: list[dict]) -> str:
    """The sentences at the page's top."""
    return Tags(re.findall(r'<div class="outcome">(.*?)</div>', page(results))[0]).text.replace("\u00a0", " ")


def row(text: str, name: str, which: int = 0, small: bool = False) -> list[str]:
    """The cells of a table's row, by its name; `which` of those that have it; only what is in small, or without it."""
    found = re.findall(rf'<tr[^>]*><th scope="row">{re.escape(name)}</th>(.*?)</tr>', text)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", found[which])
    if small:
        return ["".join(re.findall(r"<small>(.*?)</small>", cell)) for cell in cells]
    return [re.sub(r"<small>.*?</small>|<i .*?</i>", "", cell) for cell in cells]


def test_the_numbers_of_every_stage_are_on_the_page():
    text = page([result()])
    papers = {"base": "50.7", "sft": "41.8", "dpo": "37.8", "gdpo": "39.7", "mrdpo": "22.9"}
    for name, total in TOTALS.items():
        shares = [f"{total - 5.5:.1f}", "2.2", "3.2", "5.5", f"{total:.1f}", f"{total + 7:.1f}", f"{total - 6.6:.1f}"]
        right = f"{QA[name]:.1f}" if name in QA else "–"
        others = [f"{total / 10:.1f}", f"{total / 2:.1f}", right, papers.get(name, "–")]
        assert row(text, TITLES[name]) == shares + others
        assert row(text, TITLES[name], small=True)[4] == f"{total - 1:.1f} – {total + 1:.1f}"
        assert f'<span>{TITLES[name]}</span><div><div class="ours">' in text and f"<span>{total:.1f} %" in text
    assert row(text, "Annotators") == ["33.0", "2.2", "3.2", "5.5", "38.5", "–", "–", "3.9", "19.2", "–", "–"]
    assert row(text, "SFT", small=True)[9] == "93.1 – 93.9"


def test_changes_are_relative_to_sft_and_stand_beside_the_papers():
    text = page([result()])
    assert row(text, "Total error") == ["-46.4 %", "-42.9 %", "-5.4 %", "-3.6 %", "-40 %", "-45 %"]
    assert row(text, "Total error", small=True)[0] == "56.0 to 30.0"
    assert row(text, "Total error, local")[-2:] == ["-20 %", "–"] and row(text, "Repetition")[-2:] == ["-35 %", "–"]
    assert row(text, "Questions answered rightly, in points") == ["-1.5", "-0.5", "+0.5", "+1.0", "–", "–"]


def test_the_outcome_is_told_in_sentences():
    text = said([result()])
    assert "mrDPO lowered the total error of greedy captions: from 56.0 % to 30.0 % (46.4 % less); at temp" in text
    assert "at temperature 1 from 63.0 % to 37.0 % (41.3 % less)" in text
    assert (
        "one round of plain DPO 40.0 %, one round of gDPO 41.0 %, as many rounds of cross-entropy alone 53.0 %" in text
    )
    assert (
        "Rebirth kept 92 % of mrDPO's fall: the total error is 32.0 %." in text and "is at 54.0 % (3.6 % less)" in text
    )
    assert "SFT 93.5 %, mrDPO 92.0 %, Rebirth 93.0 %, SFT continued 94.5 %" in text
    assert "mrDPO cost 1.5 points, and rebirth brought back 1.0 of them." in text
    assert re.findall(r"[^.:]* did not [^.:]*", text) == [
        " Hall, a part of it, did not fall",
        " Rebirth did not reach SFT continued",
    ]


def test_the_share_kept_is_that_of_the_fall():
    text = page([result(sft=50.0, mrdpo=30.0, rebirth=35.0)])
    assert "rebirth kept <strong>75.0 %</strong>." in text and "kept only" not in text
    assert "Rebirth kept only 25 %" in said([result(sft=50.0, mrdpo=30.0, rebirth=45.0)])
    seeds = [result(0, sft=50.0, mrdpo=30.0, rebirth=35.0), result(1, sft=60.0, mrdpo=30.0, rebirth=30.0)]
    assert "kept <strong>90.0 %</strong> (75.0 – 100.0 %)" in page(seeds)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"mrdpo": 57.0}, "mrDPO did not lower the total error of greedy captions: from 56.0 % to 57.0 % (1.8 % more)"),
        ({"mrdpo": 57.0}, "did not lower the total error, so that rebirth had nothing to keep"),
        ({"mrdpo": 53.0}, "mrDPO did not do better than as many rounds of cross-entropy alone."),
        ({"dpo": 29.0}, "mrDPO did not do better than one round of plain DPO."),
        ({"rebirth": 56.5}, "Rebirth did not keep any of mrDPO's fall: the total error is 56.5 %."),
        ({"rebirth": 54.5}, "Rebirth did not do better than that."),
        ({}, "Hall, a part of it, did not fall: from 5.5 % to 5.5 % (no change)"),
    ],
)
def test_what_failed_is_told_as_such(changed, told):
    assert told in said([result(**changed)])


def difference(stage: str, beside: str, more: float, half: float) -> dict:
    ends = {"more": more, "low": more - half, "high": more + half}
    return {"stage": stage, "beside": beside, **dict.fromkeys(("greedy", "sampled", "local", "qa"), ends)}


def test_what_may_be_chance_is_told_by_the_differences_of_the_same_clips():
    sure, unsure = difference("mrdpo", "sft", -1.5, 0.5), difference("mrdpo", "sft", -0.5, 0.75)
    lost = result(compared=[unsure, difference("rebirth", "continued", -22.0, 23.0)])
    told = "(which may be chance: -0.5 points, 95 % interval -1.2 to +0.2)"
    assert f"less) {told}; at temperature 1" in said([lost]) and f"mrDPO cost 1.5 points {told}, and" in said([lost])
    assert "Rebirth is below that (which may be chance: -22.0 points" in said([lost])
    assert "chance" not in said([result(compared=[sure])]) + said([result()])
    assert "may be chance in 1 of 2 seeds" in said([result(compared=[sure]), result(1, compared=[unsure])])
    text = page([result(compared=[sure, difference("rebirth", "mrdpo", 0.5, 0.25)])])
    assert row(text, "mrDPO beside SFT") == ["-1.5"] * 4
    assert row(text, "Rebirth beside mrDPO", small=True) == ["+0.2 to +0.8"] * 4
    both = page([result(compared=[sure]), result(1, compared=[unsure]), result(2)])
    assert row(both, "mrDPO beside SFT") == ["-1.0"] * 4
    assert row(both, "mrDPO beside SFT", small=True) == ["-1.5 to -0.5; chance? 1 of 2; 2 of 3 seeds"] * 4
    assert "beside SFT" not in page([result()])


def test_answers_that_rebirth_did_not_bring_back_are_told_as_such():
    made = result()
    by_name = {one["name"]: one for one in made["stages"]}
    by_name["rebirth"]["qa"]["right"] = 91.0
    assert "mrDPO cost 1.5 points, which rebirth did not bring back." in said([made])
    by_name["continued"]["qa"]["right"] = 90.0
    assert "did not reach" not in said([made])
    by_name["mrdpo"]["qa"]["right"] = 94.0
    assert "mrDPO cost none, but rebirth cost 2.5 points." in said([made])
    by_name["sft"]["sampled"]["total"] = 20.0
    assert "but it did not lower that at temperature 1 from 20.0 % to 37.0 % (85.0 % more)" in said([made])


def test_several_seeds_are_shown_as_mean_lowest_and_highest():
    seeds = [result(0), result(1, 1.0), result(2, -4.0)]
    text = page(seeds)
    assert row(text, "mrDPO")[4] == "29.0" and row(text, "mrDPO", small=True)[4] == "26.0 – 31.0"
    assert row(text, "Total error")[0] == "-47.3 %" and row(text, "Total error", small=True)[0] == "-50.0 to -45.6"
    assert "from 55.0 % to 29.0 % (47.3 % less)" in said(seeds) and "Means of 3 seeds" in text
    assert "<dt>Seeds</dt><dd>0, 1, 2</dd>" in text and "95 %" not in text
    figure = re.findall(r"<figcaption>Total error, greedy .*?</figure>", text)[0]
    assert "Round 6: mrDPO 28.0" in figure and figure.count("<circle") == 3 * 14 + 14
    assert "mrDPO <strong>28.0</strong>" in figure and "each seed</span>" in figure


def test_a_stage_that_not_all_seeds_have_is_compared_over_those_that_have_it():
    late = result(1, 10.0)
    late["stages"] = late["stages"][:2]
    text = page([result(0), late])
    assert row(text, "SFT")[4] == "61.0" and row(text, "mrDPO")[4] == "30.0"
    assert row(text, "mrDPO", small=True)[4] == "1 of 2 seeds"
    assert row(text, "Total error")[0] == "-46.4 %" and "Rebirth (seed 1)" in said([result(0), late])
    found = [line.split(" | ") for line in lines([result(0), late])]
    assert [cells[3] for cells in found if cells[0] == "| mrDPO (1 of 2 seeds)"] == ["30.0"]


@pytest.mark.parametrize("gone", [*TITLES, *(tuple(TITLES)[n:] for n in range(8))])
def test_missing_stages_leave_no_hole_and_are_named(gone):
    made = result()
    made["stages"] = [one for one in made["stages"] if one["name"] not in ([gone] if isinstance(gone, str) else gone)]
    text = page([made])
    there = {one["name"] for one in made["stages"]}
    for name, title in TITLES.items():
        assert (f'<tr><th scope="row">{title}</th>' in text) == (name in there)
        assert (f"<span>{title}</span><div>" in text) == (name in there)
    assert "Not there yet: " in said([made]) and not re.search(r"\bnan\b|None|<td[^>]*></td><td[^>]*></td>", text)
    widths = {cells.count("<td") for cells in re.findall(r'<tr><th scope="row">SFT</th>.*?</tr>', text)}
    assert widths <= {11}


def test_a_run_that_has_only_begun_has_a_page():
    text = page([{"version": 1, "kokanee": "0.1.0", "model": "nano", "seed": 3, "quick": False, "from": None}])
    assert (
        "Nothing is measured yet." in text and text.count("Not there yet.") >= 6 and "No round is finished yet." in text
    )
    with pytest.raises(KokaneeError, match="one seed at least"):
        page([])


def test_what_is_not_known_of_a_stage_is_a_dash():
    made = result()
    made["stages"] = [{**one, "sampled": None, "local": None, "qa": None} for one in made["stages"]]
    for one in made["stages"]:
        del one["greedy"]["total_low"]
    text = page([made])
    cells = row(text, "mrDPO")
    assert (cells[5], cells[6], cells[9]) == ("–", "–", "–") and row(text, "mrDPO", small=True)[4] == ""
    assert row(text, "Total error, local")[:2] == ["–", "–"] and "Questions answered rightly:" not in text


def test_a_run_from_a_model_does_not_wait_for_the_base():
    made = result() | {"from": "nano-sft"}
    made["stages"] = made["stages"][1:]
    assert "Not there yet" not in said([made]) and "<dd>nano-sft, pretraining skipped</dd>" in page([made])
    made["from"] = None
    assert "Not there yet: Visual base." in said([made])


def test_a_quick_run_says_that_its_numbers_mean_nothing():
    assert '<p class="lost">A quick run' in page([result(quick=True)]) and "mean nothing" in page([result(quick=True)])
    assert "quick run" not in page([result()]) and "mean nothing" not in page([result()])
    assert "Reached" in page([result()]) and "Reached" not in page([result(quick=True)])
    assert "rebirth kept" in page([result()]) and "rebirth kept" not in page([result(quick=True)])
    assert "mrDPO lowered" in said([result()]) and "mrDPO lowered" not in said([result(quick=True)])


def test_lines_for_a_terminal_say_what_the_page_says():
    one = lines([result()])
    assert "| mrDPO | 24.5 | 5.5 | 30.0 (29.0 to 31.0) | 37.0 (36.0 to 38.0) | 23.4 (22.4 to 24.4) | 3.0 |" in one[6]
    assert one[6].endswith("| 92.0 (91.6 to 92.4) | 22.9 |") and one[8].endswith("| 94.0 (93.6 to 94.4) |  |")
    assert len({line.count("|") for line in one}) == 1 and len(one) == 2 + len(TITLES) + 1
    several = lines([result(0), result(1, more=4.0)])
    assert "| mrDPO | 26.5 (24.5 to 28.5) | 5.5 | 32.0 (30.0 to 34.0) |" in several[6]
    assert len(lines([result() | {"stages": result()["stages"][:2]}])) == 2 + 2 + 1


def test_rebirth_goals_and_times_are_told():
    made = result()
    made["goals"] += [{"what": "QA stays", "reached": False, "told": "QA <fell>"}, {"what": "Later", "reached": None}]
    text = page([made])
    assert row(text, "Captions of the mrDPO model") == ["14,000", ""] and row(text, "Kept") == ["13,300", "95.0 %"]
    assert (
        row(text, "Dropped: repeats &lt;itself&gt;") == ["700", "5.0 %"] and row(text, "Steps of training")[0] == "900"
    )
    assert row(text, "Encoder pretraining: sight") == ["1-see", "22 min", "31 %"] and row(text, "All", 1)[1] == "71 min"
    goals = re.findall(r'<li class="(\w+)"><strong>(.*?)</strong> <span>(.*?)<', text)
    wanted = [("reached", "Reached", "Rebirth keeps 80 %"), ("unreached", "Not reached", "QA stays")]
    assert goals == [*wanted, ("none", "Not known", "Later")] and "<small>QA &lt;fell&gt;</small>" in text
    other = copy.deepcopy(made)
    other["goals"][0]["reached"] = False
    assert "<strong>Not reached by 1 of 2 seeds</strong>" in page([made, other])


def test_answers_are_told_by_kind_of_question():
    text = page([result()])
    assert row(text, "what &lt;shape&gt;") == ["200", "89.5", "88.0", "89.0", "90.5"]
    assert row(text, "All") == ["2,900", "93.5", "92.0", "93.0", "94.5"] and row(text, "sound")[1:] == ["77.7"] * 4
    assert row(page([result(), result(1)]), "sound", small=True)[1] == "77.7 – 77.7"


def test_what_results_hold_is_text():
    made = result()
    made |= dict.fromkeys(("model", "seed", "from", "kokanee"), ATTACK)
    made["machine"], made["exam"] = (
        dict.fromkeys(("device", "torch"), ATTACK),
        {"clips": ATTACK, "seed": ATTACK},
    )
    made["stages"][1]["title"] = made["times"][0]["title"] = made["times"][0]["name"] = ATTACK
    made["stages"][1]["qa"]["by_kind"] = {ATTACK: {"right": ATTACK, "questions": ATTACK}}
    made["stages"][2]["greedy"]["total"] = ATTACK
    made["goals"] = [{"what": ATTACK, "reached": True, "told": ATTACK}]
    made["rebirth"] = {"captions": ATTACK, "kept": 1, "dropped": {ATTACK: 2}, "steps": 3}
    made["stages"] = made["stages"][:3]
    for results in ([made], [made, result(1)]):
        tags = Tags(page(results))
        assert not {"img", "script", "u"} & set(tags.tags) and not {"onerror", "src", "href"} & tags.attributes
        assert tags.text.count(ATTACK) > 10 and html.escape(ATTACK) in page(results)


def test_the_papers_numbers_are_marked_as_the_papers():
    text = page([result()])
    assert len(re.findall(r'<td class="paper">(?!–)', text)) == 5 + 4 and text.count('<small class="paper">') == 5
    assert "cannot be compared with ours" in text and '<p class="note paper">Also in the second paper' in text


def test_the_page_needs_nothing_else():
    for results in ([result()], [result(0), result(1)]):
        text = page(results)
        assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("</", ""))
        assert text.count("<!--@") == 0 and "<svg" in text and "<script" not in text
